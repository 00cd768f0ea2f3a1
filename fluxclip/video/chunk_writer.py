"""Videos to folders of chunks (`chunks`): in parallel, whole or not at all, and resumed.

While NAME.chunks is being made, beside it stands

    .NAME.chunks.part/
        chunks.json     the settings, the video and how chunks are coded
        000015.json     of each whole chunk: what the table will say of it
        chunks/         the chunks; becomes NAME.chunks in the end
"""

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fluxclip.video import encoder
from fluxclip.video.chunks import (
    FORMAT,
    SUFFIX,
    TABLE,
    TIME_SLACK_S,
    Chunk,
    Settings,
    contents,
    seconds_of,
)
from fluxclip.video.clip import VideoError, VideoInfo
from fluxclip.video.decoders.pyav import open_video
from fluxclip.video.reader import VIDEO_SUFFIXES

Progress = Callable[[int, int], None]

_IDENTITY = ("path", "bytes", "mtime_ns", "sha256")  # of a video


@dataclass
class Report:
    """What became of the videos: folders of chunks, and by video the reason why there is none."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def find(paths: Sequence[Path], output: Path) -> list[tuple[Path, Path]]:
    """Videos, and the folder of chunks in `output` that each is made into.

    Of a folder all videos below it count, told by their suffix, but nothing that starts with a dot
    and no chunks; the folders that they are in are kept. Raises ValueError for a folder without
    videos, and where two videos would be made into one folder.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        inside = _videos_in(path) if path.is_dir() else [path]
        if not inside:
            raise ValueError(
                f"{path}: no video in it; looked for names that end in "
                f"{', '.join(sorted(VIDEO_SUFFIXES))}"
            )
        for video in inside:
            below = video.relative_to(path).parent if path.is_dir() else Path()
            folder = output / below / f"{video.name}{SUFFIX}"
            other = folders.setdefault(folder, video)
            if other.resolve() != video.resolve():
                raise ValueError(
                    f"{other} and {video} would both be made into {folder}: name a folder that "
                    "holds both, whose own folders are kept, or run twice with another --output"
                )
    return [(video, folder) for folder, video in folders.items()]


