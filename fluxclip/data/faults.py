"""Why a file of a data set could not be read: a short kind to count by, and the reason in words."""

from pathlib import Path
from typing import NamedTuple

from fluxclip.video import VideoError

# What makes a file hopeless: to be passed over unopened, since it took a process with it.
HOPELESS = frozenset(["timeout", "crash"])


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
