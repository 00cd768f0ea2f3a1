"""Time whole training steps of both towers: clips per second, work per second, memory.

    python scripts/bench_train.py [--out benchmarks/train-DEVICE.json]

Fresh random weights, seed 0, synthetic pairs that lie on the device: decoding and copying are not
included, tokenizing captions is. A step is that of the training loop: Forward, engine `plain`,
gradients cut, AdamW. First a small model's gradients with activation checkpointing and with
compiled blocks are compared with those without, and the device's large matrix products are timed:
the peak that shares are of. Then, each with and without checkpointing, compiled and not:
1. ViT-B/16 on 4 frames of 224 x 224 pixels (785 tokens), the size of AVION (arXiv 2309.16669).
2. FluxViT-B on 8 frames of 224 x 224 pixels at budgets of 2,048, 1,024 and 512 tokens.
Both with CLIP's text tower of 12 layers, 512 channels, 77 tokens. A step goes through in as few
pieces (gradient cache) as memory takes, found by trying. Work is counted once: what checkpointing
and pieces compute again is not in it, nor are the kernels that no matrix product is. Without a GPU
two tiny models stand in for these, to see that all works.
"""

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_encoder import cpu_name
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fluxclip.data.batch import Batch, Step
from fluxclip.model import weights
from fluxclip.model.presets import FluxCLIPConfig, TextConfig, VideoTowerConfig, preset
from fluxclip.tokens.budget import Draw, GridTable
from fluxclip.training import engines
from fluxclip.training.engines import Engine
from fluxclip.training.flops import matrix_peak
from fluxclip.training.forward import Forward
from fluxclip.training.recipe import (
    FluxRecipe,
    ModelRecipe,
    OptimizerRecipe,
    Recipe,
    SourceRecipe,
    ValidationRecipe,
)

WORDS = ("a", "dog", "cat", "child", "runs", "sleeps", "sings", "small", "old", "river")
AVION_CLIPS_PER_S = 42.7  # of one A5000, from 4.0 M pairs x 5 epochs in 16.3 hours on eight
TARGET_CLIPS_PER_S = 640


@dataclass(frozen=True)
class Case:
    """A pair of towers, and the clips and budget that they are trained at."""

    name: str
    video: VideoTowerConfig
    text: str
    num_frames: int
    side: int
    budget: int
    batch: int


