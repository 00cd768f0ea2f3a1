"""Pre-training: a recipe in, a run folder with the best and the last model out."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from fluxclip import distributed, plugins
from fluxclip.data import loader, sources, workers
from fluxclip.data.teacher import TeacherFeatures
from fluxclip.training import engines, optimizer, wandb_log
from fluxclip.training import recipe as recipes
from fluxclip.training.flops import matrix_peak
from fluxclip.training.forward import Forward
from fluxclip.training.monitor import Monitor
from fluxclip.training.recipe import Recipe, SourceRecipe
from fluxclip.training.run_folder import RunFolder
from fluxclip.training.signals import StopSignals
from fluxclip.training.unreadable import UnreadableFiles
from fluxclip.training.validation import Validation

MOST_SKIPPED = 10  # steps in a row whose loss or gradient is no number


def train(
    recipe: Recipe, *, resume: bool = False, console: Console | None = None, command: str = ""
) -> Path:
    """Train as the recipe says and return the run folder: recipe.toml, metrics.jsonl, best/, last/.

    resume: go on from the newest state in the run folder; on a CPU, with as many threads, the
    weights become bit for bit those of a run that was never stopped. Ctrl-C and SIGTERM finish the
    step and save a state, then leave by KeyboardInterrupt and SystemExit(143).
    command: what the card says the run was started by. What can be wrong with the recipe's files
    is found before the first step. A file that cannot be read is listed in unreadable.jsonl and
    another takes its place, up to a share of them. Raises FileExistsError if the run folder already
    holds a run, FileNotFoundError or ValueError for data that cannot be read or a run that cannot
    be resumed, OSError for a disk that is full or a worker that has ended, FloatingPointError if
    the loss stops being a number.
    """
    with distributed.together(tensors="device"):
        run, data, validation = _checked(recipe, command=command, resume=resume)
        if run.is_finished:
            if distributed.rank() == 0:
                console = console or Console()
                console.print(f"{run.path} is finished", highlight=False, markup=False)
            return run.path
        _run(recipe, run, data, validation, console)
    return run.path


def _checked(
    recipe: Recipe, *, command: str, resume: bool
) -> tuple[RunFolder, loader.Steps, Validation]:
    """The run's folder and data in every process; what is wrong in one of them stops all."""
    made: list[tuple[RunFolder, loader.Steps, Validation]] = []

    def make() -> str:
        if recipe.wandb:
            wandb_log.refuse_without()
        run = RunFolder(recipe, command=command, resume=resume)
        made.append((run, dataset(recipe), Validation(recipe.validation)))
        files = [f"the file of {key}: {digest}" for key, digest in run.digests.items()]
        step = f"resumes after step {run.progress.step}"
        return "\n".join([recipes.to_toml(recipe), f"resume = {resume}", step, *files])

    refuse_different(distributed.gather_results(make))
    return made[0]


def refuse_different(of_all: Sequence[str]) -> None:
    """Stop all processes if the lines that each gave, of its recipe and files, are not the same."""
    for rank, other in enumerate(of_all):
        pairs = zip(of_all[0].splitlines(), other.splitlines(), strict=False)
        if differ := [f"{one!r} and {two!r}" for one, two in pairs if one != two]:
            distributed.stop_all(
                ValueError(
                    f"the processes 0 and {rank} of this job have different recipes or files: "
                    f"{differ[0]}"
                )
            )


def build(recipe: Recipe, data: loader.Steps) -> tuple[Forward, engines.Engine]:
    """What trains, in every process, before its first step; what is wrong in one stops all."""
    device = torch.device(distributed.device() or ("cuda" if torch.cuda.is_available() else "cpu"))
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and device.type == "cuda")
    made: list[tuple[Forward, engines.Engine]] = []

    def forward() -> None:
        plugins.load("fluxclip.training.engines", recipe.engine)
        torch.manual_seed(recipe.seed)
        towers.append(Forward(recipe.build().to(device), data.sources, recipe, bf16=bf16))

    def engine() -> None:
        made.append((towers[0], engines.make(recipe.engine, towers[0], recipe)))

    # one after the other: making an engine, processes wait for each other
    towers: list[Forward] = []
    distributed.gather_results(forward)
    distributed.gather_results(engine)
    return made[0]


