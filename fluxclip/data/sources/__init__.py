"""Data sources: one file each reads pairs of a video and its captions.

Such a file has `read(path, *, check_files=True) -> Records`: what is wrong with the pairs, and with
`check_files` with the files that they name, is found there, before any step is spent. It may have
`files(path) -> list[Path]`: the files here that `path` stands for, there or not; without it, a name
that is no address (http://...) is taken for a path, and what follows a "?" for settings.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload
from urllib.parse import unquote

import numpy as np

from fluxclip import plugins
from fluxclip.data.order import Groups
from fluxclip.video import Clip, VideoError, VideoInfo, is_image, is_there, probe, read_clip
from fluxclip.video.chunks import OtherFormat

_WHOLE = 2**28  # bytes of a file that are looked at for its fingerprint: all up to so many,
_PIECES, _PIECE = 64, 2**20  # else so many pieces of so many bytes


@dataclass(frozen=True)
class Record:
    """A video or image file, its captions (at least one, none of them empty) and its family.

    Records of one family are variants of the same thing and belong on one side of a split;
    `family` is None where the file gives none.
    """

    video: Path
    captions: tuple[str, ...]
    family: str | None

    @property
    def is_still(self) -> bool:
        """Whether the file is a picture, by its name."""
        return is_image(self.video)


class Records(Sequence[Record]):
    """Pairs by number, and their clips: here of files, which other sources need not have.

    Pickled for each worker that decodes, so it should be small then. Slices are tuples. groups:
    pairs that are best used together, where there are such.
    """

    groups: Groups | None = None

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...
    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._records[index]

    def fetch(self, index: int) -> None:
        """Bring a pair's file near if it is far away, however long it takes.

        Raises what ends a run: that a file cannot be got now is no fault of that file.
        """

    def expect(self, index: int) -> None:
        """Begin to bring a pair's file near, without waiting and without raising."""

    def is_there(self, index: int) -> bool:
        """Whether the file of a pair exists, as a look into its folder tells.

        Raises VideoError for a folder of chunks that is not sound.
        """
        return is_there(self[index].video)

    def file(self, index: int) -> Path:
        """The file that a pair's video is read from: itself, or what holds many of them."""
        return self[index].video

    def info(self, index: int) -> VideoInfo:
        """Duration and size of a pair's video; VideoError or OSError if it cannot be read."""
        return probe(self[index].video)

    def clip(self, index: int, **wanted: Any) -> Clip:
        """Frames of a pair's video; `wanted` and errors are those of `read_clip`."""
        return read_clip(self[index].video, **wanted)


def read(kind: str, path: str | Path, *, check_files: bool = True) -> Records:
    """The pairs that `path` stands for in the file `kind` of this folder, or a dotted name."""
    module = plugins.load("fluxclip.data.sources", kind)
    records: Records = module.read(path, check_files=check_files)
    return records


def files(kind: str, name: str) -> list[Path]:
    """The files on this machine that a source's name stands for, there or not."""
    module = plugins.load("fluxclip.data.sources", kind)
    if hasattr(module, "files"):
        found: list[Path] = module.files(name)
        return found
    return [] if "://" in name else [Path(name.partition("?")[0])]


def fingerprint_of(kind: str, name: str) -> str:
    """What tells the data that a name stands for from others: a hash; the name if that is no file.

    A source may have its own `identity(name) -> str`, where hashing its files takes too long or
    does not tell all.
    """
    module = plugins.load("fluxclip.data.sources", kind)
    if hasattr(module, "identity"):
        own: str = module.identity(name)
        return own
    return " ".join(map(fingerprint_of_file, files(kind, name))) or name


def located(kind: str, name: str, *, folder: Path) -> str:
    """A source's name that holds in any folder: if it is a path, it counts from `folder`."""
    if not files(kind, name):
        return name
    path, mark, settings = name.partition("?")
    return f"{(folder / path).resolve()}{mark}{settings}"


def shown(name: str) -> str:
    """A source's name as people are told it, the end of what is before its "?".

    What follows there may be a secret that an address is signed with.
    """
    return Path(name.partition("?")[0]).name


def looked_at(size: int) -> range:
    """Which of `size` records stand for all: all up to 100,000, else about 10,000 of them."""
    return range(0, size, 1 if size <= 100_000 else size // 10_000)


class MissingFiles(FileNotFoundError):
    """Files of records are not there. share: of those that were looked for, above 0, up to 1."""

    def __init__(self, message: str, share: float = 1.0) -> None:
        super().__init__(message)
        self.share = share


def missing(records: Records) -> list[Path]:
    """Files of records that are not there, each once; of the records that are looked at.

    Of a folder of chunks that is not whole it is the file in it that is at fault. Raises
    VideoError for one that another version wrote, as then all may be.
    """
    gone: list[Path] = []
    for i in looked_at(len(records)):
        try:
            if not records.is_there(i):
                gone.append(records.file(i))
        except OtherFormat:
            raise
        except VideoError as error:
            gone.append(error.path)
    return list(dict.fromkeys(gone))


def split_settings(name: str, *, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A source's name without what follows its "?", and that (key=value&key=value) by key.

    A value may have its & written as %26. ValueError for anything else there, and for a key that is
    not among the known.
    """
    plain, _, text = name.partition("?")
    given: dict[str, str] = {}
    for pair in text.split("&") if text else []:
        key, equals, value = pair.partition("=")
        if not equals or not value:
            raise ValueError(f"{name}: what follows the ? is key=value&key=value, got {pair!r}")
        if key not in known:
            raise ValueError(f"{name}: unknown setting {key!r}; known: {', '.join(known)}")
        given[key] = unquote(value)
    return plain, given


def fingerprint_of_file(path: Path) -> str:
    """A hash of a file's content, in hex; empty for one that is not there.

    SHA-256 of all of it, or above 256 MiB, which would take a while at every start of every
    process, of its size and of 64 MiB spread over it.
    """
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        size = path.stat().st_size
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        for start in np.linspace(0, size - _PIECE, _PIECES, dtype=np.int64):
            file.seek(int(start))
            found.update(file.read(_PIECE))
    return found.hexdigest()


def cache_folder() -> Path:
    """Where sources keep what they prepare: FLUXCLIP_CACHE, or fluxclip/ in the user's cache."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FLUXCLIP_CACHE") or f"{users}/fluxclip").expanduser()
