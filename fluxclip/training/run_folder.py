"""What a run leaves behind: recipe.toml, metrics.jsonl, and the model folders best/ and last/."""

import platform
import shlex
import sys
from datetime import date
from pathlib import Path

import torch

from fluxclip import __version__
from fluxclip.model import weights
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.training.recipe import Recipe, to_toml

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def create(recipe: Recipe) -> Path:
    """Make the run folder and write the resolved recipe into it.

    Raises FileExistsError if a run is there already: nothing is overwritten.
    """
    folder = Path(recipe.output)
    if (folder / "recipe.toml").exists():
        raise FileExistsError(
            f"{folder} already holds a run: choose another folder with --set output=..., or "
            f"delete that one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    return folder


def save_model(
    model: FluxCLIP, folder: Path, recipe: Recipe, *, step: int, seconds: float,
    scores: dict[str, float],
) -> None:  # fmt: skip
    """Write a model folder with its card."""
    card = _card(model, recipe, step=step, seconds=seconds, scores=scores)
    weights.save(model, folder, card=card, dtype=_DTYPES[recipe.save_as])


def _card(
    model: FluxCLIP, recipe: Recipe, *, step: int, seconds: float, scores: dict[str, float]
) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    data = "\n".join(f"- {Path(s.annotations).name}, {s.batch} pairs a step" for s in recipe.data)
    numbers = "\n".join(f"- {name}: {value:.2f}" for name, value in scores.items())
    command = shlex.join(["fluxclip", *sys.argv[1:]])
    return f"""# {Path(recipe.output).name}

A FluxCLIP video-text model, preset `{recipe.model.preset}`, {trained / 1e6:.2f} M trained
parameters; text tower `{recipe.text.source}` ({recipe.text.weights}).

- Command: `{command}`
- Seed: {recipe.seed}; step {step} of {recipe.optimizer.steps}, {seconds / 60:.1f} minutes
- Date: {date.today().isoformat()}
- Machine: {_machine()}
- Versions: fluxclip {__version__}, torch {torch.__version__}, Python {platform.python_version()}

Trained on
{data}

Validation ({Path(recipe.validation.annotations).name}), all tokens of the default grid
{numbers}
"""


def _machine() -> str:
    threads = f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"
    return f"{torch.cuda.get_device_name()}, {threads}" if torch.cuda.is_available() else threads
