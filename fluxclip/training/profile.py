"""Where the time of a training step goes: `fluxclip train --profile`."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch

from fluxclip import distributed, stages
from fluxclip.data import loader, workers
from fluxclip.data.batch import Step
from fluxclip.stages import Stage
from fluxclip.tokens.budget import Draw
from fluxclip.training import engines, optimizer
from fluxclip.training import recipe as recipes
from fluxclip.training.forward import Forward
from fluxclip.training.loop import build, dataset, refuse_different
from fluxclip.training.recipe import Recipe

WARM_UP = 3  # steps, and what may lie ready: two for each worker
MEASURED = 20  # steps, or more to whole rounds of the workers

OF_DATA: tuple[Stage, ...] = ("read", "demux", "decode", "crop", "collate", "other")
OF_TRAINING: tuple[Stage, ...] = (
    "wait", "copy", "forward", "backward", "communicate", "step", "other",
)  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Seconds per step and process, means over `num_steps` steps and all processes.

    training_s: by stage of a step with data; they add up to the step. data_s: by stage of making a
    step, in the workers, or without any inside "wait". gradients_s: of the exchange of gradients
    beside "backward", 0 where it is inside. no_data_s: of a step when the same steps come again
    from memory. alone_s: of getting a step when nothing else is done. warm_up: steps before each of
    these. num_pairs: of a step and process; num_workers: of one process. device: cpu or cuda.
    caches: whether some clips are kept in memory.
    """

    training_s: dict[Stage, float]
    data_s: dict[Stage, float]
    gradients_s: float
    no_data_s: float
    alone_s: float
    num_steps: int
    warm_up: int
    num_pairs: int
    num_workers: int
    world_size: int
    device: str
    caches: bool

    @property
    def step_s(self) -> float:
        """A step with data."""
        return sum(self.training_s.values())

    @property
    def waiting(self) -> float:
        """Share (0-1) of a step that goes by waiting for data."""
        return self.training_s["wait"] / self.step_s

    def clips_per_s(self, of_step_s: float) -> float:
        """Pairs of all processes in a second if a step takes so long."""
        return self.num_pairs * self.world_size / of_step_s

    def lines(self) -> list[str]:
        """The table and what follows from it, to be printed."""
        workers = max(1, self.num_workers)
        where = (
            f"beside it, workers: {self.num_workers}; share of the time that they have"
            if self.num_workers
            else "inside wait, as there are no workers; share of a step"
        )
        clips, without = self.clips_per_s(self.step_s), self.clips_per_s(self.no_data_s)
        alone = self.clips_per_s(self.alone_s)
        return [
            f"{self.num_steps} steps after {self.warm_up}, {self.num_pairs} pairs a process, "
            f"processes: {self.world_size}, {self.device}; wall-clock time, mean of the processes",
            "",
            f"{'':<14}{'ms a step':>12}{'ms a clip':>12}{'share':>9}",
            *self._rows("training", self.training_s, of_s=self.step_s),
            where,
            *self._rows("data", self.data_s, of_s=workers * self.step_s),
            *self._gradients(),
            "",
            f"with data     {clips:9.1f} clips/s; {self.waiting:.1%} of a step is waiting for data",
            f"without data  {without:9.1f} clips/s; a step with data takes "
            f"{self.step_s / self.no_data_s:.2f} times as long (good: at most 1.05)",
            f"loader alone  {alone:9.1f} clips/s; {self.step_s / self.alone_s:.2f} times what "
            f"training takes (good: at least 1.2)",
            *self._about_caches(),
        ]

    def _rows(self, name: str, seconds: dict[Stage, float], *, of_s: float) -> Iterator[str]:
        for stage, value in [*seconds.items(), (name, sum(seconds.values()))]:
            yield self._row(stage, value, of_s=of_s)

    def _row(self, name: str, seconds: float, *, of_s: float) -> str:
        ms = 1000 * seconds
        return f"  {name:<12}{ms:>12.2f}{ms / self.num_pairs:>12.3f}{seconds / of_s:>9.1%}"

    def _gradients(self) -> list[str]:
        if not self.gradients_s:
            return []
        row = self._row("gradients", self.gradients_s, of_s=self.step_s)
        return ["beside backward, which waits for what is left of it; share of a step", row]

    def _about_caches(self) -> list[str]:
        if not self.caches:
            return []
        return ["cache_frames: clips are read when they are first used, in later epochs no more"]


