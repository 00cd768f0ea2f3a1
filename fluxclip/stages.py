"""Where time goes: stages are timed where they happen while somebody measures, else they are free.

    with stages.measured() as seconds:
        with stages.stage("decode"):
            ...
    seconds["decode"]

Wall-clock time. A stage inside another takes its time off the outer one, so the stages of a
measurement add up to the time that went by in them. One measurement is of one course of events:
threads that wait for each other, as autograd's do, share it; threads at work at once mix it up.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, TypeVar

T = TypeVar("T")

Stage = Literal[
    "read", "demux", "decode", "crop", "collate",  # of data
    "wait", "copy", "forward", "backward", "communicate", "step",  # of training
    "gradients",  # their exchange, beside backward
    "other",
]  # fmt: skip

_FREE = nullcontext()


class _Clock:
    """One measurement: seconds by stage, and what can be added to them only when it is over."""

    def __init__(self, synchronise: Callable[[], None] | None) -> None:
        self.synchronise = synchronise
        self.seconds: dict[Stage, float] = {}
        self.later: list[tuple[Stage, Callable[[], float]]] = []
        self._entered: Stage = "other"
        self._open: list[Stage] = []
        self._since = 0.0

    def entering(self, name: Stage) -> "_Clock":
        """Itself, as the context of a stage: a packet of a video is too small for costlier ones."""
        self._entered = name
        return self

    def __enter__(self) -> None:
        self._turn()
        self._open.append(self._entered)

    def __exit__(self, *error: object) -> None:
        self._turn()
        self._open.pop()

    def _turn(self) -> None:
        if self.synchronise:
            self.synchronise()
        now = time.perf_counter()
        if self._open:
            self.add(self._open[-1], now - self._since)
        self._since = now

    def add(self, name: Stage, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


_clock: _Clock | None = None


@contextmanager
def measured(
    synchronise: Callable[[], None] | None = None,
) -> Iterator[dict[Stage, float]]:
    """Measure what happens inside; gives seconds by stage, complete at the end.

    synchronise: called where a stage begins or ends, to wait for a device that runs behind.
    Measurements do not mix: inside another, that one goes on in the stage it was in.
    """
    global _clock
    outer, _clock = _clock, _Clock(synchronise)
    own = _clock
    try:
        yield own.seconds
    finally:
        _clock = outer
        for name, seconds in own.later:
            own.add(name, seconds())


def is_measured() -> bool:
    """Whether somebody measures now, in this process."""
    return _clock is not None


def stage(name: Stage) -> AbstractContextManager[None]:
    """What happens inside is a stage of this name."""
    return _FREE if _clock is None else _clock.entering(name)


def each(name: Stage, items: Iterable[T]) -> Iterator[T]:
    """The items; getting each of them is a stage of this name, using it is not."""
    came = iter(items)
    while True:
        with stage(name):
            try:
                item = next(came)
            except StopIteration:
                return
        yield item


def beside(name: Stage, seconds: Callable[[], float]) -> None:
    """Count what went on at the same time as a stage; `seconds` is called when all is over."""
    if _clock is not None:
        _clock.later.append((name, seconds))
