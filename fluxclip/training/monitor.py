"""What a run shows while it goes: a progress bar, metrics.jsonl and tensorboard."""

import json
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Monitor:
    """Writes each step's numbers to `folder` and to the screen; used as a context manager.

    metrics.jsonl has one JSON object per line with "step", "seconds" since the start, and the
    numbers given; tensorboard files stand beside it.
    """

    def __init__(self, folder: Path, *, steps: int, console: Console | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"))
        self.started = time.monotonic()
        self.console = console or Console()
        self.progress = Progress(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(), TextColumn("left"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._last = 0.0
        self._loss: float | None = None
        self.task = self.progress.add_task("train", total=steps, numbers="")

    def __enter__(self) -> "Monitor":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.progress.stop()
        self.metrics.close()
        self.tensorboard.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def step(self, number: int, *, pairs: int, loss: float, **numbers: float) -> None:
        """Log a training step, 0 being the first, and move the bar."""
        now = self.seconds
        rate = pairs / (now - self._last) if self._last else 0.0
        self._last = now
        self._write(number, {"loss": loss, "clips_per_s": rate, **numbers})
        # a single step's loss is noise to the eye: the bar shows a moving average
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        shown = f"loss {self._loss:.3f}  {rate:.0f} clips/s"
        self.progress.update(self.task, completed=number + 1, numbers=shown)

    def validated(self, number: int, scores: dict[str, float]) -> None:
        """Log the validation after a step; the time it took does not count as a step's."""
        self._write(number, scores)
        self.say(f"step {number + 1}: " + ", ".join(f"{k} {v:.1f}" for k, v in scores.items()))
        self._last = self.seconds

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        row = {"step": step, "seconds": round(self.seconds, 3), **numbers}
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()
        for name, value in numbers.items():
            self.tensorboard.add_scalar(name, value, step)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self.progress.console.print(line, highlight=False, markup=False)
