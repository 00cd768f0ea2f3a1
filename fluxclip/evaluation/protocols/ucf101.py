"""UCF101 test clips, sorted into 101 human actions by the actions' names.

Files: `UCF101TrainTestSplits-RecognitionTask.zip` of the data set's page, unpacked, is a folder
with `classInd.txt` (a class on each line, `1 ApplyEyeMakeup`) and `testlist01.txt`,
`testlist02.txt` and `testlist03.txt` (a clip on each line,
`ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi`). Clips may be in a folder for each class or in one,
and in another container than .avi.

Expected: 3,783, 3,734 and 3,696 clips in the splits 1, 2 and 3. Papers report split 1 or the mean
over the three, seldom saying which.

Traps: class names become words at their capitals, "ApplyEyeMakeup" is "apply eye makeup". One class
is spelled HandstandPushups in one place and HandStandPushups in another, so case is ignored where
names are compared.
"""

import re
from pathlib import Path, PurePosixPath

from fluxclip.evaluation.protocols import ClassificationTask
from fluxclip.evaluation.protocols._files import (
    annotation_file,
    classification_task,
    find_videos,
    read_lines,
    wrong_file,
)

_CLASSES = 'classInd.txt, with lines such as "1 ApplyEyeMakeup"'
_CLIPS = 'with lines such as "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"'
_NUM_VIDEOS = {"1": 3783, "2": 3734, "3": 3696}


def read(
    annotations: str | Path, *, videos: Path | None = None, split: str = "1"
) -> ClassificationTask:
    """The test clips of a split and all classes, in the order of `classInd.txt`.

    annotations: the folder that holds the lists. videos: the folder of the clips. split: "1", "2"
    or "3". Raises FileNotFoundError and ValueError that say which file is wanted, which line is no
    class or clip, which clip has two files.
    """
    if split not in _NUM_VIDEOS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(_NUM_VIDEOS)}")
    folder = Path(annotations)
    name = f"testlist0{split}.txt"
    if folder.is_file():
        raise wrong_file(folder, "is a file", f"the folder that holds classInd.txt and {name}")
    class_file = annotation_file(folder, "classInd.txt", holds=_CLASSES.partition(", ")[2])
    clip_file = annotation_file(folder, name, holds=_CLIPS)
    names = _class_names(class_file)
    index_of = {class_name.lower(): index for index, class_name in enumerate(names)}
    class_of: dict[str, int] = {}
    for line in read_lines(clip_file, f"{name}, {_CLIPS}"):
        clip = PurePosixPath(line)
        if len(clip.parts) != 2 or " " in line:
            raise wrong_file(clip_file, f"has the line {line!r:.80}", f"{name}, {_CLIPS}")
        if clip.parts[0].lower() not in index_of:
            raise ValueError(f"{clip_file}: class {clip.parts[0]} is not in {class_file}")
        class_of[clip.stem] = index_of[clip.parts[0].lower()]
    return classification_task(
        f"UCF101 split {split}",
        class_of,
        find_videos(videos, class_of, key=str.lower),
        classes=[re.sub(r"(?<=[a-z])(?=[A-Z])", " ", each).lower() for each in names],
        num_expected=_NUM_VIDEOS[split],
        sources=[class_file, clip_file],
        choices={"split": split},
    )


def _class_names(path: Path) -> list[str]:
    """Names of the classes, in the order of the file."""
    names = []
    for line in read_lines(path, _CLASSES):
        match = re.fullmatch(r"[0-9]+\s+([A-Za-z]+)", line)
        if not match:
            raise wrong_file(path, f"has the line {line!r:.80}", _CLASSES)
        names.append(match[1])
    return names
