"""What a file turns into: `Clip`; what is known of it: `VideoInfo`; and why not: `VideoError`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

FaultKind = Literal["empty", "not a video", "no frames", "truncated", "damaged", "not readable"]


class VideoError(ValueError):
    """A file that cannot be read as asked; the message is one line with the path and the reason.

    kind: what to count it as.
    """

    def __init__(self, path: str | Path, reason: str, *, kind: FaultKind = "damaged") -> None:
        # Worker processes send errors home pickled: what is made anew from are these two.
        super().__init__(path, reason)
        self.path, self.kind = Path(path), kind

    def __str__(self) -> str:
        path, reason = self.args
        return f"{path}: {' '.join(reason.split())}"


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a file without decoding all of it.

    Attributes:
        path: the file.
        duration_s: seconds from the first frame to the end of the last, above 0; 0 for a still.
        num_frames: as the container states it, None where it does not; 1 for a still.
        width, height: pixels of the upright picture (after rotation), pixel shape ignored.
        fps: frames per second on average, 0 where unknown and for a still.
        is_image: True for a still.
    """

    path: Path
    duration_s: float
    num_frames: int | None
    width: int
    height: int
    fps: float
    is_image: bool


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """Frames with the times they are shown at.

    Attributes:
        frames_THWC: uint8 (T, H, W, 3), RGB, 0-255, T, H and W at least 1.
        times_s: float64 (T,), seconds from the first frame of the video, finite, non-decreasing.

    Raises ValueError when the arrays are not of that form.
    """

    frames_THWC: npt.NDArray[np.uint8]
    times_s: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        frames, times = self.frames_THWC, self.times_s
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
            raise ValueError(f"frames_THWC must be a uint8 array, not {_describe(frames)}")
        if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise ValueError(
                f"frames_THWC must have shape (T, H, W, 3) with T, H, W >= 1, not {frames.shape}"
            )
        if not isinstance(times, np.ndarray) or times.dtype != np.float64:
            raise ValueError(f"times_s must be a float64 array, not {_describe(times)}")
        if times.shape != frames.shape[:1]:
            raise ValueError(
                f"times_s must have shape ({len(frames)},), one time per frame, not {times.shape}"
            )
        if not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise ValueError(f"times_s must be finite and non-decreasing, not {times.tolist()}")

    def __repr__(self) -> str:
        first, last = self.times_s[0], self.times_s[-1]
        return f"Clip(frames_THWC={self.frames_THWC.shape}, times_s={first:.2f}..{last:.2f})"


def _describe(value: object) -> str:
    return f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
