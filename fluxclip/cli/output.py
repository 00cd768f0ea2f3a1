"""What the verbs write: lines, JSON lines, tables and a progress bar."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console


def say(text: str) -> None:
    """What is said on the way; results alone go to standard output."""
    print(text, file=sys.stderr)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on a line of standard output."""
    # a path that is not UTF-8 is escaped: standard output could not carry it
    text = json.dumps(value, ensure_ascii=False, default=str)
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def list_failed(what: str, failed: Mapping[str, str]) -> None:
    """A line for each path that failed, with its reason."""
    for path, reason in failed.items():
        say(f"fluxclip: {what}: {reason if path in reason else f'{path}: {reason}'}")


def console(stream: Literal["stdout", "stderr"]) -> "Console":
    """For tables and what moves. Names of files come out as they are, brackets or not."""
    from rich.console import Console  # a search does without

    return Console(
        stderr=stream == "stderr", markup=False, emoji=False, highlight=False, soft_wrap=True
    )


@contextmanager
def progress_bar(verb: str) -> Iterator[Any]:
    """A bar on a terminal's standard error; yields `advance(done, total)`."""
    from rich import progress

    from fluxclip.distributed import rank

    terminal = console("stderr")
    bar = progress.Progress(
        progress.TextColumn(verb), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=terminal, transient=True, disable=not terminal.is_terminal or rank() > 0,
    )  # fmt: skip
    task = bar.add_task(verb, total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)
