"""A run of seconds: the demo's recipe on 16 clips and 8 stills."""

import json
from pathlib import Path

from rich.console import Console

from fluxclip.training import recipe as recipes

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"
QUIET = Console(quiet=True)


def small_run(folder: Path, emoji: Path) -> list[str]:
    """What to change in the demo's recipe; annotations are written into `folder`, output is run."""
    for name, count in (("train", 16), ("stills", 8), ("val", 4)):
        records = json.loads((emoji / f"{name}.json").read_text())[:count]
        for record in records:
            record["video"] = str(emoji / record["video"])
        (folder / f"{name}.json").write_text(json.dumps(records))
    return [
        f"output={folder / 'run'}",
        f"data.0.annotations={folder / 'train.json'}",
        f"data.1.annotations={folder / 'stills.json'}",
        f"validation.annotations={folder / 'val.json'}",
        "data.0.batch=8", "data.1.batch=4", "data.0.cache_frames=8",
        "flux.frames=[2,4,2]", "flux.sides=[28,56,28]", "flux.tokens=[4,64]",
        "flux.budgets=[32,8]", "flux.grids=[[64,4,56],[8,4,28]]",
        "optimizer.steps=40", "optimizer.warmup_steps=4", "validation.every=20",
        "save_as=fp32",
    ]  # fmt: skip


def read(changes: list[str]) -> recipes.Recipe:
    return recipes.read(DEMO, changes)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
