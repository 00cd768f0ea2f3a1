"""Ctrl-C and SIGTERM while a run goes: it finishes the step and saves its state before it ends."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn


@contextmanager
def nothing_saved_yet() -> Iterator[None]:
    """Let SIGTERM end the process with 1 until there is a step to save: 143 says that one was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignals:
    """A context manager that notes the two signals, for the loop to act on after its step.

    received: the number of the last signal, or None. A second Ctrl-C raises KeyboardInterrupt at
    once. Elsewhere than in the main thread, where Python hands out signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def leave(self, received: int | None = None) -> NoReturn:
        """End as a signal asks: KeyboardInterrupt, or SystemExit(143), 128 + SIGTERM.

        received: by default the one that came; another process of the job may have had it.
        """
        if (received or self.received) == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        if os.environ.get("RANK", "0") != "0":
            return
        # not through a console or sys.stderr: a handler may run in the middle of their writing
        with suppress(OSError):
            os.write(2, b"\nstopping after this step; Ctrl-C stops at once\n")
