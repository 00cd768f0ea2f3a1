"""Pairs packed into tar files, which are read at full speed where many small files are not.

    shard-000000.tar ...  of each pair KEY.json (captions, family, path) and KEY.mp4, or the still
    records.jsonl         a line for each pair: where its video lies and what is known of it
    records.offsets       where each line begins and the last ends: 64-bit little-endian
    skipped.jsonl         the pairs that were left out, with the reason
    index.json            settings, shards with sizes and checksums: written last, and so the truth

The tar files are ordinary ones in the form of the webdataset library, which is not needed to write
them. Everything in them follows from the pairs and the settings: two runs give the same bytes.
"""

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from fluxclip.data import sources
from fluxclip.data.sources import Record, Records
from fluxclip.settings import parse, settings
from fluxclip.video import VideoError, is_image, probe, read_clip
from fluxclip.video.reader import IMAGE_SUFFIXES, VIDEO_SUFFIXES

FORMAT = "fluxclip shards"
VERSION = 1
INDEX, RECORDS, OFFSETS, SKIPPED = (
    "index.json", "records.jsonl", "records.offsets", "skipped.jsonl"
)  # fmt: skip
T = TypeVar("T")
_SHA256 = re.compile("[0-9a-f]{64}")
_PART = ".part"  # ends the name of what is being written
_HEADER = tarfile.BLOCKSIZE  # bytes before a member's content
_OFFSET = 8  # bytes of a number in records.offsets
_SPAWN = multiprocessing.get_context("spawn")
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_AHEAD = 2  # pairs of each worker that are being made or wait to be written


@dataclass(frozen=True)
class Settings:
    """What the content of shards follows from.

    side, gop: pixels of the short side of videos in them at most, and frames from one keyframe to
    the next; with copy, they are the files as they were.
    shard_mb: a shard ends before it exceeds so many million bytes. pairs: SHA-256 of all pairs.
    """

    side: int
    gop: int
    copy: bool
    shard_mb: float
    pairs: str = ""

    def __post_init__(self) -> None:
        if self.side < 16 or self.gop < 1 or not self.shard_mb > 0:
            raise ValueError(
                f"side must be at least 16, gop at least 1 and shard_mb above 0, got {self.side}, "
                f"{self.gop} and {self.shard_mb:g}"
            )


@settings
class Shard:
    """A tar file; records: how many pairs it holds. sha256 is empty where nobody counted it."""

    name: str
    bytes: int
    sha256: str
    records: int


@settings
class Index:
    """The content of index.json; complete: False while shards are being written.

    following: the number of the pair to go on with. lengths: bytes of the files that count.
    """

    format: str
    version: int
    complete: bool
    settings: dict[str, Any]
    records: int
    skipped: int
    following: int
    lengths: dict[str, int]
    sha256: dict[str, str]
    shards: tuple[Shard, ...]


def read_index(path: Path, *, name: str | None = None, elsewhere: bool = False) -> Index:
    """An index.json, checked; `name` is what errors call it.

    Raises ValueError for anything else, for another version, and unless shards may be elsewhere,
    which indexes of our own making alone may say, for those whose names lead out of their folder.
    """
    name = name or str(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name} is no index of shards: it is not JSON") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{name} is no index of shards: write one with `fluxclip shards write`")
    if values.get("version") != VERSION:
        raise ValueError(
            f"{name} is of version {values.get('version')}, this is for version {VERSION}: write "
            f"the shards anew, or read them with the FluxCLIP that wrote them"
        )
    index: Index = parse(Index, values, source=name)
    # which are names of files in the cache
    if any(not _SHA256.fullmatch(sha256) for sha256 in index.sha256.values()) or any(
        not _SHA256.fullmatch(shard.sha256) for shard in index.shards if shard.sha256
    ):
        raise ValueError(f"{name} has a SHA-256 that is none")
    for shard in () if elsewhere else index.shards:
        if "/" in shard.name or "\\" in shard.name or not shard.name.endswith(".tar"):
            raise ValueError(f"{name} names a shard {shard.name!r}, which is no tar file beside it")
        if not shard.sha256:
            raise ValueError(f"{name} has no SHA-256 of {shard.name}")
    counts = [shard.records for shard in index.shards]
    if sum(counts) != index.records or min(counts, default=0) < 0:
        raise ValueError(f"{name} is of {index.records:,} pairs, its shards of {sum(counts):,}")
    if index.complete:
        for file in (RECORDS, OFFSETS):
            if file not in index.lengths or file not in index.sha256:
                raise ValueError(f"{name} has no length or no SHA-256 of {file}")
        if not index.records or index.lengths[OFFSETS] != _OFFSET * (index.records + 1):
            raise ValueError(f"{name} is of {index.records:,} pairs, its {OFFSETS} of others")
    return index


