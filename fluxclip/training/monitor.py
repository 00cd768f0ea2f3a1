"""What a run shows while it goes: a progress bar, metrics.jsonl, tensorboard, wandb if asked."""

import json
import math
import resource
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fluxclip.training.checkpoint import writing
from fluxclip.training.wandb_log import WandbLog

S = TypeVar("S")


class Monitor:
    """Writes each step's numbers to `folder` and to the screen; used as a context manager.

    metrics.jsonl has one JSON object per line with "step", "seconds" of training, and the numbers
    given; tensorboard files stand beside it. A run that goes on after `start` steps and `seconds`
    of training loses what an earlier part of it logged beyond them. silent: write and show nothing,
    as all processes of a job but one do. peak_flops: operations per second that the GPUs of all
    processes reach; None on CPUs. wandb: a project that gets the numbers too, and `settings`.
    """

    def __init__(
        self, folder: Path, *, steps: int, start: int = 0, seconds: float = 0.0,
        console: Console | None = None, silent: bool = False, peak_flops: float | None = None,
        wandb: str = "", settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.silent, self.peak_flops = silent, peak_flops
        self.wandb = WandbLog(wandb, folder=folder, settings=settings or {}) if wandb else None
        self.path, self.start = folder / "metrics.jsonl", start
        self.started = time.monotonic() - seconds
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(), TextColumn("left"),
            console=self.console, disable=silent or not self.console.is_terminal,
        )  # fmt: skip
        self._last = self._waited = 0.0
        self._loss: float | None = None
        self.task = self.progress.add_task("train", total=steps, completed=start, numbers="")

    def __enter__(self) -> "Monitor":
        if self.silent:
            return self
        from torch.utils.tensorboard import SummaryWriter

        with ExitStack() as closing, writing(self.path):
            closing.enter_context(_no_traceback_of_threads())
            cut_back(self.path, self.start)
            self.metrics = self.path.open("a", encoding="utf-8")
            closing.callback(self.metrics.close)
            self.tensorboard = SummaryWriter(
                str(self.path.parent / "tensorboard"), purge_step=self.start
            )
            closing.callback(self.tensorboard.close)
            closing.enter_context(self.progress)
            if self.wandb:
                self.wandb.start(say=self.say)
                closing.push(self.wandb.end)
            self._closing = closing.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        # lines are flushed as they are written: on a full disk closing fails as the last one did
        with suppress(OSError):
            if not self.silent:
                self._closing.__exit__(kind, error, trace)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def waiting(self, steps: Iterable[S]) -> Iterator[S]:
        """The steps, the time measured that each takes to come."""
        came = iter(steps)
        while True:
            before = time.monotonic()
            try:
                step = next(came)
            except StopIteration:
                return
            self._waited = time.monotonic() - before
            yield step

    def step(
        self, number: int, *, pairs: int, tokens: float, flops: float, loss: float,
        **numbers: float,
    ) -> None:  # fmt: skip
        """Log a training step, 0 being the first, and move the bar.

        pairs, tokens, flops: of all processes. Of its time since the last one: clips and tokens per
        second, the share that went by waiting for data and, on GPUs, `mfu`, the share (0-1) of
        their peak that the step's work makes.
        """
        now = self.seconds
        took = now - self._last if self._last else math.inf
        rate = pairs / took
        self._last = now
        speed = {
            "clips_per_s": rate, "tokens_per_s": tokens / took, "data_share": self._waited / took,
            "memory_gib": _peak_gib(),
        }  # fmt: skip
        if self.peak_flops:
            speed["mfu"] = flops / took / self.peak_flops
        self._write(number, {"loss": loss, **speed, **numbers})
        # a single step's loss is noise to the eye: the bar shows a moving average
        if math.isfinite(loss):
            self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        shown = f"loss {math.nan if self._loss is None else self._loss:.3f}  {rate:.0f} clips/s"
        self.progress.update(self.task, completed=number + 1, numbers=shown)

    def validated(self, number: int, scores: dict[str, float]) -> None:
        """Log the validation after a step; the time it took does not count as a step's."""
        self._write(number, scores)
        self.say(f"step {number + 1}: " + ", ".join(f"{k} {v:.1f}" for k, v in scores.items()))
        self._last = self.seconds

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        if self.silent:
            return
        # JSON has no NaN
        known = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        row = {"step": step, "seconds": round(self.seconds, 3), **known}
        with writing(self.path):
            self.metrics.write(json.dumps(row) + "\n")
            self.metrics.flush()
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(step, numbers)

    def flush(self) -> None:
        """Write what tensorboard holds back: a state must not know of more than the logs."""
        if self.silent:
            return
        with writing(self.path):
            self.tensorboard.flush()

    def say(self, line: str) -> None:
        """A line above the bar."""
        if not self.silent:
            self.progress.console.print(line, highlight=False, markup=False)


def _peak_gib() -> float:
    """Most memory that tensors took on the GPU or, without one, that this process had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)


@contextmanager
def _no_traceback_of_threads() -> Iterator[None]:
    """Leave an OSError of tensorboard's thread to its next call in ours, which raises it again."""
    hook = threading.excepthook

    def failed(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError):
            hook(failure)

    threading.excepthook = failed
    try:
        yield
    finally:
        threading.excepthook = hook


def cut_back(path: Path, num_steps: int) -> list[dict[str, Any]]:
    """Keep those lines of a file of JSON objects that are of the first `num_steps` steps.

    Gives them; none if there is no file. A kill may have left the last line torn: it goes.
    """
    if not path.exists():
        return []
    kept, rows = [], []
    for line in path.read_text("utf-8", "replace").splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if row["step"] < num_steps:
                kept.append(line + "\n")
                rows.append(row)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), "utf-8")
    partial.replace(path)
    return rows
