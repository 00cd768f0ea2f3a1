"""Kinetics-400 validation clips, sorted into 400 human actions by the actions' names.

File: `validate.csv` of DeepMind's kinetics400.tar.gz, `val.csv` of the CVDF copy or
`kinetics_val.csv` of 2017: columns `label,youtube_id,time_start,time_end,split` and perhaps more,
rows such as `javelin throw,--07WQ2iBlw,1,11,validate`. Clips are called
`--07WQ2iBlw_000001_000011.mp4`, seconds with six digits, in one folder or one for each class; files
with unpadded seconds are found too.

Expected: the 19,906 clips that CVDF's file lists. Few have all of them: CVDF's frozen copy holds
19,881 files, and DeepMind's csv of today leaves out clips that have left YouTube. Published results
are on what each team had, between 19,700 and 19,900 mostly, and seldom say so.

Traps: a csv that was through a spreadsheet loses ids that begin with "-" or "=". Kinetics-600 and
-700 have the same form and other classes: they are refused by the number of classes.
"""

from pathlib import Path

from fluxclip.evaluation.protocols import ClassificationTask
from fluxclip.evaluation.protocols._files import (
    annotation_file,
    classification_task,
    find_videos,
    load_csv,
    wrong_file,
    youtube_clip,
)

_FILES = ("validate.csv", "val.csv", "kinetics_val.csv")
_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
_HOLDS = f"with the columns {', '.join(_COLUMNS)}"
_SPLIT = ("val", "validate")  # CVDF and DeepMind
_NUM_CLASSES = 400
_NUM_VIDEOS = 19_906


def read(annotations: str | Path, *, videos: Path | None = None) -> ClassificationTask:
    """The validation clips and their classes, in alphabetical order as the file spells them.

    annotations: the csv file, or the folder that holds it. videos: the folder of the clips. Raises
    FileNotFoundError and ValueError that say which file is wanted, which row is no clip, which clip
    has two labels or two files.
    """
    path = annotation_file(Path(annotations), *_FILES, holds=_HOLDS)
    wanted = f"{' or '.join(_FILES)}, {_HOLDS}"
    rows = [row for row in load_csv(path, _COLUMNS, wanted) if row["split"].strip() in _SPLIT]
    if not rows:
        raise wrong_file(path, f"has no row whose split is {' or '.join(_SPLIT)}", wanted)
    label_of: dict[str, str] = {}
    for row in rows:
        name = "_".join(row[column].strip() for column in ("youtube_id", "time_start", "time_end"))
        video, label = youtube_clip(name), row["label"].strip()
        if video is None or not label:
            raise ValueError(
                f"{path}: a row with label {label!r} and clip {name!r} is no class and clip, "
                "<YouTube id of 11 characters>_<start>_<end> in whole seconds"
            )
        if label_of.setdefault(video, label) != label:
            raise ValueError(f"{path}: clip {video} has two labels, {label_of[video]} and {label}")
    classes = sorted(set(label_of.values()))
    if len(classes) > _NUM_CLASSES:
        raise wrong_file(path, f"has {len(classes)} classes, not {_NUM_CLASSES}", wanted)
    return classification_task(
        "Kinetics-400 val",
        {video: classes.index(label) for video, label in label_of.items()},
        find_videos(videos, label_of, key=youtube_clip),
        classes=classes,
        num_expected=_NUM_VIDEOS,
        sources=[path],
        choices={},
    )
