"""Why a file of a data set could not be read: a short kind to count by, and the reason in words."""

import errno
import os
from pathlib import Path
from typing import NamedTuple

from fluxclip.video import VideoError

# What makes a file hopeless: to be passed over unopened, since it took a process with it.
HOPELESS = frozenset(["timeout", "crash"])

# What a machine lacks is no fault of the file at which it showed; and the way out.
_LACKS = {
    errno.EMFILE: "raise the limit (ulimit -n), or lower workers",
    errno.ENFILE: "close other programs, or lower workers",
    errno.ENOMEM: "lower workers",
    errno.ENOSPC: "make room",
}


class Fault(NamedTuple):
    """kind: one of `video.clip.FaultKind`, or "missing", "timeout", "crash", "error"."""

    kind: str
    reason: str


def fault_of(path: Path, error: Exception) -> Fault:
    """What an error says of a file, in one line without its path."""
    reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
    if isinstance(error, VideoError):
        return Fault(error.kind, reason)
    if isinstance(error, FileNotFoundError):
        return Fault("missing", reason)
    if isinstance(error, OSError):
        return Fault("not readable", error.strerror or reason)
    return Fault("error", f"{type(error).__name__}: {reason}")


def lack_of(path: Path, error: Exception) -> OSError | None:
    """What to raise if a file could not be read for want of memory, open files or space here.

    None if the file is to blame.
    """
    number = _said(error) or _no_more_files()
    if number is None:
        return None
    return OSError(f"{os.strerror(number)}, while reading {path}: {_LACKS[number]}")


def _said(error: Exception) -> int | None:
    """The number of what lacks, as an error or what it was raised from says."""
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        # Decoders also want memory for what a damaged file claims to hold, and refuse that file.
        if isinstance(cause, MemoryError):
            number = errno.ENOMEM if cause is error else None
        if number in _LACKS:
            return number
        cause = cause.__cause__
    return None


def _no_more_files() -> int | None:
    """The number of the error if this process can open no file at all: not all readers say so."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno if error.errno in _LACKS else None
    return None