@dataclass(frozen=True)
class Written:
    """What `write` has done, earlier runs included.

    num_skipped: pairs. skipped: why, by the path of the video, which several pairs may have.
    """

    shards: int
    records: int
    bytes: int
    num_skipped: int
    skipped: dict[str, str]


def write(
    annotations: str,
    output: Path,
    *,
    source: str = "annotations",
    side: int = 288,
    gop: int = 15,
    copy: bool = False,
    shard_mb: float = 256,
    workers: int = 0,
    timeout_s: float = 300.0,
    most_broken: float = 0.1,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Written:
    """Pack the pairs of `annotations` into shards in the folder `output`, in their order.

    Stopped at any moment and started again with the same arguments, it keeps the shards that are
    whole and goes on. Stills are packed as they are. workers: processes that read and transcode;
    how many there are changes nothing in the shards. timeout_s: a video whose decoder gives no
    frame for so long in such a process is one that cannot be read, as is one that crashes it.

    A video that cannot be read, to its end, is skipped and listed. Raises ValueError if more than
    the share `most_broken` (0-1) of all pairs is, for pairs without files, for other settings or
    pairs than those that the folder was begun with and for a folder of anything else; OSError if
    something cannot be written, on a full disk for example, or a process is killed: what is whole
    stays.
    """
    records = sources.read(source, annotations, check_files=False)
    if type(records) is not Records:
        raise ValueError(f"pairs of source {source!r} have no files of their own to be packed")
    if not len(records):
        raise ValueError(f"{annotations} has no pairs")
    base = Path(annotations.partition("?")[0]).parent
    wanted = Settings(
        side=side, gop=gop, copy=copy, shard_mb=shard_mb, pairs=_digest(records, base)
    )
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, not {workers}")
    if not 0 <= most_broken <= 1:
        raise ValueError(f"most_broken must be a share from 0 to 1, not {most_broken:g}")
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        index = _begun(output, wanted)
        try:
            if not index.complete:
                index = _packed(
                    records, output, index, wanted, base=base, workers=workers,
                    timeout_s=timeout_s, most_broken=most_broken, progress=progress,
                )  # fmt: skip
        except OSError as error:
            if isinstance(error, ChildProcessError):
                raise
            raise OSError(
                f"{output}: {error.strerror or error}; the shards written before are whole: see to "
                f"it, and run the same command again"
            ) from error
    lines = (output / SKIPPED).read_text(encoding="utf-8").splitlines()
    skipped = {item["video"]: item["reason"] for item in map(json.loads, lines)}
    size = sum(shard.bytes for shard in index.shards)
    return Written(len(index.shards), index.records, size, index.skipped, skipped)


def _digest(records: Records, base: Path) -> str:
    """What tells these pairs from others: SHA-256 over all of them."""
    found = hashlib.sha256()
    for record in records:
        found.update(_json([_shown(record, base), record.captions, record.family]))
    return found.hexdigest()


def _shown(record: Record, base: Path) -> str:
    """A pair's path as shards name it: where it can be, from the folder of the annotations."""
    video = record.video
    return (video.relative_to(base) if video.is_relative_to(base) else video).as_posix()


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only process that writes to a folder; the system drops the lock with the process."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise BlockingIOError(f"another process is writing to {folder}: let it finish") from error
    finally:
        os.close(number)


def _begun(output: Path, wanted: Settings) -> Index:
    """Where writing stands: the folder's files are as its index says, or it is a new one."""
    path = output / INDEX
    if not path.exists():
        # before there is an index, all that can be of a stopped run is its part
        if others := sorted(p.name for p in output.iterdir() if p.name != INDEX + _PART):
            raise ValueError(f"{output} holds other things ({others[0]}): choose another folder")
        index = Index(
            format=FORMAT, version=VERSION, complete=False, settings=asdict(wanted), records=0,
            skipped=0, following=0, lengths={RECORDS: 0, SKIPPED: 0}, sha256={}, shards=(),
        )  # fmt: skip
        _replace(path, _indented(index))
    index = read_index(path)
    for key, value in asdict(wanted).items():
        if (before := index.settings.get(key)) != value:
            what = "with other pairs" if key == "pairs" else f"with {key} = {before}, not {value}"
            raise ValueError(f"{output} was begun {what}: choose another folder, or delete it")
    for shard in index.shards:
        if not (file := output / shard.name).is_file() or file.stat().st_size != shard.bytes:
            raise ValueError(f"{file} is missing or has changed: delete the folder and write anew")
    for name in (RECORDS, SKIPPED):
        with (output / name).open("ab") as lines:
            if lines.tell() < index.lengths[name]:
                raise ValueError(f"{output / name} has changed: delete the folder and write anew")
            lines.truncate(index.lengths[name])
    if index.complete:
        offsets = output / OFFSETS
        if not offsets.is_file() or offsets.stat().st_size != index.lengths[OFFSETS]:
            write_offsets(output / RECORDS, offsets)
        return index
    following = _shard_name(index)
    for stray in (following, following + _PART, INDEX + _PART, OFFSETS + _PART):
        (output / stray).unlink(missing_ok=True)  # of a run that was stopped
    return index


def _shard_name(index: Index) -> str:
    """The name of the shard that comes after those of an index."""
    return f"shard-{len(index.shards):06d}.tar"


@dataclass(frozen=True)
class _Member:
    """A pair's file as it goes into a shard, and what is known of it."""

    suffix: str
    content: bytes
    info: dict[str, Any]


def _packed(
    records: Records, output: Path, index: Index, wanted: Settings, *, base: Path, workers: int,
    timeout_s: float, most_broken: float, progress: Callable[[int, int], object],
) -> Index:  # fmt: skip
    """Write the shards that are left to write."""
    limit = wanted.shard_mb * 1e6
    shard = _OpenShard(output, index)
    first = ""
    try:
        for number, made in _members(records, index.following, wanted, workers, timeout_s):
            record = records[number]
            shown = _shown(record, base)
            if isinstance(made, str):
                first = first or f"{shown}: {made}"
                shard.skip({"video": shown, "reason": made})
                if (broken := shard.skipped) > most_broken * len(records):
                    raise ValueError(
                        f"{broken:,} of {len(records):,} pairs are broken, more than "
                        f"{most_broken:.0%}, the first new one {first}; mend or leave them out, or "
                        f"raise --most-broken"
                    )
            else:
                about = {"video": shown, "captions": list(record.captions), "family": record.family}
                if shard.records and shard.size_with(about, made) > limit:
                    shard = _OpenShard(output, shard.close(number))
                shard.add(f"{number:08d}", about, made)
            progress(number + 1, len(records))
        index = shard.close(len(records))
    finally:
        shard.discard()
    if not index.records:
        with (output / SKIPPED).open(encoding="utf-8") as lines:
            item = json.loads(lines.readline())
        raise ValueError(
            f"no video of the {len(records):,} pairs can be read, the first {item['video']}: "
            f"{item['reason']}"
        )
    return finish(output, index)


def finish(output: Path, index: Index) -> Index:
    """Complete an index whose shards and records.jsonl are written."""
    write_offsets(output / RECORDS, output / OFFSETS)
    sizes, sums = dict(index.lengths), {}
    for name in (RECORDS, OFFSETS):
        sizes[name] = (output / name).stat().st_size
        sums[name] = sha256_of(output / name)
    index = replace(index, complete=True, lengths=sizes, sha256=sums)
    _replace(output / INDEX, _indented(index))
    return index


def write_offsets(lines: Path, path: Path) -> None:
    """Write where each line of a file begins, and the file's length."""
    with lines.open("rb") as file:
        sizes = np.fromiter((len(line) for line in file), np.uint64)
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.uint64)]).astype("<u8")
    _replace(path, starts.tobytes())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _OpenShard:
    """The shard that is being written: a part file until it is whole."""

    def __init__(self, output: Path, index: Index) -> None:
        self._output, self._index = output, index
        self._name = _shard_name(index)
        self._part = output / f"{self._name}{_PART}"
        self._file: BinaryIO = self._part.open("wb")
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._lines: list[bytes] = []
        self._skipped: list[bytes] = []

    @property
    def records(self) -> int:
        return len(self._lines)

    @property
    def skipped(self) -> int:
        """Pairs that were left out, in this shard and those before."""
        return self._index.skipped + len(self._skipped)

    def skip(self, item: dict[str, str]) -> None:
        self._skipped.append(_json(item))

    def size_with(self, about: dict[str, Any], member: _Member) -> int:
        """Bytes of the shard if it is closed with one more pair."""
        size = int(self._tar.offset)
        for content in (len(_json(about)), len(member.content)):
            size += _HEADER + _rounded(content, tarfile.BLOCKSIZE)
        return _rounded(size + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)

    def add(self, key: str, about: dict[str, Any], member: _Member) -> None:
        self._put(f"{key}.json", _json(about))
        name = f"{key}{member.suffix}"
        offset = self._put(name, member.content)
        place = {
            "shard": len(self._index.shards), "offset": offset, "bytes": len(member.content),
            "crc32": zlib.crc32(member.content), "name": name,
        }  # fmt: skip
        self._lines.append(_json({**place, **about, "info": member.info}))

    def _put(self, name: str, content: bytes) -> int:
        """Where in the tar the content begins."""
        member = tarfile.TarInfo(name)  # owner, rights and time are always the same
        member.size = len(content)
        offset = int(self._tar.offset) + _HEADER
        self._tar.addfile(member, io.BytesIO(content))
        return offset

    def close(self, following: int) -> Index:
        """Make the shard count, and all pairs before `following`."""
        self._tar.close()
        _sync(self._file)
        self._file.close()
        i, shards = self._index, self._index.shards
        if self._lines:
            size = self._part.stat().st_size
            shards += (Shard(self._name, size, sha256_of(self._part), len(self._lines)),)
            os.replace(self._part, self._output / self._name)
        lengths = {}
        for name, lines in ((RECORDS, self._lines), (SKIPPED, self._skipped)):
            with (self._output / name).open("ab") as file:
                file.write(b"".join(lines))
                _sync(file)
                lengths[name] = file.tell()
        index = replace(
            i, records=i.records + len(self._lines), skipped=self.skipped, following=following,
            lengths=lengths, shards=shards,
        )  # fmt: skip
        _replace(self._output / INDEX, _indented(index))
        return index

    def discard(self) -> None:
        """Leave nothing of a shard that is not whole."""
        with suppress(OSError):  # on a full disk, what waits to be written fails once more
            self._file.close()
        self._part.unlink(missing_ok=True)


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _indented(index: Index) -> bytes:
    return (json.dumps(asdict(index), indent=1) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that there is the old one or the new one, whatever happens."""
    part = path.with_name(path.name + _PART)
    with part.open("wb") as file:
        file.write(content)
        _sync(file)
    os.replace(part, path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _members(
    records: Records, start: int, wanted: Settings, workers: int, timeout_s: float
) -> Iterator[tuple[int, _Member | str]]:
    """Each pair's number and file, or why it has none, in order."""
    if not workers:
        for number in range(start, len(records)):
            yield number, _member(records[number], wanted)
        return
    following = start
    while following < len(records):
        running: deque[tuple[int, Future[_Member | str]]] = deque()
        pool = ProcessPoolExecutor(workers, mp_context=_SPAWN, initializer=_leave_with_parent)
        try:
            while running or following < len(records):
                while following < len(records) and len(running) < _AHEAD * workers:
                    made = pool.submit(_watched, records[following], wanted, timeout_s)
                    running.append((following, made))
                    following += 1
                yield running[0][0], running[0][1].result()
                running.popleft()
        except BrokenProcessPool:  # by one of those running: alone it shows which
            pass
        finally:
            pool.shutdown(cancel_futures=True)
        for number, _ in running:
            yield number, _alone_in_a_process(records[number], wanted, timeout_s)


def _alone_in_a_process(record: Record, wanted: Settings, timeout_s: float) -> _Member | str:
    """A pair's file from a process of its own; why it has none if that crashes or hangs."""
    receiver, sender = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_send, args=(sender, record, wanted, timeout_s), daemon=True)
    process.start()
    sender.close()
    made: _Member | str | None = None
    with suppress(EOFError, OSError), receiver:  # it has ended
        made = receiver.recv()
    process.join()
    if made is not None:
        return made
    code = process.exitcode or 0
    if -code == signal.SIGALRM:
        return f"its decoder gave nothing for {timeout_s:g} s"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if -code in _CRASHES:
        return f"its decoder crashed ({how})"
    raise ChildProcessError(
        f"a worker process ended ({how}) as it read {record.video}; if memory ran out, lower "
        f"--workers, and run the same command again"
    )


