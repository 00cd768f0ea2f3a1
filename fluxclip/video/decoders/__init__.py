"""Decoders: one file per library that turns video files into frames.

A decoder is a module with `open_video(path, content=None)`, a context manager that gives a `Video`.
With `content`, the file is these bytes in memory, and `path` is only what errors call it. It works
at the level of one open file, so that a clip costs one open; arguments are checked in `reader.py`.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from fluxclip.video.clip import VideoInfo
from fluxclip.video.framing import Framing


class Video(Protocol):
    """An open video file."""

    info: VideoInfo

    def read(
        self, times_s: npt.NDArray[np.float64], framing: Framing
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
        """The frames on screen at `times_s` (T,), and the times at which they came on screen.

        Times are seconds from the first frame, ascending, in [0, info.duration_s). The frame on
        screen at t is the last one whose presentation time is <= t (to within a microsecond, so
        that times computed as i / fps mean frame i). Frames are upright uint8 RGB (T, H, W, 3);
        (H, W) is (side, side), or without a side the size of the part that `framing` keeps. Raises
        VideoError when one of them cannot be decoded.
        """
        ...
