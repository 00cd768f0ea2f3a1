"""Which queries and which gallery an annotation file becomes."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from fluxclip.evaluation import protocols
from fluxclip.evaluation.protocols import RetrievalTask
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
    assert (task.protocol, task.captions, task.sources) == ("pair", captions, [path])
    assert task.videos == [path.parent / "a.mp4", path.parent / "b.mp4"]
    assert task.texts == texts
    np.testing.assert_array_equal(task.video_of_text_M, video_of_text_M)


def test_emoji_protocol_is_the_name_against_150_clips(emoji: Path) -> None:
    task = read(emoji / "test.json")
    assert len(task.videos) == len(task.texts) == 150
    assert task.texts[:2] == ["rainbow", "new moon face"]
    assert (task.num_expected, task.missing, task.is_complete) == (150, [], True)


def test_unknown_choice_names_the_known(path: Path) -> None:
    with pytest.raises(ValueError, match="'paragraph'; known: first, all, joined"):
        read(path, captions="paragraph")  # type: ignore[arg-type]


def test_missing_videos_are_counted_and_those_of_another_folder_found(
    path: Path, tmp_path: Path
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    with pytest.raises(FileNotFoundError, match="none of its 2 video files was found"):
        read(path, videos=clips)
    (clips / "b.mp4").touch()
    task = read(path, videos=clips, captions="all")
    assert (task.videos, task.texts) == ([clips / "b.mp4"], ["B."])
    assert (task.missing, task.num_expected) == (["a.mp4"], 2)
    assert not task.is_complete


def test_a_protocol_is_read_by_its_name_with_its_choices(path: Path) -> None:
    task = protocols.read("annotations", path, captions="joined")
    assert isinstance(task, RetrievalTask)
    assert (task.protocol, task.captions) == ("pair", "joined")
    with pytest.raises(ValueError, match="'annotations' has no choice of split; its choices: cap"):
        protocols.read("annotations", path, split="full")
    with pytest.raises(ValueError, match="unknown protocol 'msrvt' .*did you mean 'msrvtt'"):
        protocols.read("msrvt", path)
