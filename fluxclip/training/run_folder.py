"""What a run leaves behind: recipe.toml, metrics.jsonl, and the model folders best/ and last/."""

import platform
from datetime import date
from pathlib import Path

import torch

from fluxclip import __version__
from fluxclip.model import weights
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.training.recipe import Recipe, to_toml

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class RunFolder:
    """The folder of one run; making it writes the resolved recipe.

    command: what the cards say the run was started by. Raises FileExistsError if a run is there
    already: nothing is overwritten.
    """

    def __init__(self, recipe: Recipe, *, command: str = "") -> None:
        self.recipe, self.path = recipe, Path(recipe.output)
        self.command = command or "fluxclip.training.loop.train"
        if (self.path / "recipe.toml").exists():
            raise FileExistsError(
                f"{self.path} already holds a run: choose another folder with --set output=..., or "
                f"delete that one"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")

    def save(
        self, name: str, model: FluxCLIP, *, step: int, seconds: float, scores: dict[str, float]
    ) -> None:
        """Write the model folder `name` with its card; scores are those after `step` steps."""
        card = _card(self, model, step=step, seconds=seconds, scores=scores)
        weights.save(model, self.path / name, card=card, dtype=_DTYPES[self.recipe.save_as])


def _card(
    run: RunFolder, model: FluxCLIP, *, step: int, seconds: float, scores: dict[str, float]
) -> str:
    recipe = run.recipe
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    data = "\n".join(f"- {Path(s.annotations).name}, {s.batch} pairs a step" for s in recipe.data)
    numbers = "\n".join(f"- {name}: {value:.2f}" for name, value in scores.items())
    return f"""# {run.path.name}

A FluxCLIP video-text model, preset `{recipe.model.preset}`, {trained / 1e6:.2f} M trained
parameters; text tower `{recipe.text.source}` ({recipe.text.weights}).

- Command: `{run.command}`
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
