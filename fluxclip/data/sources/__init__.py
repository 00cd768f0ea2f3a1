"""Data sources: one file each reads pairs of a video and its captions.

Such a file has `read(path, *, check_files=True) -> Records`: what is wrong with the pairs, and with
`check_files` with the files that they name, is found there, before any step is spent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from fluxclip import plugins
from fluxclip.video import Clip, VideoInfo, is_image, probe, read_clip


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

    Pickled for each worker that decodes, so it should be small then. Slices are tuples.
    """

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
