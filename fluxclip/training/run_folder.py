"""What a run leaves behind: recipe.toml, metrics.jsonl, model folders best/ and last/, state/."""

import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fluxclip import __version__, distributed
from fluxclip.data import sources
from fluxclip.model import weights
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.training import checkpoint
from fluxclip.training import recipe as recipes
from fluxclip.training.checkpoint import Progress
from fluxclip.training.engines import Engine
from fluxclip.training.recipe import Recipe

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_SECRET = re.compile(r"(https?://[^\s'\"?]*\?)[^\s'\"]+")  # an address may be signed
# what may differ when a run is resumed: it changes no number, but by rounding. Annotations may lie
# elsewhere if they are the same, which is compared.
_MAY_DIFFER = (
    "output", "workers", "save_minutes", "pieces", "rows", "engine", "zero_stage",
    "activation_checkpointing", "compile", "wandb", "max_unreadable", "decode_timeout_s",
)  # fmt: skip


class RunFolder:
    """The folder of one run, and with `resume` where the run stood when its last state was saved.

    command: what the cards say the run was started by. Raises FileExistsError without `resume` if
    a run is there already: nothing is overwritten. With it, a run that has saved nothing yet starts
    over; FileNotFoundError if it has a model and no state, ValueError if the run's recipe or the
    data it names are others. OSError for a folder that cannot be written to. digests: fingerprints
    of the data that the recipe names, by key.
    """

    def __init__(self, recipe: Recipe, *, command: str = "", resume: bool = False) -> None:
        self.recipe, self.path = recipe, Path(recipe.output)
        self.progress = Progress(command=command or "fluxclip.training.loop.train")
        self.digests = _digests(recipe)
        self._resumed = self._newest_state() if resume else None
        if self._resumed:
            self.progress = checkpoint.read_progress(self._resumed)
            for key, digest in self.digests.items():
                if self.progress.annotations.get(key) != digest:
                    raise ValueError(
                        f"{self.path} cannot be resumed: the file of {key} has changed since it "
                        f"started, or is read by other settings"
                    )
        elif not resume and (self.path / "recipe.toml").exists():
            raise FileExistsError(
                f"{self.path} already holds a run: continue it with --resume, choose another "
                f"folder with --set output=..., or delete that one"
            )
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            why = "is no folder" if not there.is_dir() else "cannot be written to"
            raise OSError(f"{there} {why}: choose another place with --set output=...")

    @property
    def is_finished(self) -> bool:
        return self.progress.step >= self.recipe.optimizer.steps

    def start(self, engine: Engine) -> None:
        """Write the resolved recipe of a new run, or put the state of a resumed one in place.

        Raises ValueError if the state is of another model.
        """
        if self._resumed is None:
            self.progress = replace(self.progress, annotations=self.digests)
            if distributed.rank() > 0:
                return
            with checkpoint.writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                partial = self.path / "recipe.toml.partial"
                partial.write_text(recipes.to_toml(self.recipe), "utf-8")
                partial.replace(self.path / "recipe.toml")
            return
        engine.load_state(checkpoint.read_tensors(self._resumed, expected=engine.shapes()))

    def save_state(self, engine: Engine, *, step: int, best: float | None, seconds: float) -> None:
        """Save all that the run needs to go on after `step` steps as if it had never stopped."""
        tensors = engine.state()
        progress = replace(self.progress, step=step, best=best, seconds=seconds)
        _by_the_first(lambda: checkpoint.save(self.path / "state", progress, tensors=tensors))

    def _newest_state(self) -> Path | None:
        """What to go on from; None for a run that was stopped before it had saved anything."""
        saved = checkpoint.states(self.path / "state")
        if not saved:
            if (self.path / "best").exists() or (self.path / "last").exists():
                raise FileNotFoundError(
                    f"{self.path} holds a model but no saved state: delete it and start without "
                    f"--resume, or choose another folder with --set output=..."
                )
            return None
        then = dict(_flat(asdict(recipes.read(self.path / "recipe.toml"))))
        now = dict(_flat(asdict(self.recipe)))
        changed = [
            f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
            for key in dict.fromkeys([*then, *now])
            if then.get(key) != now.get(key)
            and key not in _MAY_DIFFER
            and not key.endswith(("annotations", "teacher"))
        ]
        if changed:
            raise ValueError(
                f"{self.path} is a run of another recipe: {'; '.join(changed)}; resume it with its "
                f"own, or choose another folder with --set output=..."
            )
        return saved[-1]

    def save(
        self, name: str, model: FluxCLIP, *, step: int, seconds: float, scores: dict[str, float]
    ) -> None:
        """Write the model folder `name` with its card; scores are those after `step` steps."""
        card = _card(self, model, step=step, seconds=seconds, scores=scores)
        _by_the_first(lambda: self._write_model(self.path / name, model, card))

    def _write_model(self, folder: Path, model: FluxCLIP, card: str) -> None:
        with checkpoint.writing(folder):
            try:
                weights.save(model, folder, card=card, dtype=_DTYPES[self.recipe.save_as])
            except BaseException:
                for partial in folder.glob("*.partial"):  # may be what a full disk lacks
                    partial.unlink()
                raise


def _by_the_first(write: Callable[[], object]) -> None:
    """Write in the first process of a job; what keeps it from that stops all."""

    def work() -> None:
        if distributed.rank() == 0:
            write()

    distributed.gather_results(work)


def _digests(recipe: Recipe) -> dict[str, str]:
    """By key: the fingerprint of what each name of data stands for, the name if that is no file."""
    named = {
        f"data.{i}.annotations": (section.source, section.annotations)
        for i, section in enumerate(recipe.data)
    }
    named["validation.annotations"] = ("annotations", recipe.validation.annotations)
    found = {key: sources.fingerprint_of(kind, name) for key, (kind, name) in named.items()}
    for i, section in enumerate(recipe.data):
        if section.teacher:
            found[f"data.{i}.teacher"] = sources.fingerprint_of_file(Path(section.teacher))
    return found


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of nested settings, keys as --set takes them: optimizer.lr, data.0.batch."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        yield key, value
        return
    for name, inner in items:
        yield from _flat(inner, f"{key}.{name}" if key else str(name))


def _card(
    run: RunFolder, model: FluxCLIP, *, step: int, seconds: float, scores: dict[str, float]
) -> str:
    recipe = run.recipe
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    data = "\n".join(
        f"- {sources.shown(s.annotations)}, {s.batch} pairs a step"
        + (f", teacher {Path(s.teacher).name}" if s.teacher else "")
        for s in recipe.data
    )
    text = model.config.text
    command = _SECRET.sub(r"\1...", run.progress.command)
    start = f"started from `{recipe.init}`" if recipe.init else f"preset `{recipe.model.preset}`"
    numbers = "\n".join(f"- {name}: {value:.2f}" for name, value in scores.items())
    return f"""{weights.CARD_HEADER}# {run.path.name}

A FluxCLIP video-text model, {start}, {trained / 1e6:.2f} M trained
parameters; text tower `{text.source}` ({text.weights}).

- Command: `{command}`
- Seed: {recipe.seed}; step {step} of {recipe.optimizer.steps}, {seconds / 60:.1f} minutes
- Date: {date.today().isoformat()}
- Machine: {_machine()}
- Versions: fluxclip {__version__}, torch {torch.__version__}, Python {platform.python_version()}

Trained on
{data}

Validation ({sources.shown(recipe.validation.annotations)}), all tokens of the default grid
{numbers}
"""


def _machine() -> str:
    threads = f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"
    return f"{torch.cuda.get_device_name()}, {threads}" if torch.cuda.is_available() else threads
