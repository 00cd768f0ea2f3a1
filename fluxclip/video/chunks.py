"""Long videos as folders of short chunks that are quick to seek in, read like the videos.

    NAME.chunks/
        chunks.json     of what video, with which settings, and which frames are in which chunk
        000000.mp4      named by the second that it begins at
        000015.mp4 ...

A chunk holds the frames that come on screen in its seconds; where none does there is no file. Times
are those of the source, exactly. `chunk_writer` makes such folders; one that is there is whole.
Chunks are an idea of AVION (Zhao and Kraehenbuehl 2023, https://arxiv.org/abs/2309.16669).

Importing this loads no decoder.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fluxclip.stages import stage
from fluxclip.video.clip import VideoError, VideoInfo
from fluxclip.video.framing import Framing

if TYPE_CHECKING:
    from fluxclip.video.decoders import Video

FORMAT = 1
SUFFIX = ".chunks"
TABLE = "chunks.json"

_AGAIN = "remove the folder and run `fluxclip chunk` again"

TIME_SLACK_S = 1e-6  # as decoders have it: times computed as i / fps mean frame i


class OtherFormat(VideoError):
    """A folder of chunks that another version of FluxCLIP wrote: no fault of the folder."""


@dataclass(frozen=True)
class Settings:
    """How videos are cut and coded.

    Attributes:
        seconds: a chunk covers so many.
        side: pixels of the shorter side; smaller pictures keep their size, made even.
        gop: every so many frames is one from which decoding can begin.

    Raises ValueError where one of them is below 1 (side: below 16).
    """

    seconds: int = 15
    side: int = 288
    gop: int = 15

    def __post_init__(self) -> None:
        for name, least in (("seconds", 1), ("side", 16), ("gop", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Chunk:
    """One file: its name, the ticks of the source's clock at its first and last frame, its size."""

    file: str
    first_ticks: int
    last_ticks: int
    num_frames: int
    num_bytes: int


@dataclass(frozen=True)
class Contents:
    """What is in a folder of chunks.

    Attributes:
        settings: with which it was written.
        source: of the video it was made from: path, bytes, mtime_ns, sha256.
        info: as `probe` gives it: times of the source, size of the pictures in the chunks.
        tick: the unit of the source's clock in seconds; tick 0 is the first frame.
        chunks: in the order of time, at least one.
    """

    settings: Settings
    source: dict[str, Any]
    info: VideoInfo
    tick: Fraction
    chunks: tuple[Chunk, ...]


def is_folder_of_chunks(path: Path) -> bool:
    """Whether a path is such a folder, by its name; `contents` says whether it is a sound one."""
    return path.suffix == SUFFIX and path.is_dir()


def contents(folder: Path) -> Contents:
    """What is in a folder of chunks, from its table and its list of files; no chunk is opened.

    Raises VideoError, of the file in it that is at fault, if the table is not there or is damaged,
    and for a chunk that is missing; OtherFormat for a table of another format.
    """
    try:
        with stage("read"):
            found = _table(folder, (folder / TABLE).stat().st_mtime_ns)
            there = set(os.listdir(folder))
    except FileNotFoundError as error:
        reason = f"not there, and without it a folder of chunks cannot be read; {_AGAIN}"
        raise VideoError(folder / TABLE, reason) from error
    missing = [chunk.file for chunk in found.chunks if chunk.file not in there]
    if missing:
        more = f", as are {len(missing) - 1} more" if len(missing) > 1 else ""
        raise VideoError(folder / missing[0], f"a chunk that is missing{more}; {_AGAIN}")
    return found


@contextmanager
def open_folder(
    folder: Path, open_video: Callable[[Path], AbstractContextManager["Video"]]
) -> Iterator["ChunkedVideo"]:
    """Open a folder of chunks as one video; each chunk is opened by `open_video` when needed.

    Raises VideoError for one that is not sound: see `contents`.
    """
    yield ChunkedVideo(folder, contents(folder), open_video)


