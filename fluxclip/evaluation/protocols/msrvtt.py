"""MSR-VTT: a caption finds its video among 1,000 (1k-A) or 2,990 (full).

Files; most papers have the first two from `msrvtt_data.zip` on CLIP4Clip's release page:

- `MSRVTT_JSFUSION_test.csv`: header `key,vid_key,video_id,sentence`, 1,000 rows such as
  `ret0,msr9770,video9770,a person is connecting something to system`. Copies with semicolons or
  tabs circulate and are read too.
- `MSRVTT_data.json`: `{"videos": [{"video_id": "video0", "split": "train", ...}, ...],
  "sentences": [{"video_id": "video0", "caption": "...", "sen_id": 0}, ...]}`; 10,000 videos, 20
  captions each; 6,513 train, 497 validate, 2,990 test. The data set's own
  `test_videodatainfo.json` has the same form with the test videos alone: name it as the file.
- videos: `video9770.mp4`, ...

Splits:

- `1k-A` (Yu et al., JSFusion; the one that papers report): 1,000 videos, one sentence each: 1,000
  queries.
- `full`: the 2,990 test videos, every caption a query: 59,800 queries.
- the path of an id list, a `video<n>` on each line: its videos with all captions of
  `MSRVTT_data.json`, 20 queries a video.

Traps: "1k-B" (Miech et al.) is another 1,000 videos. An id list of the 1k-A videos is another task
than 1k-A, because each video then has 20 captions instead of one. Some sentences of 1k-A are equal
for different videos; by the protocol only one video is right for each.
"""

from pathlib import Path

from fluxclip.evaluation.protocols import RetrievalTask
from fluxclip.evaluation.protocols._files import (
    annotation_file,
    captions_by_video,
    find_videos,
    listed_ids,
    load_csv,
    load_json,
    require_known,
    retrieval_task,
    wrong_file,
)

_CSV = "MSRVTT_JSFUSION_test.csv"
_JSON = "MSRVTT_data.json"
_HOLDS = {
    _CSV: "with the columns key, vid_key, video_id and sentence",
    _JSON: 'with {"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}',
}
_NUM_VIDEOS = {"1k-A": 1000, "full": 2990}
_NUM_TEXTS = {"1k-A": 1000, "full": 59_800}


def read(
    annotations: str | Path, *, videos: Path | None = None, split: str = "1k-A"
) -> RetrievalTask:
    """The videos of a split and each of their captions as a query.

    annotations: the folder that holds the files, or the file that the split needs. videos: the
    folder of the video files. split: "1k-A", "full" or the path of an id list. Raises
    FileNotFoundError and ValueError that say which file is wanted, which ids are not known, which
    video has no caption or two files.
    """
    ids = listed_ids(split, list(_NUM_VIDEOS))
    name = _CSV if split == "1k-A" else _JSON
    path = annotation_file(Path(annotations), name, holds=_HOLDS[name])
    captions_of = _sentences(path) if split == "1k-A" else _captions(path, ids, split)
    return retrieval_task(
        f"MSR-VTT {Path(split).stem}",
        captions_of,
        find_videos(videos, captions_of),
        captions="all",
        num_expected=_NUM_VIDEOS[split] if ids is None else len(ids),
        num_texts_expected=_NUM_TEXTS.get(split),
        sources=[path] if ids is None else [path, Path(split)],
        choices={"split": split},
    )


def _sentences(path: Path) -> dict[str, list[str]]:
    """id -> sentences of the csv."""
    wanted = f"{_CSV}, {_HOLDS[_CSV]}"
    rows = load_csv(path, ["video_id", "sentence"], wanted)
    if not rows:
        raise wrong_file(path, "has no row", wanted)
    return captions_by_video(((row["video_id"], [row["sentence"]]) for row in rows), path)


def _captions(path: Path, ids: list[str] | None, split: str) -> dict[str, list[str]]:
    """id -> captions of the videos `ids`, or of the test split, of the JSON file."""
    wanted = f"{_JSON}, {_HOLDS[_JSON]}"
    content = load_json(path, wanted)
    try:
        split_of = {video["video_id"]: video["split"] for video in content["videos"]}
        sentences = [(entry["video_id"], entry["caption"]) for entry in content["sentences"]]
    except (KeyError, TypeError) as error:
        raise wrong_file(path, "has another form", wanted) from error
    if ids is None:
        ids = [video for video, its_split in split_of.items() if its_split == "test"]
    if not ids:
        raise wrong_file(path, 'has no video whose "split" is "test"', wanted)
    require_known(ids, split_of, where=split, of=path)
    chosen = set(ids)
    pairs: list[tuple[str, list[str]]] = [(video, []) for video in ids]  # one without any is seen
    pairs += [(video, [caption]) for video, caption in sentences if video in chosen]
    return captions_by_video(pairs, path)
