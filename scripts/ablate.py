"""Two ways to train, each with the same seeds: what the difference is worth, and what it costs.

    python scripts/ablate.py projectors|run_length [--steps 400] [--seeds 0 1 2] [--set KEY=VALUE]

projectors: one pooling for all token budgets against one for each, at the budgets that were
trained, between them and beyond. run_length: all tokens against those that the run-length filter
leaves, in training and after it.

Trains configs/demo.toml with a few changes (ABLATIONS below), takes the last weights (none are
chosen by a score), and scores them on the test clips, which decides nothing here: the defaults were
set before. Runs that are there already are not trained again. Writes
benchmarks/ablation-NAME-DEVICE.json: R@1, MRR (text to video) and seconds of training of each seed;
and the difference of MRR, second way minus first, with its 95 % interval over the queries, each
query's values being averaged over the seeds first.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_encoder import cpu_name
from rich.console import Console
from rich.table import Table

from fluxclip import load_model
from fluxclip.evaluation.budgets import evaluate
from fluxclip.evaluation.protocols.annotations import read
from fluxclip.evaluation.ranking import Floats, Ranks, paired_bootstrap
from fluxclip.evaluation.record import Record, Score
from fluxclip.training import recipe as recipes
from fluxclip.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "demo.toml"


@dataclass(frozen=True)
class Ablation:
    """Changes of the recipe that both ways share and that each has, and the budgets scored."""

    both: tuple[str, ...]
    ways: dict[str, tuple[str, ...]]
    budgets: tuple[int | None, ...]


ABLATIONS = {
    "projectors": Ablation(
        both=("flux.budgets=[64,16]",),
        ways={
            "shared": ("model.projectors=shared",),
            "per_budget": ("model.projectors=per_budget",),
        },
        budgets=(256, 128, 64, 32, 16, 8, 4),  # of the 256 tokens of 4 x 112 pixels
    ),
    "run_length": Ablation(
        both=(
            "flux.frames=[4,4,1]", "flux.sides=[84,84,14]", "flux.tokens=[144,144]",
            "flux.budgets=[144]", "flux.grids=[[144,4,84]]",
        ),
        ways={"all_tokens": (), "run_length": ("model.filter=run_length",)},
        budgets=(None, 72, 36),
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(ABLATIONS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="changes of the recipe")
    parser.add_argument("--annotations", default=str(ROOT / "assets/animated-emoji/test.json"))
    parser.add_argument("--runs", type=Path, help="by default runs/ablation-NAME")
    parser.add_argument("--out", type=Path, help="by default benchmarks/ablation-NAME-DEVICE.json")
    arguments = parser.parse_args()
    ablation, console = ABLATIONS[arguments.name], Console()
    runs = arguments.runs or ROOT / "runs" / f"ablation-{arguments.name}"
    task = read(arguments.annotations)
    records: dict[str, list[Record]] = {way: [] for way in ablation.ways}
    seconds: dict[str, list[float]] = {way: [] for way in ablation.ways}
    for seed in arguments.seeds:
        for way, own in ablation.ways.items():
            output = runs / f"{way}-{seed}"
            changes = [
                f"optimizer.steps={arguments.steps}",
                f"optimizer.warmup_steps={arguments.steps // 10}",
                f"validation.every={arguments.steps}",
                f"seed={seed}", f"output={output}", *ablation.both, *own, *arguments.set,
            ]  # fmt: skip
            recipe = recipes.read(RECIPE, changes)
            train(recipe, resume=any(output.glob("state/step-*")), console=console)
            records[way].append(
                evaluate(load_model(output / "last"), task, budgets=ablation.budgets)
            )
            seconds[way].append(seconds_per_step(output))
    rows = [row(i, ablation, records) for i in range(len(ablation.budgets))]
    found = {
        "benchmark": f"ablation of {arguments.name}",
        "command": shlex.join(["python", *sys.argv]),
        "recipe": RECIPE.name,
        "changes": {way: [*ablation.both, *own] for way, own in ablation.ways.items()},
        "steps": arguments.steps,
        "seeds": arguments.seeds,
        "data": Path(arguments.annotations).name,
        "num_videos": len(task.videos),
        "seconds_per_step": seconds,
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "rows": rows,
    }
    show(found, console)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = arguments.out or ROOT / "benchmarks" / f"ablation-{arguments.name}-{device}.json"
    out.write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"record: {out}")


def row(i: int, ablation: Ablation, records: dict[str, list[Record]]) -> dict[str, Any]:
    """The numbers at the i-th budget."""
    results = {way: [record.results[i] for record in own] for way, own in records.items()}
    first_Q, second_Q = (
        np.mean([reciprocal_Q(result.cosine.text_to_video) for result in own], axis=0)
        for own in results.values()
    )
    change = paired_bootstrap(second_Q, first_Q)
    return {
        "token_budget": ablation.budgets[i],
        "num_tokens": {way: [result.num_tokens for result in own] for way, own in results.items()},
        "r1": {way: [r.cosine.text_to_video.r1 for r in own] for way, own in results.items()},
        "mrr": {way: [r.cosine.text_to_video.mrr for r in own] for way, own in results.items()},
        "mrr_difference": {"mean": change.mean, "low": change.low, "high": change.high},
    }


def reciprocal_Q(score: Score) -> Floats:
    return 100 * Ranks.from_means(score.ranks, score.ties).reciprocal_Q()


def seconds_per_step(run: Path) -> float:
    """Of the second half of a run, loading included; the median, so that a pause does not count."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    at = [line["seconds"] for line in lines if "loss" in line]
    return float(np.median(np.diff(at[len(at) // 2 :])))


def show(found: dict[str, Any], console: Console) -> None:
    ways = list(found["seconds_per_step"])
    table = Table()
    for head in ("budget", *(f"{way}: tokens, R@1, MRR" for way in ways), "MRR difference (95 %)"):
        table.add_column(head, justify="right")
    for at in found["rows"]:
        change = at["mrr_difference"]
        means = [
            f"{np.mean(at['num_tokens'][way]):.0f}  {np.mean(at['r1'][way]):.1f}  "
            f"{np.mean(at['mrr'][way]):.1f}"
            for way in ways
        ]
        table.add_row(
            str(at["token_budget"] or "all"), *means,
            f"{change['mean']:+.1f} ({change['low']:+.1f} to {change['high']:+.1f})",
        )  # fmt: skip
    console.print(table)
    for way in ways:
        console.print(f"{way}: {np.mean(found['seconds_per_step'][way]):.3f} s a step")


if __name__ == "__main__":
    main()