def _send(sender: Connection, record: Record, wanted: Settings, timeout_s: float) -> None:
    _leave_with_parent()
    sender.send(_watched(record, wanted, timeout_s))


def _watched(record: Record, wanted: Settings, timeout_s: float) -> _Member | str:
    """`_member` in a process that the system ends if a decoder gives nothing for so long."""

    def alive() -> None:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)

    alive()
    try:
        return _member(record, wanted, alive=alive)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _leave_with_parent() -> None:
    """In a worker: end silently with Ctrl-C, and when the parent has, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _member(
    record: Record, wanted: Settings, *, alive: Callable[[], object] = lambda: None
) -> _Member | str:
    """A pair's file as it goes into a shard; or why it cannot, in one line.

    alive: called for every frame that is decoded.
    """
    path = record.video
    try:
        if path.is_dir():
            return "it is a folder; shards take files, and not chunks of them"
        if wanted.copy or record.is_still:
            content, suffix = path.read_bytes(), path.suffix.lower()
            if suffix not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
                suffix = ".bin"  # a video by its content
        else:
            content, suffix = _transcoded(path, wanted, alive), ".mp4"
        name = path.with_suffix(suffix)
        info = probe(name, content=content)
        if not is_image(name):  # to the end of it
            last_s = info.duration_s * (1 - 1e-9)
            read_clip(name, content=content, times_s=[last_s], side=16)
    except (VideoError, OSError) as error:
        reason = " ".join(str(error).split())
        return reason.removeprefix(f"{path}: ").removesuffix(f": '{path}'")
    known = {key: value for key, value in asdict(info).items() if key not in ("path", "is_image")}
    return _Member(suffix, content, known)


def _transcoded(path: Path, wanted: Settings, alive: Callable[[], object]) -> bytes:
    """A video's frames at their times, small, keyframes near. Raises VideoError or OSError."""
    from fluxclip.video.decoders.pyav import open_video  # imports PyAV
    from fluxclip.video.encoder import EncodingError, encode, scaled_size

    made = io.BytesIO()
    if not path.exists():
        raise FileNotFoundError("no such file")
    with open_video(path) as video:
        info = video.info
        size = scaled_size(info.width, info.height, side=wanted.side)
        end = round(info.duration_s / video.tick)
        try:
            frames = encode(
                made, _told(video.walk(0.0), alive), end_ticks=end, tick=video.tick, size=size,
                gop=wanted.gop,
            )  # fmt: skip
        except EncodingError as error:
            raise VideoError(path, str(error)) from error
    content = made.getvalue()
    copied = probe(path.with_suffix(".mp4"), content=content)
    if copied.num_frames != len(frames) or abs(copied.duration_s - info.duration_s) > 1e-3:
        raise VideoError(
            path,
            f"its copy has {copied.num_frames} frames in {copied.duration_s:.3f} s, itself "
            f"{len(frames)} in {info.duration_s:.3f} s",
        )
    return content


def _told(frames: Iterator[T], alive: Callable[[], object]) -> Iterator[T]:
    for frame in frames:
        alive()
        yield frame
