"""Pre-training: a recipe in, a run folder with the best and the last model out."""

from pathlib import Path

import torch
from rich.console import Console

from fluxclip.data import loader
from fluxclip.data.sources import annotations
from fluxclip.data.teacher import TeacherFeatures
from fluxclip.training import optimizer
from fluxclip.training.forward import Forward
from fluxclip.training.monitor import Monitor
from fluxclip.training.recipe import Recipe
from fluxclip.training.run_folder import RunFolder
from fluxclip.training.signals import StopSignals
from fluxclip.training.validation import Validation

MOST_UNREADABLE = 0.1  # share of the files; above it a run is another run than was asked for


def train(
    recipe: Recipe, *, resume: bool = False, console: Console | None = None, command: str = ""
) -> Path:
    """Train as the recipe says and return the run folder: recipe.toml, metrics.jsonl, best/, last/.

    resume: go on from the newest state in the run folder; on a CPU, with as many threads, the
    weights become bit for bit those of a run that was never stopped. Ctrl-C and SIGTERM finish the
    step and save a state, then leave by KeyboardInterrupt and SystemExit(143).
    command: what the card says the run was started by. What can be wrong with the recipe's files
    is found before the first step. A file that cannot be read is named and another takes its
    place. Raises FileExistsError if the run folder already holds a run, FileNotFoundError or
    ValueError for data that cannot be read or a run that cannot be resumed, OSError for a disk
    that is full, FloatingPointError if the loss stops being a number.
    """
    run = RunFolder(recipe, command=command, resume=resume)
    if run.is_finished:
        (console or Console()).print(f"{run.path} is finished", highlight=False, markup=False)
        return run.path
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and device.type == "cuda")
    data = dataset(recipe)
    validation = Validation(recipe.validation)
    torch.manual_seed(recipe.seed)
    model = recipe.build().to(device)
    forward = Forward(model, data.sources, recipe)
    o = recipe.optimizer
    adamw = optimizer.build(
        forward.modules, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, muon=o.muon
    )
    run.start(forward.modules, adamw)
    start, best, unreadable = run.progress.step, run.progress.best, dict(run.progress.unreadable)
    with (
        Monitor(
            run.path, steps=o.steps, start=start, seconds=run.progress.seconds, console=console
        ) as monitor,
        StopSignals() as stop,
    ):
        monitor.say(f"{run.path}: {data.num_pairs} pairs\n{recipe.sampling()}")
        if resume:
            monitor.say(f"resumed after step {start} of {o.steps}")
        saved_s = monitor.seconds
        for step in loader.steps(data, start=start, stop=o.steps, workers=recipe.workers):
            if step.number == start:
                # only now: starting the loader draws from torch's global generator
                run.set_random_state()
            _note_unreadable(step, unreadable, data, monitor)
            lr = optimizer.learning_rate(
                step.number, steps=o.steps, warmup_steps=o.warmup_steps, lr=o.lr,
                final_lr=o.final_lr,
            )  # fmt: skip
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, parts = forward(step)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {step.number}: try a lower optimizer.lr; "
                    f"the best model so far, if any, is in {run.path / 'best'}"
                )
            norm = optimizer.step_down(adamw, forward.modules, loss, lr=lr, clip_norm=o.clip_norm)
            model.clamp_scale()
            monitor.step(
                step.number, pairs=step.num_pairs, loss=loss.item(), lr=lr,
                gradient_norm=norm, logit_scale=model.logit_scale.item(),
                num_frames=step.draw.num_frames, side=step.draw.side, **parts,
            )  # fmt: skip
            done = step.number + 1
            validated = done % recipe.validation.every == 0 or done == o.steps
            if validated:
                scores = validation.score(model)
                monitor.validated(step.number, scores)
                if best is None or scores["val_mrr"] > best:
                    best = scores["val_mrr"]
                    run.save("best", model, step=done, seconds=monitor.seconds, scores=scores)
            if done == o.steps:
                run.save("last", model, step=done, seconds=monitor.seconds, scores=scores)
            # after best/ and last/: a kill between them and the state makes them again
            if validated or stop.received or monitor.seconds - saved_s >= 60 * recipe.save_minutes:
                monitor.flush()
                run.save_state(
                    forward.modules, adamw, step=done, best=best, seconds=monitor.seconds,
                    unreadable=unreadable,
                )  # fmt: skip
                saved_s = monitor.seconds
            if stop.received:
                monitor.say(f"stopped after step {done} of {o.steps}; --resume goes on from there")
                stop.leave()
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
            records, s.batch, captions=s.captions,
            cache_frames=s.cache_frames, cache_side=s.cache_side,
            teacher=TeacherFeatures(s.teacher, records) if s.teacher else None,
        )
        for s in recipe.data
        for records in (annotations.read(s.annotations),)
    ]  # fmt: skip
    return loader.Steps(sources, recipe.sampling(), recipe.augment, seed=recipe.seed)