def write(
    videos: Sequence[tuple[Path, Path]],
    *,
    settings: Settings,
    workers: int = 1,
    progress: Progress = lambda done, total: None,
) -> Report:
    """Make videos into folders of chunks, without their sound.

    Stopped or killed at any moment and called again, it keeps the chunks that are whole and goes
    on. Each chunk is decoded after it was written: its frames are as many and at the same times as
    those of the source. What is written depends on the videos and the settings alone. A video that
    cannot be read to its end is reported, leaves nothing behind and stops no other.

    Args:
        videos: (a video, the folder to make), as `find` gives them.
        workers: threads; they share out the videos, and of few videos the chunks.
        progress: called with how many chunks are done, of how many in the videos opened so far.

    Raises ValueError, with nothing done, where a folder was made or begun with other settings, and
    OSError where files cannot be written: chunks that are whole stay.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    for _, folder in videos:
        _require_settings(folder, settings)
    report, shared = Report(), _Shared(progress)
    at_once = max(1, min(workers, len(videos)))
    each = max(1, workers // at_once)
    with ThreadPoolExecutor(at_once) as pool:
        jobs = {
            pool.submit(_write_video, video, folder, settings, each, shared): (video, folder)
            for video, folder in videos
        }
        try:
            for job in as_completed(jobs):
                video, folder = jobs[job]
                try:
                    (report.written if job.result() else report.kept).append(folder)
                except VideoError as error:
                    report.failed[str(video)] = str(error)
        except BaseException:
            shared.stop()
            pool.shutdown(cancel_futures=True)
            if shared.error is not None:
                raise shared.error from None
            raise
    report.written.sort()
    report.kept.sort()
    return report


class _Stopped(Exception):
    """Work is given up: other work failed for good, or the user stopped it."""


class _Shared:
    """What the threads of one call know of each other: how far all is, and whether to stop."""

    def __init__(self, progress: Progress) -> None:
        self.error: OSError | None = None
        self._is_stopped = threading.Event()
        self._progress, self._lock = progress, threading.Lock()
        self._done = self._total = 0

    def count(self, *, done: int = 0, total: int = 0) -> None:
        with self._lock:
            self._done, self._total = self._done + done, self._total + total
            self._progress(self._done, self._total)

    def stop(self, error: OSError | None = None) -> None:
        with self._lock:
            self.error = self.error or error
        self._is_stopped.set()

    @contextmanager
    def writing(self, folder: Path) -> Iterator[None]:
        """What cannot be written inside stops all."""
        try:
            yield
        except OSError as error:
            if error is self.error:
                raise
            reason = f"{folder} cannot be written ({error.strerror}); chunks that are whole stay"
            told = OSError(f"{reason}: run again to go on")
            self.stop(told)
            raise told from error

    def until_stopped(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if self._is_stopped.is_set():
                raise _Stopped
            yield item


@dataclass(frozen=True)
class _Task:
    """A video on its way into chunks, in the folder `part`."""

    video: Path
    part: Path
    settings: Settings
    info: VideoInfo  # of the video
    tick: Fraction
    size: tuple[int, int]
    shared: _Shared

    @property
    def num_chunks(self) -> int:
        return max(1, math.ceil((self.info.duration_s - TIME_SLACK_S) / self.settings.seconds))

    def name(self, number: int) -> str:
        return f"{number * self.settings.seconds:06d}.mp4"

    def number_of(self, ticks: int) -> int:
        """Which chunk a frame is in; those behind the stated end are in the last."""
        number = (seconds_of(ticks, self.tick) + TIME_SLACK_S) // self.settings.seconds
        return min(int(number), self.num_chunks - 1)

    def _end_ticks(self, number: int) -> int:
        """Where a chunk ends, by the source's clock."""
        end_s = min((number + 1) * self.settings.seconds, self.info.duration_s)
        return math.ceil(end_s / self.tick)

    def whole(self) -> dict[int, Chunk]:
        """The chunks that are there, by number."""
        found: dict[int, Chunk] = {}
        for number in range(self.num_chunks):
            record, path = self._record(number), self.part / "chunks" / self.name(number)
            if record.exists():
                chunk = Chunk(**json.loads(record.read_text(encoding="utf-8")))
                if path.exists() and path.stat().st_size == chunk.num_bytes:
                    found[number] = chunk
        return found

    def write(self, numbers: Sequence[int]) -> None:
        """Write the chunks of these numbers, ascending; raises as `write` does, or _Stopped."""
        for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
            run = [number for _, number in group]  # without a gap, as after an earlier stop
            first, last, written = run[0], run[-1], 0
            with open_video(self.video) as video:
                frames = self.shared.until_stopped(video.walk(first * self.settings.seconds))
                for number, inside in groupby(frames, key=lambda pair: self.number_of(pair[0])):
                    if number > last:
                        break
                    if number >= first:  # the frame on screen at the start may be of an earlier one
                        with self.shared.writing(self.part):
                            self._write_chunk(number, inside)
                        self.shared.count(done=1)
                        written += 1
            self.shared.count(done=len(run) - written)  # where no frame came on screen

    def _write_chunk(self, number: int, frames: Iterator[Any]) -> None:
        name, tick = self.name(number), self.tick
        content, unchecked = io.BytesIO(), self.part / f"{name}.tmp"
        try:
            ticks = encoder.encode(
                content, frames, end_ticks=self._end_ticks(number), tick=tick, size=self.size,
                gop=self.settings.gop,
            )  # fmt: skip
        except encoder.EncodingError as error:
            raise VideoError(self.video, str(error)) from error
        with open(unchecked, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        found = encoder.times_in(unchecked)
        if found != [(at - ticks[0]) * tick for at in ticks]:
            reason = f"its chunk {name} does not decode to the frames that were put into it"
            raise VideoError(self.video, reason)
        chunk = Chunk(name, ticks[0], ticks[-1], len(ticks), unchecked.stat().st_size)
        unchecked.replace(self.part / "chunks" / name)
        _write_json(self._record(number), asdict(chunk))

    def _record(self, number: int) -> Path:
        return (self.part / self.name(number)).with_suffix(".json")

    def finish(self, folder: Path) -> None:
        """Write the table, and give the folder its name."""
        begun = json.loads((self.part / TABLE).read_text(encoding="utf-8"))
        chunks = [chunk for _, chunk in sorted(self.whole().items())]
        starts_s = [seconds_of(chunk.first_ticks, self.tick) for chunk in chunks]
        ends_s = [*starts_s[1:], self.info.duration_s]
        table = {
            **begun,
            "duration_s": self.info.duration_s,
            "fps": self.info.fps,
            "width": self.size[0],
            "height": self.size[1],
            "tick": [self.tick.numerator, self.tick.denominator],
            "chunks": [
                {"start_s": start_s, "end_s": end_s, **asdict(chunk)}
                for chunk, start_s, end_s in zip(chunks, starts_s, ends_s, strict=True)
            ],
        }
        _write_json(self.part / "chunks" / TABLE, table)
        (self.part / "chunks").rename(folder)
        shutil.rmtree(self.part, ignore_errors=True)


def _write_video(
    video: Path, folder: Path, settings: Settings, workers: int, shared: _Shared
) -> bool:
    """Make one folder of chunks; False if it is there. Raises VideoError for a broken video."""
    part, before = _part(folder), _before(folder)
    made_from = None if before is None else before.source
    try:
        source = _identity(video, made_from)
    except OSError as error:
        raise VideoError(video, f"cannot be read ({error.strerror})") from error
    if made_from is not None and source["sha256"] != made_from["sha256"]:
        there = folder if folder.exists() else part
        reason = f"{there} was made from another video, {made_from['path']}; remove it first"
        raise VideoError(video, reason)
    if folder.exists():
        shutil.rmtree(part, ignore_errors=True)  # killed between the last two steps
        return False
    with open_video(video) as opened:
        size = encoder.scaled_size(opened.info.width, opened.info.height, side=settings.side)
        task = _Task(video, part, settings, opened.info, opened.tick, size, shared)
    with shared.writing(folder), _alone(video, part), _nothing_left(part):
        if folder.exists():  # another process has made it meanwhile
            shutil.rmtree(part, ignore_errors=True)
            return False
        (part / "chunks").mkdir(exist_ok=True)
        if not (part / TABLE).exists():
            header = {"format": FORMAT, "settings": asdict(settings), "source": source}
            _write_json(part / TABLE, {**header, "coding": encoder.CODING})
        whole = task.whole()
        missing = [number for number in range(task.num_chunks) if number not in whole]
        shared.count(done=len(whole), total=task.num_chunks)
        with ThreadPoolExecutor(workers) as pool:
            shares = [share.tolist() for share in np.array_split(missing, workers) if len(share)]
            for job in [pool.submit(task.write, share) for share in shares]:
                job.result()
        task.finish(folder)
    return True


@contextmanager
def _alone(video: Path, part: Path) -> Iterator[None]:
    """Inside, `part` is there and no other process makes the same; VideoError if one does."""
    busy = VideoError(video, "another process makes it into chunks now")
    part.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        part.mkdir()
    try:
        descriptor = os.open(part, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise busy from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(descriptor), part.stat())
        except (BlockingIOError, FileNotFoundError) as error:
            raise busy from error
        if not is_there:  # the other has just removed what is locked now
            raise busy
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _nothing_left(part: Path) -> Iterator[None]:
    """Of a video that turns out to be broken inside, nothing stays in `part`."""
    try:
        yield
    except VideoError:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _videos_in(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not name.endswith(SUFFIX)
        )
        found += [
            Path(parent, name)
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() in VIDEO_SUFFIXES
        ]
    return found


def _part(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


@dataclass(frozen=True)
class _Before:
    """With which settings, and of which video, a folder was made or begun."""

    settings: Settings
    source: dict[str, Any]


def _before(folder: Path) -> _Before | None:
    """What is known of a folder that is made or begun; None for neither.

    Raises VideoError for one that is not sound, and for one that another version wrote or began.
    """
    if folder.exists():
        found = contents(folder)
        return _Before(found.settings, found.source)
    part = _part(folder)
    try:
        begun = (part / TABLE).read_bytes()
    except FileNotFoundError:  # if another process has finished it meanwhile, then it is made
        return _before(folder) if folder.exists() else None
    try:
        header = json.loads(begun)
        if header["format"] == FORMAT and header.get("coding") == encoder.CODING:
            source = {key: header["source"][key] for key in _IDENTITY}
            return _Before(Settings(**header["settings"]), source)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"its {TABLE} is damaged; remove the folder to begin anew"
        raise VideoError(part, reason) from error
    reason = "begun by another version of FluxCLIP; remove the folder to begin anew"
    raise VideoError(part, reason)


def _require_settings(folder: Path, settings: Settings) -> None:
    try:
        before = _before(folder)
    except VideoError:
        return  # comes up again as what is wrong with this video
    if before is None or before.settings == settings:
        return
    there = folder if folder.exists() else _part(folder)
    raise ValueError(
        f"{there} was made with {before.settings}, not {settings}: give the same settings, "
        "remove it, or choose another --output"
    )


def _identity(video: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """What a video is known by; its digest is not computed anew while size and time are as before.

    Raises OSError for a file that cannot be read.
    """
    status = video.stat()
    known = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    if before is not None and known.items() <= before.items():
        return before
    with open(video, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(video), **known, "sha256": sha256}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