class ChunkedVideo:
    """An open folder of chunks: a `fluxclip.video.decoders.Video`."""

    def __init__(
        self,
        folder: Path,
        table: Contents,
        open_video: Callable[[Path], AbstractContextManager["Video"]],
    ) -> None:
        self.info = table.info
        self._folder, self._open_video = folder, open_video
        self._chunks, self._tick = table.chunks, table.tick
        self._starts_s = np.array(
            [seconds_of(chunk.first_ticks, table.tick) for chunk in self._chunks]
        )

    def read(
        self, times_s: npt.NDArray[np.float64], framing: Framing
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
        """The frames on screen at ascending times: see `fluxclip.video.decoders.Video`.

        Opens those chunks that hold them, each once. `framing` says a part of the picture by
        fractions, and all chunks are of one size: the part is the same in all of them.
        """
        of_chunk = np.searchsorted(self._starts_s, times_s + TIME_SLACK_S, side="right") - 1
        pictures: list[npt.NDArray[np.uint8]] = []
        shown_s: list[float] = []
        for number in np.unique(of_chunk).tolist():
            frames, times = self._read(self._chunks[number], times_s[of_chunk == number], framing)
            pictures.append(frames)
            shown_s += times
        return np.concatenate(pictures), np.array(shown_s)

    def _read(
        self, chunk: Chunk, times_s: npt.NDArray[np.float64], framing: Framing
    ) -> tuple[npt.NDArray[np.uint8], list[float]]:
        """Frames of one chunk, and the source's times at which they came on screen."""
        path = self._folder / chunk.file
        if path.stat().st_size != chunk.num_bytes:
            raise VideoError(
                path,
                f"cut short: it had {chunk.num_bytes} bytes when it was written",
                kind="truncated",
            )
        last_s = seconds_of(chunk.last_ticks - chunk.first_ticks, self._tick)
        # The last frame stays on screen until the next chunk begins, which may be long after.
        inside_s = np.clip(times_s - seconds_of(chunk.first_ticks, self._tick), 0.0, last_s)
        with self._open_video(path) as video:
            frames, shown_s = video.read(inside_s, framing)
        # Through whole ticks, so that times are the source's to the last bit.
        ticks = [chunk.first_ticks + round(time_s / self._tick) for time_s in shown_s.tolist()]
        return frames, [seconds_of(tick, self._tick) for tick in ticks]


def seconds_of(ticks: int, tick: Fraction) -> float:
    """As decoders compute it, so that times are equal and not only close."""
    return ticks * tick.numerator / tick.denominator


# Of ten hours it takes 16 ms, as long as a clip, and 0.6 MB; clips of a video often come together.
@lru_cache(maxsize=32)
def _table(folder: Path, mtime_ns: int) -> Contents:
    """The table of a folder as it was written at that time; raises as `contents` does."""
    damaged = VideoError(folder / TABLE, f"a damaged table of chunks; {_AGAIN}")
    try:
        table = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise damaged from error
    if not isinstance(table, dict) or "format" not in table:
        raise damaged
    if (written := table["format"]) != FORMAT:
        reason = f"its {TABLE} is of format {written!r}, and this version reads {FORMAT}; {_AGAIN}"
        raise OtherFormat(folder, reason)
    try:
        return _contents(folder, table)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise damaged from error


def _contents(folder: Path, table: dict[str, Any]) -> Contents:
    """The table in a form that is checked as far as its types go; raises where it is damaged."""
    tick = Fraction(*table["tick"])
    chunks = tuple(
        Chunk(**{part.name: entry[part.name] for part in fields(Chunk)})
        for entry in table["chunks"]
    )
    starts = [chunk.first_ticks for chunk in chunks]
    if tick <= 0 or starts[:1] != [0] or any(a >= b for a, b in pairwise(starts)):
        raise ValueError("no chunks, or not in order")
    if any(Path(chunk.file).name != chunk.file for chunk in chunks):
        raise ValueError("a chunk outside of its folder")
    info = VideoInfo(
        folder,
        float(table["duration_s"]),
        num_frames=sum(chunk.num_frames for chunk in chunks),
        width=int(table["width"]),
        height=int(table["height"]),
        fps=float(table["fps"]),
        is_image=False,
    )
    return Contents(Settings(**table["settings"]), dict(table["source"]), info, tick, chunks)
