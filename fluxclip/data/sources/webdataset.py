"""Pairs in tar shards, here or behind an address: those of `fluxclip shards write`, or others'.

    shards/                              a folder that `fluxclip shards write` has written
    http://host/shards/index.json        the same, behind a web server (or http://host/shards/)
    tars/{000..099}.tar, tars/*.tar      tar files in the form of webdataset without our index,
    http://host/{000..099}.tar           looked through once, when they are named first

In others' tar files KEY.mp4 (or another video or still) and KEY.json ("caption", "captions" or
"text": a text or a list of them; "family" if there is one) or KEY.txt (one caption) are a pair, one
after the other; names without a video are passed over. Members are read where they lie: nothing is
unpacked, and JSON is all that is read of them.
"""

import glob
import hashlib
import json
import mmap
import os
import re
import shutil
import tarfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import cached_property
from io import FileIO
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, overload
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from fluxclip.data import remote
from fluxclip.data.order import Groups
from fluxclip.data.shards import (
    FORMAT,
    INDEX,
    OFFSETS,
    RECORDS,
    VERSION,
    Index,
    Shard,
    finish,
    read_index,
)
from fluxclip.data.sources import Record, Records, fingerprint_of_file
from fluxclip.data.sources._prepared import writing
from fluxclip.stages import stage
from fluxclip.video import Clip, VideoError, VideoInfo, probe, read_clip
from fluxclip.video.reader import IMAGE_SUFFIXES, VIDEO_SUFFIXES

_SHOWN = 3  # missing shards named in an error
_KEPT_OPEN = 6  # shards; more than an epoch's order uses at a time
_MOST_TEXT = 2**24  # bytes of a member with captions
_LISTING = 2  # how tar files are looked through; what was kept of another way is made anew
_KNOWN = {field.name for field in fields(VideoInfo)} - {"path", "is_image"}


def read(path: str | Path, *, check_files: bool = True) -> Records:
    """The pairs of shards, in their order.

    With `check_files` every shard is there and as large as it should be, or an error says which is
    not. Of shards behind an address the lists are fetched now, the shards when they are used, into
    a cache. Raises FileNotFoundError, and ValueError for what is no such thing, has no captions or
    cannot be reached.
    """
    name = str(path)
    if _is_pattern(name):
        names = _expanded(name)
        return _ShardRecords(_scan(names, name), None, pattern=name)
    if _is_address(name):
        return _read_remote(name, check_files=check_files)
    file = _index_file(name)
    if not file.is_file():
        raise FileNotFoundError(
            f"no {file}: write it with `fluxclip shards write`, or name tar files (shards/*.tar)"
        )
    index = _complete(read_index(file), str(file))
    folder = file.parent
    for list_name in (RECORDS, OFFSETS):
        _refuse_other_size(folder / list_name, index.lengths.get(list_name, -1))
    if check_files:
        _require_shards(folder, index)
    return _ShardRecords(folder, str(folder))


def files(name: str) -> list[Path]:
    """The files on this machine that `name` stands for: the index, or tar files without one."""
    if _is_address(name):
        return []
    if _is_pattern(name):
        return [Path(found) for found in _expanded(name) or [name]]
    return [_index_file(name)]


def identity(name: str) -> str:
    """A hash of the index, or of tar files' names and sizes: to read them would take too long."""
    if _is_pattern(name):
        # not by marks: a copy on another machine is the same data
        found = _states(_expanded(name), name)
        return _hash([(PurePosixPath(_bare(n)).name, state.bytes) for n, state in found.items()])
    if _is_address(name):
        return hashlib.sha256(remote.small(_index_address(name))).hexdigest()
    return fingerprint_of_file(_index_file(name))


