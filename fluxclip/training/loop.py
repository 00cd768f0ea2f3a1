"""Pre-training: a recipe in, a run folder with the best and the last model out."""

from pathlib import Path

import torch
from rich.console import Console

from fluxclip.data import loader
from fluxclip.data.sources import annotations
from fluxclip.model import weights
from fluxclip.training import optimizer
from fluxclip.training.forward import Forward
from fluxclip.training.monitor import Monitor
from fluxclip.training.recipe import Recipe
from fluxclip.training.run_folder import RunFolder
from fluxclip.training.validation import Validation

MOST_UNREADABLE = 0.1  # share of the files; above it a run is another run than was asked for


def train(recipe: Recipe, *, console: Console | None = None, command: str = "") -> Path:
    """Train as the recipe says and return the run folder: recipe.toml, metrics.jsonl, best/, last/.

    command: what the card says the run was started by. What can be wrong with the recipe's files
    is found before the first step. A file that cannot be read is named and another takes its
    place. Raises FileExistsError if the run folder already holds a run, FileNotFoundError or
    ValueError for data that cannot be read, FloatingPointError if the loss stops being a number.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and device.type == "cuda")
    data = dataset(recipe)
    validation = Validation(recipe.validation)
    torch.manual_seed(recipe.seed)
    model = weights.build(recipe.model_config()).to(device).train()
    forward = Forward(
        model, data.sources, objective=recipe.objective, align=recipe.flux.align, seed=recipe.seed
    )
    o = recipe.optimizer
    adamw = optimizer.adamw(model, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)
    run = RunFolder(recipe, command=command)
    unreadable: dict[str, str] = {}
    best = float("-inf")
    with Monitor(run.path, steps=o.steps, console=console) as monitor:
        monitor.say(f"{run.path}: {data.num_pairs} pairs, {recipe.sampling()}")
        for step in loader.steps(data, start=0, stop=o.steps, workers=recipe.workers):
            _note_unreadable(step, unreadable, data, monitor)
            lr = optimizer.learning_rate(
                step.number, steps=o.steps, warmup_steps=o.warmup_steps, lr=o.lr,
                final_lr=o.final_lr,
            )  # fmt: skip
            for group in adamw.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, parts = forward(step)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {step.number}: try a lower optimizer.lr; "
                    f"the best model so far, if any, is in {run.path / 'best'}"
                )
            adamw.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
            adamw.step()
            model.clamp_scale()
            monitor.step(
                step.number, pairs=step.num_pairs, loss=loss.item(), lr=lr,
                gradient_norm=norm.item(), logit_scale=model.logit_scale.item(),
                num_frames=step.draw.num_frames, side=step.draw.side, **parts,
            )  # fmt: skip
            done = step.number + 1
            if done % recipe.validation.every == 0 or done == o.steps:
                scores = validation.score(model)
                monitor.validated(step.number, scores)
                if scores["val_mrr"] > best:
                    best = scores["val_mrr"]
                    run.save("best", model, step=done, seconds=monitor.seconds, scores=scores)
        run.save("last", model, step=o.steps, seconds=monitor.seconds, scores=scores)
    return run.path


def _note_unreadable(
    step: loader.Step, unreadable: dict[str, str], data: loader.Steps, monitor: Monitor
) -> None:
    """Say which files could not be read, each once; ValueError if they are too many."""
    for path in sorted(step.unreadable.keys() - unreadable.keys()):
        unreadable[path] = step.unreadable[path]
        monitor.say(f"unreadable, another takes its place: {unreadable[path]}")
    if len(unreadable) > MOST_UNREADABLE * data.num_pairs:
        raise ValueError(
            f"{len(unreadable)} of {data.num_pairs} files cannot be read, more than "
            f"{MOST_UNREADABLE:.0%}: mend the data or leave them out"
        )


def dataset(recipe: Recipe) -> loader.Steps:
    """The steps of a recipe; its annotation files are read and checked here."""
    sources = [
        loader.Source(
            annotations.read(s.annotations), s.batch, captions=s.captions,
            cache_frames=s.cache_frames, cache_side=s.cache_side,
        )
        for s in recipe.data
    ]  # fmt: skip
    return loader.Steps(sources, recipe.sampling(), recipe.augment, seed=recipe.seed)
