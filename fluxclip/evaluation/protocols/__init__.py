"""Protocols: one file each turns a data set into queries, a gallery and what matches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Captions = Literal["first", "all", "joined"]


@dataclass(frozen=True)
class RetrievalTask:
    """Videos to search, texts to search with, and which video each text belongs to.

    `video_of_text_M` is int64 of shape (num_texts,) and indexes `videos`; every video has at least
    one text and no file occurs twice, because a second copy would count as a wrong answer.
    `source` is the file the task was read from, `captions` how its captions became texts.
    """

    name: str
    videos: list[Path]
    texts: list[str]
    video_of_text_M: npt.NDArray[np.int64]
    source: Path
    captions: Captions

    def __post_init__(self) -> None:
        assert self.video_of_text_M.shape == (len(self.texts),), self
        assert np.array_equal(np.unique(self.video_of_text_M), np.arange(len(self.videos))), self
        assert len(set(self.videos)) == len(self.videos), self

    def __repr__(self) -> str:
        return (
            f"RetrievalTask({self.name!r}, {len(self.videos)} videos, {len(self.texts)} texts, "
            f"captions={self.captions!r})"
        )
