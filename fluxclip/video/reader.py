"""Files to clips: `probe` says what is in a file, `read_clip` reads frames chosen by time."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from fluxclip import plugins
from fluxclip.stages import stage
from fluxclip.video import chunks
from fluxclip.video.clip import Clip, VideoError, VideoInfo
from fluxclip.video.decoders import Video
from fluxclip.video.framing import Box, Fit, Framing
from fluxclip.video.sampling import evenly_spread

# What a scan of a folder takes for a video or an image. A file that is named may have any name:
# without an image's suffix it is opened as a video.
VIDEO_SUFFIXES = frozenset(
    [".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov"]
    + [".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv"]
)
IMAGE_SUFFIXES = frozenset([".avif", ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"])

FRAMES_AT_ONCE = 64  # small ones, that nobody keeps


P = ParamSpec("P")
R = TypeVar("R")


def _names_its_file(
    read: Callable[Concatenate[str | Path, P], R],
) -> Callable[Concatenate[str | Path, P], R]:
    """Let every error that a reader raises say which file it is about, if only in a note."""

    @wraps(read)
    def reading(path: str | Path, *arguments: P.args, **options: P.kwargs) -> R:
        try:
            return read(path, *arguments, **options)
        except Exception as error:
            if str(path) not in str(error):
                error.add_note(f"while reading {path}")
            raise

    return reading


def is_image(path: str | Path) -> bool:
    """Whether a file is read as a still, by its suffix (`IMAGE_SUFFIXES`)."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def is_there(path: Path) -> bool:
    """Whether a file or folder of chunks exists; VideoError for such a folder that is not sound."""
    if chunks.is_folder_of_chunks(path):
        chunks.contents(path)
        return True
    return path.is_file()


@_names_its_file
def probe(path: str | Path, *, content: bytes | None = None, decoder: str = "pyav") -> VideoInfo:
    """What is known of a video or still without decoding more than its first frame.

    content: the bytes of the file, where they are in memory and `path` is but a name. Raises
    FileNotFoundError for a missing file, VideoError for one that cannot be read.
    """
    path = _existing_file(path, content)
    if is_image(path):
        from fluxclip.video import stills  # imports Pillow

        with stage("read"):
            return stills.probe_still(path, content)
    with _open_video(path, decoder, content) as video:
        info: VideoInfo = video.info
    return info


@_names_its_file
def read_clip(
    path: str | Path,
    *,
    num_frames: int | None = None,
    times_s: Sequence[float] | npt.NDArray[np.float64] | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    side: int | None = None,
    fit: Fit = "crop",
    crop: Box | None = None,
    content: bytes | None = None,
    decoder: str = "pyav",
) -> Clip:
    """Read the frames that are on screen at given times: uint8 RGB, 0-255, upright.

    Times are seconds from the first frame of the video, whatever its container calls them. The
    frame on screen at time t is the last one whose presentation time is <= t, so variable frame
    rates need no special care. There is one frame for every time asked for: of a video with fewer
    frames some are returned more than once, at the times at which they are on screen.
    `Clip.times_s` holds the presentation times of the frames returned, not the times asked for.

    A still is always a clip of one frame at time 0, whatever times or number are asked for.

    Args:
        path: a video, a still by its suffix (`IMAGE_SUFFIXES`), or a folder of chunks (".chunks").
        num_frames: read this many, at the midpoints of equal parts of [start_s, end_s).
        times_s: or read at these times, ascending, each in [0, duration).
        start_s, end_s: what `num_frames` is spread over; the end of the video when `end_s` is None
            or beyond it (annotations often overshoot by a rounding).
        side: scale to side x side pixels, antialiased (bicubic); None keeps the native size.
        fit: with a side, how the picture becomes square: "crop" takes the largest centred square,
            "squash" the whole picture without keeping its aspect.
        crop: (top, left, bottom, right) as fractions of the picture in [0, 1]: this part instead of
            what `fit` says. One box for the whole clip. Its edges are rounded to pixels; in a
            video, the box then moves by up to a pixel to where samples of colour begin.
        content: the bytes of the file, where they are in memory and `path` is but a name.
        decoder: a file of `fluxclip.video.decoders`, or a dotted module name.

    Raises FileNotFoundError for a missing file; VideoError, with one line that names the path, for
    one that cannot be read, is cut short before a wanted time, or does not have the wanted times;
    and ValueError for arguments that no file could meet. Non-square pixels are read as if square.
    """
    if (num_frames is None) == (times_s is None):
        raise ValueError("give either num_frames or times_s")
    if times_s is not None and (start_s != 0.0 or end_s is not None):
        raise ValueError("start_s and end_s go with num_frames; times_s already says when")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")
    wanted_s = None if times_s is None else _checked_times(times_s)
    framing = Framing(side, fit, crop)
    path = _existing_file(path, content)
    if is_image(path):
        from fluxclip.video import stills  # imports Pillow

        with stage("decode"):  # Pillow reads, decodes and cuts as one
            return stills.read_still(path, framing, content)
    with _open_video(path, decoder, content) as video:
        duration_s = video.info.duration_s
        if num_frames is not None:
            start_s, end_s = _checked_interval(path, start_s, end_s, duration_s)
            wanted_s = evenly_spread(start_s, end_s, num_frames)
        assert wanted_s is not None
        outside = wanted_s[wanted_s >= duration_s]
        if len(outside):
            raise VideoError(path, f"no frame at {outside[0]:g} s, it lasts {duration_s:g} s")
        return Clip(*video.read(wanted_s, framing))