def _run(
    recipe: Recipe, run: RunFolder, data: loader.Steps, validation: Validation,
    console: Console | None,
) -> None:  # fmt: skip
    forward, engine = build(recipe, data)
    distributed.gather_results(lambda: run.start(engine))
    o, model = recipe.optimizer, forward.model
    start, best = run.progress.step, run.progress.best
    unreadable = UnreadableFiles(run.path, data, start=start, most=recipe.max_unreadable)
    skipped = 0  # steps in a row
    with (
        Monitor(
            run.path, steps=o.steps, start=start, seconds=run.progress.seconds, console=console,
            silent=distributed.rank() > 0, peak_flops=_peak(forward.device, bf16=forward.bf16),
            wandb=recipe.wandb, settings=_shown(recipe),
        ) as monitor,
        StopSignals() as stop,
        # an error may be kept, and would keep the workers
        closing(workers.steps(
            data, start=start, stop=o.steps, workers=recipe.workers,
            timeout_s=recipe.decode_timeout_s,
        )) as steps,
    ):  # fmt: skip
        monitor.say(f"{run.path}: {data.num_pairs} pairs\n{recipe.sampling()}")
        if start:
            monitor.say(f"resumed after step {start} of {o.steps}")
        saved_s = monitor.seconds
        for step in monitor.waiting(steps):
            lr = optimizer.learning_rate(
                step.number, steps=o.steps, warmup_steps=o.warmup_steps, lr=o.lr,
                final_lr=o.final_lr,
            )  # fmt: skip
            loss, parts = engine.backward(step)
            # of all processes, so that all of them skip, stop and save at the same step
            numbers = distributed.mean(
                {"loss": loss, **parts, "stop": float(stop.received is not None),
                 "save": float(monitor.seconds - saved_s >= 60 * recipe.save_minutes),
                 "unreadable": float(unreadable.num_new(step))}
            )  # fmt: skip
            stopped, due = numbers.pop("stop") > 0, numbers.pop("save") > 0
            if numbers.pop("unreadable"):
                unreadable.note(step, say=monitor.say)
            norm = engine.step_down(lr=lr) if math.isfinite(numbers["loss"]) else math.nan
            skipped = 0 if math.isfinite(norm) else skipped + 1
            world_size = distributed.world_size()
            monitor.step(
                step.number, pairs=step.num_pairs * world_size,
                tokens=numbers.pop("tokens") * world_size,
                flops=numbers.pop("flops") * world_size, lr=lr,
                gradient_norm=norm, logit_scale=model.logit_scale.item(), skipped=skipped,
                unreadable=len(unreadable), num_frames=step.draw.num_frames,
                side=step.draw.side, **numbers,
            )  # fmt: skip
            if skipped == MOST_SKIPPED:
                distributed.stop_all(
                    FloatingPointError(
                        f"the loss or its gradient is no number in {skipped} steps in a row, the "
                        f"last {step.number}: try a lower optimizer.lr; the best model so far, if "
                        f"any, is in {run.path / 'best'}"
                    )
                )
            done = step.number + 1
            validated = done % recipe.validation.every == 0 or done == o.steps
            if validated:
                scores = validation.score(model)
                monitor.validated(step.number, scores)
                # it takes long: who stops the run meanwhile waits for no other step
                stopped |= distributed.mean({"stop": stop.received is not None})["stop"] > 0
                if best is None or scores["val_mrr"] > best:
                    best = scores["val_mrr"]
                    run.save("best", model, step=done, seconds=monitor.seconds, scores=scores)
            if done == o.steps:
                run.save("last", model, step=done, seconds=monitor.seconds, scores=scores)
            # after best/ and last/: a kill between them and the state makes them again
            if validated or stopped or due:
                monitor.flush()
                run.save_state(engine, step=done, best=best, seconds=monitor.seconds)
                saved_s = monitor.seconds
            if stopped:
                monitor.say(f"stopped after step {done} of {o.steps}; --resume goes on from there")
                stop.leave(max(filter(None, distributed.gather(stop.received)), default=None))
        if unreadable:
            monitor.say(f"{len(unreadable)} unreadable: {unreadable}; {unreadable.path} lists them")


def _shown(recipe: Recipe) -> dict[str, object]:
    """The recipe as others may see it: without what follows the "?" of addresses, such as keys."""
    values = asdict(recipe)
    for section in (*values["data"], values["validation"]):
        section["annotations"] = sources.shown(section["annotations"])
    return values


def _peak(device: torch.device, *, bf16: bool) -> float | None:
    """What the GPUs of all processes reach together, measured now (a second); None on CPUs."""
    if device.type != "cuda":
        return None
    own = matrix_peak(device, bf16=bf16)
    return distributed.mean({"peak": own})["peak"] * distributed.world_size()


def dataset(recipe: Recipe) -> loader.Steps:
    """The steps of a recipe; its annotation files are read and checked here.

    Of the videos of each, as large a share may be missing as the recipe lets be unreadable.
    """
    made = [
        loader.Source(
            records, s.batch, captions=s.captions,
            cache_frames=s.cache_frames, cache_side=s.cache_side,
            teacher=TeacherFeatures(s.teacher, records) if s.teacher else None, decoder=s.decoder,
        )
        for s in recipe.data
        for records in (_records(s, most_missing=recipe.max_unreadable),)
    ]  # fmt: skip
    return loader.Steps(
        made, recipe.sampling(), recipe.augment, seed=recipe.seed,
        rank=distributed.rank(), world_size=distributed.world_size(),
        mix=recipe.distillation_mix, mix_steps=recipe.distillation_steps,
    )  # fmt: skip


def _records(section: SourceRecipe, *, most_missing: float) -> sources.Records:
    try:
        return sources.read(section.source, section.annotations)
    except sources.MissingFiles as error:
        if error.share > most_missing:
            raise
        return sources.read(section.source, section.annotations, check_files=False)