def profile(recipe: Recipe) -> Profile:
    """Measure the steps of a recipe, with data and without, and its data alone; writes nothing.

    The model is trained on the way and thrown away. The GPU is waited for where a stage ends. All
    processes of a job call it and get the same. Raises what `train` does before its first step.
    """
    with distributed.together(tensors="device"):
        checked: list[loader.Steps] = []

        def check() -> str:
            checked.append(dataset(recipe))
            return recipes.to_toml(recipe)

        refuse_different(distributed.gather_results(check))
        data = checked[0]
        data.timed = True
        with stages.measured():  # lets the engine know that its exchanges are to be timed
            forward, engine = build(recipe, data)
        return _measure(recipe, data, forward, engine)


def _measure(
    recipe: Recipe, data: loader.Steps, forward: Forward, engine: engines.Engine
) -> Profile:
    rounds = max(1, recipe.workers)
    warm_up, count = WARM_UP + 2 * recipe.workers, -(-MEASURED // rounds) * rounds
    o = recipe.optimizer

    def train(step: Step) -> None:
        lr = optimizer.learning_rate(
            step.number, steps=o.steps, warmup_steps=o.warmup_steps, lr=o.lr, final_lr=o.final_lr
        )  # fmt: skip
        loss, parts = engine.backward(step)
        distributed.mean({"loss": loss, **parts})
        with stages.stage("step"):
            engine.step_down(lr=lr)

    made_s: dict[Stage, float] = dict.fromkeys(OF_DATA, 0.0)
    drawn: list[Draw] = []
    # one of each draw stands for all of it, as the steps of a whole run would not fit into memory
    kept: dict[Draw, Step] = {}

    def train_and_note(step: Step) -> None:
        train(step)
        for name, seconds in step.seconds.items():
            made_s[name] += seconds
        drawn.append(step.draw)
        kept.setdefault(step.draw, step)

    made = workers.steps(
        data, start=0, stop=2 * (warm_up + count), workers=recipe.workers,
        timeout_s=recipe.decode_timeout_s,
    )  # fmt: skip
    with closing(made) as steps:
        _drop(islice(steps, warm_up))
        alone = _timed(islice(steps, count), lambda step: None, device=forward.device)
        for step in islice(steps, warm_up):
            train(step)
        with_data = _timed(islice(steps, count), train_and_note, device=forward.device)
    without = _timed((kept[draw] for draw in drawn), train, device=forward.device)
    gradients_s = with_data.pop("gradients", 0.0)
    without.pop("gradients", None)
    training = {name: with_data.get(name, 0.0) for name in OF_TRAINING}
    numbers = {
        **{f"training/{name}": seconds for name, seconds in training.items()},
        **{f"data/{name}": seconds for name, seconds in made_s.items()},
        "gradients": gradients_s, "without": sum(without.values()), "alone": sum(alone.values()),
    }  # fmt: skip
    mean = {name: seconds / count for name, seconds in distributed.mean(numbers).items()}
    return Profile(
        training_s={name: mean[f"training/{name}"] for name in OF_TRAINING},
        data_s={name: mean[f"data/{name}"] for name in OF_DATA},
        gradients_s=mean["gradients"], no_data_s=mean["without"], alone_s=mean["alone"],
        num_steps=count, warm_up=warm_up, num_pairs=next(iter(kept.values())).num_pairs,
        num_workers=recipe.workers, world_size=distributed.world_size(),
        device=forward.device.type, caches=any(source.cache_frames for source in recipe.data),
    )  # fmt: skip


def _timed(
    steps: Iterable[Step], use: Callable[[Step], None], *, device: torch.device
) -> dict[Stage, float]:
    """Seconds by stage of getting and using steps; all processes begin at once."""
    distributed.gather(None)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else None
    with stages.measured(synchronise) as seconds, stages.stage("other"):
        for step in stages.each("wait", steps):
            use(step)
    return seconds


def _drop(steps: Iterable[Step]) -> None:
    for _ in steps:
        pass
