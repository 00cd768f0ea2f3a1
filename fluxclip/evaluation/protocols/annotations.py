"""A retrieval task from one JSON file, `[{"video": path, "caption": str | [str, ...]}]`.

The form of UMT, VindLU and InternVideo2 (`msrvtt_ret_test1k.json`, `anet_ret_val_1.json`, ...); the
annotations of FluxCLIP's own training are the same. It expects as many videos as the file names.
What those projects call `is_paragraph_retrieval` is `captions="joined"`.
"""

import os
from pathlib import Path
from typing import get_args

from fluxclip.data.sources import annotations as source
from fluxclip.evaluation.protocols import Captions, RetrievalTask
from fluxclip.evaluation.protocols._files import retrieval_task
from fluxclip.video import is_there


def read(
    annotations: str | Path, *, videos: Path | None = None, captions: Captions = "first"
) -> RetrievalTask:
    """The videos and texts of an annotation file; relative paths count from `videos`, or from it.

    `captions` says what a query is: "first" the first caption of each video, "all" each caption
    on its own (MSVD, VATEX), "joined" all captions of a video joined with a space (paragraph
    retrieval: DiDeMo, ActivityNet). The three give numbers that cannot be compared. Records that
    name the same file, in whatever spelling, are one video with the captions of all of
    them. Raises FileNotFoundError and ValueError as `fluxclip.data.sources.annotations.read`.
    """
    if captions not in get_args(Captions):
        known = ", ".join(get_args(Captions))
        raise ValueError(f"unknown choice of captions {captions!r}; known: {known}")
    path = Path(annotations)
    folder = videos or path.parent
    files: dict[str, Path] = {}
    captions_of: dict[str, list[str]] = {}
    for record in source.read(path, check_files=False, folder=folder):
        video = os.path.relpath(record.video, folder)  # one name for all spellings of a path
        files.setdefault(video, record.video)
        captions_of.setdefault(video, []).extend(record.captions)
    return retrieval_task(
        path.stem,
        captions_of,
        {video: file for video, file in files.items() if is_there(file)},
        captions=captions,
        num_expected=len(captions_of),
        sources=source.files(str(path)),
        choices={},
    )
