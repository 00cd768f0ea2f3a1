"""ActivityNet Captions, paragraph retrieval: all sentences of a video, as one text, find it.

Files: `captions.zip` of the ActivityNet Captions project holds `train.json`, `val_1.json` and
`val_2.json` (the second annotator's sentences for most of the same videos), each
`{"v_uqiMw7tQ1Cc": {"duration": 55.15, "timestamps": [[0.28, 55.15], ...], "sentences": ["...",
...]}, ...}`. Videos are called `v_uqiMw7tQ1Cc.mp4` (or .mkv); files without `v_` are found too.

Splits:

- `val_1` (the one that papers report): 4,917 videos, one paragraph each: 4,917 queries. Papers call
  it val or test.
- `val_2`: `val_2.json`. Its official count is not known for certain (4,885 is the usual one), so
  as many are expected as the file lists.
- the path of an id list, with or without `v_`, over `val_1.json`.

A paragraph is the sentences in the order of the file, without white space around them, joined by a
space; the video is taken whole.

Traps: the 4,926 validation videos of ActivityNet's action recognition are not these 4,917. Many
videos have left YouTube: results on what is left are not results on val_1. Paragraphs are long;
an encoder that reads 32 or 77 tokens sees the beginning of many.
"""

import re
from pathlib import Path

from fluxclip.evaluation.protocols import RetrievalTask
from fluxclip.evaluation.protocols._files import (
    annotation_file,
    captions_by_video,
    find_videos,
    listed_ids,
    load_json,
    require_known,
    retrieval_task,
    wrong_file,
)

_HOLDS = 'with {"v_<YouTube id>": {"timestamps": [...], "sentences": [...]}, ...}'
_NUM_VIDEOS = {"val_1": 4917, "val_2": None}  # None: what the file lists
# by length, because a YouTube id may itself begin with "v_"
_ID = re.compile(r"(?:v_)?([A-Za-z0-9_-]{11})")


def read(
    annotations: str | Path, *, videos: Path | None = None, split: str = "val_1"
) -> RetrievalTask:
    """The videos of a split, each with its paragraph as the query.

    annotations: the folder that holds the JSON files, or the file that the split needs. videos: the
    folder of the video files. split: "val_1", "val_2" or the path of an id list. Raises
    FileNotFoundError and ValueError that say which file is wanted, which ids are not known, which
    video has no sentence or two files.
    """
    listed = listed_ids(split, list(_NUM_VIDEOS))
    name = f"{split if listed is None else 'val_1'}.json"
    path = annotation_file(Path(annotations), name, holds=_HOLDS)
    wanted = f"{name}, {_HOLDS}"
    content = load_json(path, wanted)
    try:
        pairs = [(_known_id(video, path), entry["sentences"]) for video, entry in content.items()]
    except (AttributeError, KeyError, TypeError) as error:
        raise wrong_file(path, "has another form", wanted) from error
    if not pairs:
        raise wrong_file(path, "names no video", wanted)
    captions_of = captions_by_video(pairs, path)
    if listed is not None:
        ids = dict.fromkeys(_known_id(video, Path(split)) for video in listed)
        require_known(ids, captions_of, where=split, of=path)
        captions_of = {video: captions_of[video] for video in ids}
    return retrieval_task(
        f"ActivityNet Captions {Path(split).stem}",
        captions_of,
        find_videos(videos, captions_of, key=_official_id),
        captions="joined",
        num_expected=_NUM_VIDEOS.get(split) or len(captions_of),
        num_texts_expected=_NUM_VIDEOS.get(split),
        sources=[path] if listed is None else [path, Path(split)],
        choices={"split": split},
    )


def _official_id(name: str) -> str | None:
    """`v_<YouTube id>` of a name with or without `v_`; None if it is neither."""
    match = _ID.fullmatch(name)
    return f"v_{match[1]}" if match else None


def _known_id(name: str, path: Path) -> str:
    """The same; ValueError, which names the file that it is from, if it is neither."""
    official = _official_id(name)
    if official is None:
        raise ValueError(f"{path}: {name!r:.80} is no v_ and YouTube id of 11 characters")
    return official