def _is_address(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _bare(name: str) -> str:
    """A name without what follows the "?" of an address: it may be a secret, and soon another."""
    return name.partition("?")[0] if _is_address(name) else name


def _is_pattern(name: str) -> bool:
    path = urlsplit(name).path if _is_address(name) else name
    return path.endswith(".tar")


def _index_file(name: str) -> Path:
    path = Path(name)
    return path if path.suffix == ".json" else path / INDEX


def _index_address(name: str) -> str:
    parts = urlsplit(name)
    path = parts.path if parts.path.endswith(".json") else f"{parts.path.rstrip('/')}/{INDEX}"
    return urlunsplit(parts._replace(path=path))


def _complete(index: Index, name: str) -> Index:
    if not index.complete:
        raise ValueError(
            f"{name}: its shards are not finished: run the same `fluxclip shards write` again"
        )
    return index


def _refuse_other_size(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, though its index names it: write it again")
    if (size := path.stat().st_size) != num_bytes:
        raise ValueError(
            f"{path} has {size:,} bytes, its index says {num_bytes:,}: write or copy it again"
        )


def _require_shards(folder: Path, index: Index) -> None:
    """Raise for shards that are missing, or are of another size than the index says."""
    missing = [shard.name for shard in index.shards if not (folder / shard.name).is_file()]
    if missing:
        more = ", ..." if len(missing) > _SHOWN else ""
        raise FileNotFoundError(
            f"{folder}: {len(missing):,} of {len(index.shards):,} shards not found: "
            f"{', '.join(missing[:_SHOWN])}{more}"
        )
    for shard in index.shards:
        _refuse_other_size(folder / shard.name, shard.bytes)


class _Lines(Sequence[Record]):
    """The lines of records.jsonl, read where they lie; many processes share the memory for it."""

    def __init__(self, folder: Path, index: Index, shown: str) -> None:
        self._starts = np.memmap(folder / OFFSETS, "<u8", "r")
        with (folder / RECORDS).open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._starts) != index.records + 1 or self._starts[-1] != len(self._bytes):
            raise ValueError(f"{folder / OFFSETS} is not of {RECORDS}: write the shards again")
        self._shards, self._shown, self._path = index.shards, shown, folder / RECORDS

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...
    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        line = self.line(index)
        shard = self._shards[line["shard"]].name
        return Record(
            Path(f"{self._shown}{shard.partition('://')[2] or shard}") / line["name"],
            tuple(line["captions"]),
            line["family"],
        )

    def line(self, index: int) -> dict[str, Any]:
        """What is known of a pair, as its line says. Raises ValueError if that cannot be true."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = index % len(self)
        start, stop = self._starts[number:][:2].tolist()
        line: Any = None
        with suppress(ValueError, RecursionError):
            line = json.loads(self._bytes[start:stop])
        if not _is_sound(line, self._shards):
            raise ValueError(
                f"line {number + 1:,} of {self._path} is none of these shards: write them again"
            )
        found: dict[str, Any] = line
        return found


def _is_sound(line: Any, shards: Sequence[Shard]) -> bool:
    """Whether a line tells of a pair all that is needed, and its video lies in a shard."""
    if not isinstance(line, dict):
        return False
    place: list[Any] = [line.get(key) for key in ("shard", "offset", "bytes")]
    captions, info = line.get("captions"), line.get("info")
    return (
        all(type(value) is int and value >= 0 for value in place)
        and place[0] < len(shards)
        and place[1] + place[2] <= shards[place[0]].bytes
        and isinstance(line.get("name"), str)
        and isinstance(line.get("family"), str | None)
        and isinstance(captions, list)
        and captions != []
        and all(isinstance(caption, str) for caption in captions)
        and (info is None or _is_info(info))
    )


def _is_info(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == _KNOWN
        and all(isinstance(number, int | float | None) for number in value.values())
    )


class _ShardRecords(Records):
    """Pairs whose videos are members of tar files.

    folder: where the lists are. base: before the names of shards, to find them. Where it is None
    they are whole paths or bare addresses, and `pattern` stands for the addresses to ask.
    """

    def __init__(self, folder: Path, base: str | None, *, pattern: str = "") -> None:
        self._folder, self._base, self._pattern = folder, base, pattern
        self._open: dict[int, FileIO] = {}
        self._expected: int | None = None  # the shard being fetched in the background, or the last

    def __getstate__(self) -> dict[str, Any]:
        own = {"_folder": self._folder, "_base": self._base, "_pattern": self._pattern}
        return {**own, "_open": {}, "_expected": None}

    @cached_property
    def _index(self) -> Index:
        return read_index(self._folder / INDEX, elsewhere=self._base is None)

    @cached_property
    def _lines(self) -> _Lines:
        base = self._base
        shown = "" if base is None else f"{base.partition('://')[2].partition('?')[0] or base}/"
        return _Lines(self._folder, self._index, shown)

    @cached_property
    def _records(self) -> Sequence[Record]:  # type: ignore[override]
        return self._lines

    @cached_property
    def _is_remote(self) -> bool:
        return any(_is_address(self._address(number)) for number in range(len(self._index.shards)))

    @cached_property
    def groups(self) -> Groups:  # type: ignore[override]
        """The pairs of each shard that has some, wherever it lies: the order is the same."""
        sizes = [shard.records for shard in self._index.shards]
        return Groups(np.cumsum([0, *filter(None, sizes)]))

    def fetch(self, index: int) -> None:
        """Have the shard of a pair here, and open: no other process can take it away then."""
        if self._is_remote:
            with stage("read"):
                self._opened(self._lines.line(index)["shard"])

    def expect(self, index: int) -> None:
        """Fetch the shard of a pair in the background; if that fails, `fetch` will say so."""
        number = self._lines.line(index)["shard"]
        shard, address = self._index.shards[number], self._address(number)
        if number == self._expected or number in self._open or not _is_address(address):
            return
        self._expected = number

        def get() -> None:
            with suppress(ValueError, OSError):
                remote.fetched(address, sha256=shard.sha256, num_bytes=shard.bytes)

        threading.Thread(target=get, daemon=True).start()

    def is_there(self, index: int) -> bool:
        """Whether a pair's shard is there; of those behind an address, its server was asked."""
        address = self._address(self._lines.line(index)["shard"])
        return _is_address(address) or Path(address).is_file()

    def file(self, index: int) -> Path:
        """The shard that a pair is in."""
        return Path(_bare(self._address(self._lines.line(index)["shard"])))

    def info(self, index: int) -> VideoInfo:
        line, video = self._lines.line(index), self[index].video
        if known := line.get("info"):
            return VideoInfo(video, **known, is_image=self[index].is_still)
        return probe(video, content=self._content(line, video))

    def clip(self, index: int, **wanted: Any) -> Clip:
        video = self[index].video
        return read_clip(video, content=self._content(self._lines.line(index), video), **wanted)

    def _content(self, line: dict[str, Any], video: Path) -> bytes:
        """A member's bytes; VideoError if they are not what was written."""
        with stage("read"):
            shard = self._opened(line["shard"])
            content = _read_at(shard, line["offset"], line["bytes"])
            if len(content) < line["bytes"]:
                raise VideoError(video, "its shard ends before it", kind="truncated")
            if "crc32" in line and zlib.crc32(content) != line["crc32"]:
                raise VideoError(video, "its bytes in the shard are not those that were written")
        return content

    def _opened(self, number: int) -> FileIO:
        """A shard as an open file; the one not used for longest is closed for it."""
        if number in self._open:
            self._open[number] = self._open.pop(number)  # to the end: used last
            return self._open[number]
        shard, address = self._index.shards[number], self._address(number)
        if not _is_address(address):
            opened = FileIO(address)
        else:
            while True:
                path = remote.fetched(address, sha256=shard.sha256, num_bytes=shard.bytes)
                try:
                    opened = FileIO(path)
                    break
                except FileNotFoundError:  # another process has made room
                    continue
        if len(self._open) == _KEPT_OPEN:
            self._open.pop(next(iter(self._open))).close()
        self._open[number] = opened
        return opened

    @cached_property
    def _asked(self) -> list[str]:
        """The shards of a pattern behind an address, with what follows its "?" now."""
        return _expanded(self._pattern)

    def _address(self, number: int) -> str:
        if _is_address(self._pattern):
            return self._asked[number]
        name = self._index.shards[number].name
        if self._base is None:
            return name
        return _beside(self._base, name) if _is_address(self._base) else f"{self._base}/{name}"


def _read_at(file: FileIO, offset: int, size: int) -> bytes:
    """Bytes of a file from `offset` on, if it has them; one call gives no more than 2 GiB."""
    content = os.pread(file.fileno(), size, offset)
    while len(content) < size:
        more = os.pread(file.fileno(), size - len(content), offset + len(content))
        if not more:
            break
        content += more
    return content


def _beside(base: str, name: str) -> str:
    """The address of a file in a folder; what follows a "?" is for all its files."""
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _read_remote(name: str, *, check_files: bool) -> Records:
    """The pairs of an index behind an address: its lists are kept by what is in them."""
    address = _index_address(name)
    content = remote.small(address)
    parts = urlsplit(address)
    base = urlunsplit(parts._replace(path=parts.path.rpartition("/")[0]))
    folder = remote.shards_folder() / hashlib.sha256(content).hexdigest()
    if not (folder / INDEX).is_file():
        with writing(folder):
            folder.mkdir(exist_ok=True)
            _put(folder / INDEX, content)
    index = _complete(read_index(folder / INDEX, name=name), name)
    for list_name in (RECORDS, OFFSETS):
        if not (folder / list_name).is_file():
            fetched = remote.fetched(
                _beside(base, list_name), sha256=index.sha256[list_name],
                num_bytes=index.lengths[list_name], suffix=Path(list_name).suffix,
            )  # fmt: skip
            # a link: processes that start at once are all handed the one file
            with writing(folder), suppress(FileExistsError):
                (folder / list_name).symlink_to(Path("..", fetched.name))
    if check_files:
        urls = [_beside(base, shard.name) for shard in index.shards]
        for url, shard, found in zip(urls, index.shards, remote.describe(urls), strict=True):
            if found.bytes != shard.bytes:
                raise ValueError(f"{url} has {found.bytes:,} bytes, its index says {shard.bytes:,}")
    return _ShardRecords(folder, base)


def _put(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    os.replace(part, path)


def _expanded(pattern: str) -> list[str]:
    """The names that a pattern with {000..099}, {a,b} or * stands for, in its order.

    Raises FileNotFoundError if a * matches nothing.
    """
    if braces := re.search(r"\{([^{}]*)\}", pattern):
        before, after = pattern[: braces.start()], pattern[braces.end() :]
        if span := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
            first, last = span.groups()
            width = len(first) if first.startswith("0") else 0
            words = [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]
        else:
            words = braces[1].split(",")
        return [name for word in words for name in _expanded(f"{before}{word}{after}")]
    if "*" not in pattern or _is_address(pattern):
        return [pattern]
    return sorted(glob.glob(pattern))


def _states(names: list[str], pattern: str) -> dict[str, remote.Described]:
    """Bytes of tar files, and marks that change with them. Raises FileNotFoundError."""
    missing = [name for name in names if not _is_address(name) and not Path(name).is_file()]
    if missing or not names:
        what = ", ".join(missing[:_SHOWN]) if missing else "no file matches"
        raise FileNotFoundError(f"{pattern}: shards not found: {what}")
    urls = [name for name in names if _is_address(name)]
    found = dict(zip(urls, remote.describe(urls), strict=True))
    for name in names:
        if name not in found:
            state = Path(name).stat()
            found[name] = remote.Described(state.st_size, str(state.st_mtime_ns))
    return {name: found[name] for name in names}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogateescape")).hexdigest()


def _scan(names: list[str], pattern: str) -> Path:
    """A folder with lists of the pairs in tar files: made once for the same files.

    One process makes it, the others wait.
    """
    from filelock import FileLock

    names = [name if _is_address(name) else str(Path(name).absolute()) for name in names]
    described = _states(names, pattern)
    key = _hash([VERSION, _LISTING, [(_bare(name), described[name]) for name in names]])
    folder = remote.shards_folder() / key
    if (folder / INDEX).is_file():
        return folder
    lock = FileLock(f"{folder}.lock")
    with writing(folder):
        lock.acquire()
    making = folder.with_name(f"{key}.part")
    try:
        if not (folder / INDEX).is_file():
            shutil.rmtree(making, ignore_errors=True)  # of a process that was killed
            with writing(folder):
                making.mkdir()
            index = _listed(names, described, making / RECORDS, pattern)
            with writing(folder):
                finish(making, index)
                making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
        lock.release()
    return folder


def _listed(
    names: list[str], described: dict[str, remote.Described], path: Path, pattern: str
) -> Index:
    """Write the lines of all pairs in tar files. Raises ValueError if there is none."""
    shards: list[Shard] = []
    for number, name in enumerate(names):
        tar, sha256 = Path(name), ""
        if _is_address(name):
            tar, sha256 = remote.fetched_unknown(name, described[name])
        pairs = list(_pairs(tar, _bare(name)))
        lines = [json.dumps({"shard": number, **pair}, ensure_ascii=False) for pair in pairs]
        text = "".join(f"{line}\n" for line in lines)
        with writing(path.parent), path.open("ab") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
        shards.append(Shard(_bare(name), tar.stat().st_size, sha256, len(pairs)))
    num_records = sum(shard.records for shard in shards)
    if not num_records:
        raise ValueError(f"{pattern}: no pair of a video and its captions in {len(names)} shards")
    return Index(
        format=FORMAT, version=VERSION, complete=False, settings={}, records=num_records,
        skipped=0, following=num_records, lengths={RECORDS: path.stat().st_size}, sha256={},
        shards=tuple(shards),
    )  # fmt: skip


def _pairs(path: Path, name: str) -> Iterator[dict[str, Any]]:
    """Lines of the pairs in a tar file, `name` being what errors call it.

    Raises ValueError for what is no plain tar file, and for a video without captions.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = (m for m in tar if m.isreg() and not m.issparse())
            for key, group in groupby(members, key=lambda member: _split(member.name)[0]):
                by_suffix = {_split(member.name)[1].lower(): member for member in group}
                videos = [s for s in by_suffix if f".{s}" in VIDEO_SUFFIXES | IMAGE_SUFFIXES]
                if not videos:
                    continue
                video = by_suffix[videos[0]]
                captions, family = _captions(tar, by_suffix, where=f"{name}: {key}")
                yield {
                    "offset": video.offset_data, "bytes": video.size,
                    "name": PurePosixPath(video.name).name, "captions": captions, "family": family,
                }  # fmt: skip
            _require_end(path, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{name} is no whole tar file without compression, which shards are ({error})"
        ) from error


def _require_end(path: Path, offset: int) -> None:
    """Raise ReadError unless nothing but zeros follows, and at least a block of them.

    At a damaged member tarfile stops as it does at the end: pairs behind it would be lost unseen.
    """
    with path.open("rb") as file:
        file.seek(offset)
        piece = file.read(tarfile.BLOCKSIZE)
        if len(piece) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it is cut off: its end is missing")
        while piece:
            if piece.strip(b"\0"):
                raise tarfile.ReadError(f"no member begins at byte {offset:,}, nor does it end")
            piece = file.read(2**20)


def _split(name: str) -> tuple[str, str]:
    """A member's name as webdataset has it: up to the first dot in its last part, and the rest."""
    folder, slash, last = name.rpartition("/")
    key, _, suffix = last.partition(".")
    return f"{folder}{slash}{key}", suffix


def _captions(
    tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], *, where: str
) -> tuple[list[str], str | None]:
    """Captions and family of a pair. Raises ValueError unless there is one and all are text."""
    found: object = None
    family: object = None
    if "json" in members:
        try:
            values = json.loads(_text(tar, members["json"], where))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}.json is not JSON") from error
        if isinstance(values, dict):
            keys = (key for key in ("captions", "caption", "text") if values.get(key) is not None)
            found = values.get(next(keys, ""))
            family = values.get("family")
    if found is None and "txt" in members:
        found = _text(tar, members["txt"], where).strip()
    if found is None:
        has = ", ".join(f".{suffix}" for suffix in members)
        raise ValueError(
            f'{where} has no caption; it takes "caption" in its .json, or a .txt; it has {has}'
        )
    captions = found if isinstance(found, list) else [found]
    if not captions:
        raise ValueError(f"{where}: its list of captions is empty")
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            shown = json.dumps(caption, ensure_ascii=False)[:60]
            raise ValueError(f"{where}: a caption must be a text, got {shown}")
    return list(captions), family if isinstance(family, str) else None


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> str:
    if member.size > _MOST_TEXT:
        raise ValueError(f"{where}: {member.size:,} bytes of captions are more than {_MOST_TEXT:,}")
    file = tar.extractfile(member)
    assert file is not None  # a regular member
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: its captions are not UTF-8 text") from error