def cases(device: str, batch: int | None) -> list[Case]:
    if device == "cpu":
        tiny = preset("tiny", depth=4)
        text, size = "ViT-S-32-alt", batch or 8
        return [
            Case("tiny, 8 x 112^2 at 512", tiny, text, 8, 112, 512, size),
            Case("tiny, 8 x 112^2 at 128", tiny, text, 8, 112, 128, size),
        ]
    vit = VideoTowerConfig(
        width=768, depth=12, heads=12, pool_heads=12, pooled=768, table_frames=4, table_side=224,
        patch=16, anatomy="clip",
    )  # fmt: skip
    base, text, size = preset("base"), "ViT-B-16", batch or 1024
    return [
        Case("ViT-B/16, 4 x 224^2, all 784", vit, text, 4, 224, 784, size),
        *(
            Case(f"FluxViT-B, 8 x 224^2 at {budget:,}", base, text, 8, 224, budget, size)
            for budget in (2048, 1024, 512)
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, help="pairs of a step; 1,024 on a GPU")
    parser.add_argument("--repeats", type=int, default=3, help="steps that are timed")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = os.getloadavg()[0]  # of others: on a CPU above a half of a core, times are no times
    correct = correctness(device)
    peak = matrix_peak(device, bf16=device == "cuda")
    rows = [
        row
        for case in cases(device, arguments.batch)
        for compiled in (False, True)
        for row in off_and_on(case, device, peak, arguments.repeats, compiled=compiled)
    ]
    record = {
        "benchmark": "train", "command": shlex.join(["python", *sys.argv]), "seed": 0,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(), "load_before": load, "torch": torch.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
        "date": date.today().isoformat(), "repeats": arguments.repeats,
        "precision": "bf16" if device == "cuda" else "fp32",
        "matrix_peak_tflops": peak / 1e12,
        "reference": {
            "avion_clips_per_s_of_an_a5000": AVION_CLIPS_PER_S,
            "target_clips_per_s_of_an_h200": TARGET_CLIPS_PER_S,
        },
        "correctness": correct, "rows": rows,
    }  # fmt: skip
    show(record)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def recipe_of(case: Case, *, compiled: bool, pieces: int) -> Recipe:
    """What the loop would be given; the data that it names are made up below."""
    return Recipe(
        output="none",
        flux=FluxRecipe(
            frames=(case.num_frames, case.num_frames, 1), sides=(case.side, case.side, 14),
            tokens=(1, 10**6), budgets=(case.budget,),
            grids=((case.budget, case.num_frames, case.side),),
        ),
        model=ModelRecipe(preset="base"),
        optimizer=OptimizerRecipe(steps=1000, lr=1e-4, warmup_steps=0),
        data=(SourceRecipe(annotations="none", batch=case.batch),),
        validation=ValidationRecipe(annotations="none"),
        compile=compiled, pieces=pieces,
    )  # fmt: skip


def towers(case: Case, device: str, *, checkpointing: bool, compiled: bool, bf16: bool) -> Forward:
    """Fresh towers as a run has them."""
    torch.manual_seed(0)
    config = FluxCLIPConfig(
        video=case.video,
        grids=GridTable((case.num_frames, case.side)),
        text=TextConfig("open_clip_tower", case.text, "stored", 77),
    )
    model = weights.build(config).to(device).train()
    if checkpointing:
        model.recompute_blocks()
    return Forward(model, (), recipe_of(case, compiled=compiled, pieces=1), bf16=bf16)


def engine_of(case: Case, forward: Forward, *, pieces: int) -> Engine:
    recipe = recipe_of(case, compiled=forward.recipe.compile, pieces=pieces)
    return engines.make("plain", forward, recipe)


def synthetic(case: Case, device: str) -> Step:
    """A step of noise and captions that all differ, frames on the device already."""
    drawn = torch.Generator(device).manual_seed(0)
    shape = (case.batch, case.num_frames, case.side, case.side, 3)
    frames = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=drawn)
    chosen = torch.randint(len(WORDS), (case.batch, 10), generator=torch.Generator().manual_seed(0))
    captions = tuple(
        f"{' '.join(WORDS[word] for word in row)} {number}"
        for number, row in enumerate(chosen.tolist())
    )
    batch = Batch(frames, captions, captions, tuple(range(case.batch)))
    return Step(0, Draw(case.num_frames, case.side, (case.budget,)), (batch,), {})


def correctness(device: str) -> dict[str, Any]:
    """A step of a small model in fp32: its loss, and how far other ways are from its gradients."""
    tiny = preset("tiny", depth=3, drop_path=0.2, layer_scale=1.0)
    case = Case("tiny", tiny, "ViT-S-32-alt", 2, 56, 16, 6)

    def gradients(
        *, checkpointing: bool, compiled: bool, pieces: int
    ) -> tuple[float, dict[str, Tensor]]:
        forward = towers(case, device, checkpointing=checkpointing, compiled=compiled, bf16=False)
        loss, _ = engine_of(case, forward, pieces=pieces).backward(synthetic(case, device))
        return loss, {
            name: parameter.grad
            for name, parameter in forward.named_parameters()
            if parameter.grad is not None
        }

    loss, expected = gradients(checkpointing=False, compiled=False, pieces=1)
    if not 0 < loss < 100:
        raise SystemExit(f"the loss of a step is {loss}")
    found = {"loss": loss}
    whole = sum(gradient.square().sum() for gradient in expected.values()) ** 0.5
    for name, checkpointing, compiled, pieces, bound in (
        ("checkpointing", True, False, 1, 1e-5),
        ("pieces_of_a_step", False, False, 3, 1e-4),
        ("all_and_compiled", True, True, 3, 1e-4),
    ):
        other = gradients(checkpointing=checkpointing, compiled=compiled, pieces=pieces)[1]
        error = sum((other[key] - expected[key]).square().sum() for key in expected) ** 0.5
        found[f"gradient_error_of_{name}"] = float(error / whole)
        if not error <= bound * whole:
            raise SystemExit(f"{name}: gradients are off by {float(error / whole):.1e} of them")
    return found


