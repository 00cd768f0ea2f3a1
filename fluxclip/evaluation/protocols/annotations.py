"""A retrieval task from an annotation file, `[{"video": path, "caption": str | [str, ...]}]`."""

import os
from pathlib import Path
from typing import get_args

import numpy as np

from fluxclip.data.sources import annotations
from fluxclip.evaluation.protocols import Captions, RetrievalTask


def read(path: str | Path, *, captions: Captions = "first") -> RetrievalTask:
    """The videos and texts of an annotation file.

    `captions` says what a query is: "first" the first caption of each video, "all" each caption
    on its own (MSVD, VATEX), "joined" all captions of a video joined with a space (paragraph
    retrieval: DiDeMo, ActivityNet). The three give numbers that cannot be compared. Records that
    name the same file, in whatever spelling, are one video with the captions of all of
    them. Raises FileNotFoundError and ValueError as `fluxclip.data.sources.annotations.read`.
    """
    if captions not in get_args(Captions):
        known = ", ".join(get_args(Captions))
        raise ValueError(f"unknown choice of captions {captions!r}; known: {known}")
    first_spelling: dict[str, Path] = {}
    captions_of: dict[Path, list[str]] = {}
    for record in annotations.read(path):
        video = first_spelling.setdefault(os.path.abspath(record.video), record.video)
        captions_of.setdefault(video, []).extend(record.captions)
    texts: list[str] = []
    video_of_text_M: list[int] = []
    for index, own in enumerate(captions_of.values()):
        queries = {
            "first": own[:1],
            "all": own,
            "joined": [" ".join(text.strip() for text in own)],
        }[captions]
        texts += queries
        video_of_text_M += [index] * len(queries)
    return RetrievalTask(
        name=Path(path).stem,
        videos=list(captions_of),
        texts=texts,
        video_of_text_M=np.array(video_of_text_M, dtype=np.int64),
        source=Path(path),
        captions=captions,
    )