@_names_its_file
def probe_and_read(
    path: str | Path,
    *,
    num_frames: int,
    up_to_s: float,
    side: int | None = None,
    fit: Fit = "crop",
    decoder: str = "pyav",
) -> tuple[VideoInfo, Clip | None]:
    """`probe`, and `read_clip` of the whole file unless it is longer, in one opening of it.

    up_to_s: of a video of more seconds no clip is read, but None returned in its place. Raises what
    `read_clip` does.
    """
    framing = Framing(side, fit, None)
    path = _existing_file(path)
    if is_image(path):
        from fluxclip.video import stills  # imports Pillow

        return stills.probe_still(path), stills.read_still(path, framing)
    with _open_video(path, decoder) as video:
        info: VideoInfo = video.info
        if info.duration_s > up_to_s:
            return info, None
        return info, Clip(*video.read(evenly_spread(0.0, info.duration_s, num_frames), framing))


def read_on(
    path: str | Path,
    *,
    step_s: float,
    side: int,
    fit: Fit = "squash",
    decoder: str = "pyav",
) -> Iterator[Clip]:
    """A video from end to end, as clips of up to `FRAMES_AT_ONCE` frames that follow each other.

    The frames on screen in the middle of every `step_s` seconds, as `read_clip` reads them, but
    each only once: all of a video that shows none for less. What was given is not kept: two hours
    take no more memory than two minutes. A still is one frame. Raises what `read_clip` does, on
    the way.
    """
    path = _existing_file(path)
    framing = Framing(side, fit, None)
    if is_image(path):
        yield read_clip(path, num_frames=1, side=side, fit=fit)
        return
    with _open_video(path, decoder) as video:
        duration_s, last_s = video.info.duration_s, -math.inf
        num_steps = math.ceil(max(1.0, duration_s / step_s) - 0.5)
        for at in range(0, num_steps, FRAMES_AT_ONCE):
            middles_s = (np.arange(at, min(at + FRAMES_AT_ONCE, num_steps)) + 0.5) * step_s
            middles_s = np.minimum(middles_s, np.nextafter(duration_s, 0))
            frames_THWC, times_s = video.read(middles_s, framing)
            is_new = np.diff(times_s, prepend=last_s) > 0
            last_s = times_s[-1]
            if is_new.any():
                yield Clip(frames_THWC[is_new], times_s[is_new])


def _checked_times(times_s: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    times = np.asarray(times_s, dtype=np.float64)
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(f"times_s must be a list of at least one time, not {times_s!r}")
    if not np.isfinite(times).all() or times[0] < 0 or (np.diff(times) < 0).any():
        raise ValueError(f"times_s must be ascending and not negative, not {times.tolist()}")
    return times


def _checked_interval(
    path: Path, start_s: float, end_s: float | None, duration_s: float
) -> tuple[float, float]:
    """[start_s, end_s) inside the video."""
    end_s = duration_s if end_s is None else min(end_s, duration_s)
    if not 0 <= start_s < duration_s:
        raise VideoError(path, f"start_s={start_s:g} is outside: it lasts {duration_s:g} s")
    if not start_s < end_s:
        raise VideoError(path, f"end_s={end_s:g} must come after start_s={start_s:g}")
    return start_s, end_s


def _existing_file(path: str | Path, content: bytes | None = None) -> Path:
    path = Path(path)
    if content is not None:
        if not content:
            raise VideoError(path, "an empty file (0 bytes)", kind="empty")
        return path
    if chunks.is_folder_of_chunks(path):
        return path
    if path.is_dir():
        raise VideoError(path, "a folder, not a video or an image", kind="not a video")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        reason = "a pipe, socket or device, not a video or an image"
        raise VideoError(path, reason, kind="not a video")
    if path.stat().st_size == 0:
        raise VideoError(path, "an empty file (0 bytes)", kind="empty")
    return path


def _open_video(
    path: Path, decoder: str, content: bytes | None = None
) -> AbstractContextManager[Video]:
    """A file, bytes or a folder of chunks, opened by a decoder of that name."""
    open_video = plugins.load("fluxclip.video.decoders", decoder).open_video
    if content is None and chunks.is_folder_of_chunks(path):
        return chunks.open_folder(path, open_video)
    video: AbstractContextManager[Video] = open_video(path, content)
    return video