def off_and_on(
    case: Case, device: str, peak: float, repeats: int, *, compiled: bool
) -> list[dict[str, Any]]:
    """Rows without and with checkpointing; the latter says what it costs at equal pairs at once."""

    def both(case: Case) -> list[dict[str, Any]]:
        return [
            timed(case, device, peak, repeats, checkpointing=checkpointing, compiled=compiled)
            for checkpointing in (False, True)
        ]

    off, on = rows = both(case)
    if off["pieces"] > 1:  # a piece as a step of its own: both in one pass
        off, on = both(replace(case, batch=case.batch // off["pieces"]))
    rows[1]["times_longer_by_checkpointing"] = on["seconds_a_step"] / off["seconds_a_step"]
    rows[1]["memory_share_by_checkpointing"] = (
        on["peak_gib"] / off["peak_gib"] if on["peak_gib"] else None
    )
    return rows


def timed(
    case: Case, device: str, peak: float, repeats: int, *, checkpointing: bool, compiled: bool
) -> dict[str, Any]:
    """Steps of a case, in as few pieces as fit."""
    step, pieces = synthetic(case, device), 1
    forward = towers(
        case, device, checkpointing=checkpointing, compiled=compiled, bf16=device == "cuda"
    )
    while True:
        try:
            engine = engine_of(case, forward, pieces=pieces)
            took, flops, memory = run(case, step, engine, device, repeats)
            break
        except torch.OutOfMemoryError:
            if pieces >= case.batch:
                raise
        pieces *= 2
        del engine
        free(device)
    del forward, engine
    free(device)
    second = statistics.median(took)
    return {
        "name": case.name, "text": case.text, "batch": case.batch, "pieces": pieces,
        "tokens": case.budget, "checkpointing": checkpointing, "compiled": compiled,
        "seconds_a_step": second, "slowest_step": max(took),
        "clips_per_s": case.batch / second,
        "gflops_per_clip": flops / case.batch / 1e9,
        "tflops": flops / second / 1e12, "share_of_matrix_peak": flops / second / peak,
        "peak_gib": memory,
    }  # fmt: skip


def run(
    case: Case, step: Step, engine: Engine, device: str, repeats: int
) -> tuple[list[float], float, float | None]:
    """Seconds of each step, operations of one, and the most memory; two steps warm up."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took, flops = [], 0.0
    for number in range(repeats + 2):
        start = time.perf_counter()
        loss, parts = engine.backward(replace(step, number=number))
        engine.step_down(lr=1e-4)
        if device == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
        flops = parts["flops"]
        if not 0 < loss < 100:
            raise SystemExit(f"{case.name}: the loss of step {number} is {loss}")
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return took[2:], flops, memory


def free(device: str) -> None:
    """Give back what a model took: its graph has cycles."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def show(record: dict[str, Any]) -> None:
    title = "{device_name}, {precision}, torch {torch}, peak {matrix_peak_tflops:.3g} TFLOP/s"
    table = Table(title=title.format(**record))
    for column in ("", "", "pieces", "clips/s", "TFLOP/s", "of peak", "GiB"):
        table.add_column(column, justify="right" if column else "left")
    for r in record["rows"]:
        ways = [name for name in ("checkpointing", "compiled") if r[name]]
        memory = "" if r["peak_gib"] is None else f"{r['peak_gib']:.0f}"
        table.add_row(
            r["name"], ", ".join(ways), str(r["pieces"]), f"{r['clips_per_s']:.1f}",
            f"{r['tflops']:.3g}", f"{r['share_of_matrix_peak']:.2f}", memory,
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
