"""Which queries and which gallery an annotation file becomes."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from fluxclip.evaluation.protocols.annotations import read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two videos: one with three captions over two records, one with a single string."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    items = [
        {"video": "a.mp4", "caption": ["A one.", " A two. "]},
        {"video": "b.mp4", "caption": "B."},
        {"video": "./a.mp4", "caption": "A three."},
    ]
    (tmp_path / "pair.json").write_text(json.dumps(items))
    return tmp_path / "pair.json"


def test_one_file_in_two_spellings_is_one_video(path: Path) -> None:
    (path.parent / "folder").mkdir()
    spellings = ("a.mp4", "b.mp4", "folder/../a.mp4", str(path.parent / "b.mp4"))
    path.write_text(json.dumps([{"video": name, "caption": name} for name in spellings]))
    task = read(path, captions="all")
    assert task.videos == [path.parent / "a.mp4", path.parent / "b.mp4"]
    assert task.texts == [spellings[i] for i in (0, 2, 1, 3)]


@pytest.mark.parametrize(
    ("captions", "texts", "video_of_text_M"),
    [
        ("first", ["A one.", "B."], [0, 1]),
        ("all", ["A one.", " A two. ", "A three.", "B."], [0, 0, 0, 1]),
        ("joined", ["A one. A two. A three.", "B."], [0, 1]),
    ],
)
def test_choice_of_captions(
    path: Path,
    captions: Literal["first", "all", "joined"],
    texts: list[str],
    video_of_text_M: list[int],
) -> None:
    task = read(path, captions=captions)
    assert (task.name, task.captions, task.source) == ("pair", captions, path)
    assert task.videos == [path.parent / "a.mp4", path.parent / "b.mp4"]
    assert task.texts == texts
    np.testing.assert_array_equal(task.video_of_text_M, video_of_text_M)


def test_emoji_protocol_is_the_name_against_150_clips(emoji: Path) -> None:
    task = read(emoji / "test.json")
    assert len(task.videos) == len(task.texts) == 150
    assert task.texts[:2] == ["rainbow", "new moon face"]
    assert repr(task) == "RetrievalTask('test', 150 videos, 150 texts, captions='first')"


def test_unknown_choice_names_the_known(path: Path) -> None:
    with pytest.raises(ValueError, match="'paragraph'; known: first, all, joined"):
        read(path, captions="paragraph")  # type: ignore[arg-type]
