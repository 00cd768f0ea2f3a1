"""VATEX: each of about ten captions, English or Chinese, finds its 10-second clip.

Files, from the VATEX project's download page: `vatex_validation_v1.0.json` (3,000 clips, captions
in both languages) and `vatex_public_test_english_v1.1.json` (6,000 clips, English), each
`[{"videoID": "<YouTube id>_<start>_<end>", "enCap": [10 texts], "chCap": [10 texts]}, ...]`, start
and end in seconds with six digits. Clips are called like that, `Ptf_2VRj-V0_000122_000132.mp4`;
files with unpadded seconds, `Ptf_2VRj-V0_122_132.mp4`, are found too.

Splits; all captions of the language are queries:

- `validation`: 3,000 clips, 30,000 queries.
- `test`: the 6,000 public test clips, 60,000 queries; English only.
- the path of an id list, a videoID on each line, over the validation file. The 1,500 test clips of
  HGR (Chen et al., CVPR 2020; 15,000 queries), which most retrieval papers report, are half of the
  validation set, chosen at random: its ids are the project's `tst_names.npy`, which
  `numpy.savetxt("hgr_test.txt", names, fmt="%s")` turns into a list.

Traps: three splits are called VATEX and many papers do not say which. Clips are cuts of 10 seconds;
whole YouTube videos are another task. Many clips are gone (one team found 1,335 of the 1,500). Ids
may hold "_" and begin with "-": a name is parsed from the right.
"""

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
    youtube_clip,
)

_FILES = {
    "validation": "vatex_validation_v1.0.json",
    "test": "vatex_public_test_english_v1.1.json",
}
_NUM_VIDEOS = {"validation": 3000, "test": 6000}
_NUM_TEXTS = {"validation": 30_000, "test": 60_000}
_KEYS = {"en": "enCap", "zh": "chCap"}


def read(
    annotations: str | Path,
    *,
    videos: Path | None = None,
    split: str = "validation",
    language: str = "en",
) -> RetrievalTask:
    """The clips of a split and each of their captions in a language as a query.

    annotations: the folder that holds the JSON files, or the file that the split needs. videos: the
    folder of the clips. split: "validation", "test" or the path of an id list. language: "en" or
    "zh". Raises FileNotFoundError and ValueError that say which file is wanted, which ids are not
    known or no names of clips, which clip has no caption or two files.
    """
    if language not in _KEYS:
        raise ValueError(f"unknown language {language!r}; known: {', '.join(_KEYS)}")
    if split == "test" and language != "en":
        raise ValueError("VATEX has English captions only for its test clips: language='en'")
    listed = listed_ids(split, list(_FILES))
    name = _FILES[split if listed is None else "validation"]
    key = _KEYS[language]
    holds = f'with [{{"videoID": "<YouTube id>_<start>_<end>", "{key}": [...]}}, ...]'
    path = annotation_file(Path(annotations), name, holds=holds)
    content = load_json(path, f"{name}, {holds}")
    try:
        pairs = [(_clip(entry["videoID"], path), entry[key]) for entry in content]
    except (KeyError, TypeError) as error:
        raise wrong_file(path, "has another form", f"{name}, {holds}") from error
    if not pairs:
        raise wrong_file(path, "names no clip", f"{name}, {holds}")
    captions_of = captions_by_video(pairs, path)
    if listed is not None:
        ids = dict.fromkeys(_clip(video, Path(split)) for video in listed)
        require_known(ids, captions_of, where=split, of=path)
        captions_of = {video: captions_of[video] for video in ids}
    return retrieval_task(
        f"VATEX {Path(split).stem} {language}",
        captions_of,
        find_videos(videos, captions_of, key=youtube_clip),
        captions="all",
        num_expected=_NUM_VIDEOS.get(split) or len(captions_of),
        num_texts_expected=_NUM_TEXTS.get(split),
        sources=[path] if listed is None else [path, Path(split)],
        choices={"split": split, "language": language},
    )


def _clip(video: str, path: Path) -> str:
    """The official spelling of a videoID of `path`; ValueError if it is no such id."""
    official = youtube_clip(video)
    if official is None:
        raise ValueError(
            f"{path}: {video!r:.80} is no clip, <YouTube id of 11 characters>_<start>_<end>"
        )
    return official
