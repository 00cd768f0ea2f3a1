"""Protocols: one file each reads a data set's official files into queries, a gallery and matches.

`read(annotations, *, videos=None, ...)` of such a file returns a RetrievalTask or a
ClassificationTask; its keyword arguments with a default are the choices that the protocol has.
"""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from fluxclip import plugins

Captions = Literal["first", "all", "joined"]


@dataclass(frozen=True)
class Videos:
    """The videos of a task and how many there should be.

    protocol: what a result on all of them is called. videos: their files, no file twice. ids: what
    the annotations call them, unique. missing: ids of the annotations without a file. num_expected:
    how many videos the protocol has where that is known, else as many as the annotations name.
    sources: the files it was read from. choices: what was chosen among the protocol's variants,
    as in {"split": "1k-A"}.
    """

    protocol: str
    videos: list[Path]
    ids: list[str]
    missing: list[str]
    num_expected: int
    sources: list[Path]
    choices: dict[str, str]

    @property
    def is_complete(self) -> bool:
        """Whether these are precisely the videos of the protocol."""
        return not self.missing and len(self.videos) == self.num_expected


@dataclass(frozen=True)
class RetrievalTask(Videos):
    """Videos to search, texts to search with, and which video each text belongs to.

    num_texts_expected: how many texts the protocol has, None where that is not known.
    `video_of_text_M` is int64 of shape (num_texts,) and indexes `videos`; every video has at least
    one text. `captions` says how captions became texts: "first" of each video, "all" on their own,
    or "joined" with a space.
    """

    texts: list[str] = field(repr=False)
    video_of_text_M: npt.NDArray[np.int64] = field(repr=False)
    captions: Captions
    num_texts_expected: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether these are precisely the videos of the protocol, with as many texts."""
        return super().is_complete and self.num_texts_expected in (None, len(self.texts))

    def __post_init__(self) -> None:
        assert self.video_of_text_M.shape == (len(self.texts),), self.protocol
        assert np.array_equal(np.unique(self.video_of_text_M), np.arange(len(self.videos)))
        assert len(set(self.videos)) == len(self.videos) == len(set(self.ids)), self.protocol


@dataclass(frozen=True)
class ClassificationTask(Videos):
    """Videos to sort into classes by the classes' names.

    `class_of_video_N` is int64 of shape (num_videos,) and indexes `classes`.
    """

    classes: list[str] = field(repr=False)
    class_of_video_N: npt.NDArray[np.int64] = field(repr=False)

    def __post_init__(self) -> None:
        assert self.class_of_video_N.shape == (len(self.videos),), self.protocol
        assert len(set(self.videos)) == len(self.videos) == len(set(self.ids)), self.protocol


def read(
    protocol: str, annotations: str | Path, *, videos: str | Path | None = None, **choices: str
) -> RetrievalTask | ClassificationTask:
    """Read a data set by the protocol of that name, a file here or a dotted module from outside.

    annotations: its file, or the folder that holds its files. videos: the folder of the video
    files, searched with its subfolders. choices: as `read` of the protocol takes them. Raises
    ValueError or FileNotFoundError in one line that says what is wanted.
    """
    module = plugins.load("fluxclip.evaluation.protocols", protocol)
    known = [name for name in inspect.signature(module.read).parameters][2:]
    for name in choices:
        if name not in known:
            raise ValueError(
                f"protocol {protocol!r} has no choice of {name}; its choices: "
                f"{', '.join(known) or 'none'}"
            )
    task: RetrievalTask | ClassificationTask = module.read(
        Path(annotations), videos=None if videos is None else Path(videos), **choices
    )
    return task
