"""Annotation files: what is read, and one clear line for everything that cannot be."""

import json
from pathlib import Path

import pytest

from fluxclip.data.sources import Record
from fluxclip.data.sources.annotations import read


def write(folder: Path, content: object) -> Path:
    """An annotation file with this content (a string is written as it is), and a video a.mp4."""
    (folder / "a.mp4").touch()
    path = folder / "set.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_emoji_test_split(emoji: Path) -> None:
    records = read(emoji / "test.json")
    assert len(records) == 150
    assert records[0].video == emoji / "clips" / "1f308.mp4"
    assert records[0].captions[0] == "rainbow"
    assert len(records[0].captions) == 2
    assert records[0].family == "1f308"


def test_stills_are_records_too(emoji: Path) -> None:
    assert {record.video.suffix for record in read(emoji / "stills.json")} == {".webp"}


def test_one_caption_or_several_and_paths_from_the_folder_of_the_file(
    emoji: Path, tmp_path: Path
) -> None:
    items = [
        {"video": "a.mp4", "caption": "one"},
        {"video": str(emoji / "clips" / "1f308.mp4"), "caption": ["two", "zwölf"], "extra": 1},
    ]
    assert list(read(write(tmp_path, items))) == [
        Record(tmp_path / "a.mp4", ("one",), None),
        Record(emoji / "clips" / "1f308.mp4", ("two", "zwölf"), None),
    ]


def test_paths_count_from_a_folder_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path, [{"video": "b.mp4", "caption": "x"}])
    clips = tmp_path / "clips"
    clips.mkdir()
    with pytest.raises(FileNotFoundError, match=f"1 of 1 .* count from {clips}/"):
        read(path, folder=clips)
    (clips / "b.mp4").touch()
    assert list(read(path, folder=clips)) == [Record(clips / "b.mp4", ("x",), None)]


def test_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + json.dumps([{"video": "a.mp4", "caption": "one"}]))
    assert len(read(path)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"video": "a.mp4",\n "caption" "x"}]', "not JSON: line 2, column 12"),
        ("", "not JSON: line 1"),
        ("[" * 100_000, "nested too deeply"),
        ({"video": "a.mp4", "caption": "x"}, "holds a JSON object; expected a list"),
        ("3", "holds a JSON number"),
        ("[]", "is an empty list"),
        (["a.mp4"], "record 1 of 1 in .* is a string"),
        ([{"video": "a.mp4", "caption": "x"}, {"caption": "x"}], "record 2 of 2 .*no 'video'"),
        ([{"video": "a.mp4", "text": "x"}], "record 1 of 1 .*no 'caption'; it has: video, text"),
        ([{"video": "", "caption": "x"}], "'video' must be a path, got \"\""),
        ([{"video": 3, "caption": "x"}], "'video' must be a path, got 3"),
        ([{"video": "a.mp4", "caption": None}], "a caption must be a text, got null"),
        ([{"video": "a.mp4", "caption": ["x", 7]}], "a caption must be a text, got 7"),
        ([{"video": "a.mp4", "caption": " "}], "a caption must be a text, got"),
        ([{"video": "a.mp4", "caption": []}], "'caption' is an empty list"),
        ([{"video": "a.mp4", "caption": "x", "family": 3}], "'family' must be a string, got 3"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(write(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "set.json") in str(caught.value)


def test_not_text(emoji: Path) -> None:
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read(emoji / "clips" / "1f308.mp4")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.json: not found"):
        read(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="is a folder; expected a JSON, "):
        read(tmp_path)


def test_missing_videos_are_counted_and_the_first_named(tmp_path: Path) -> None:
    items = [{"video": f"{name}.mp4", "caption": "x"} for name in "abcdef"]
    path = write(tmp_path, items)
    with pytest.raises(FileNotFoundError) as caught:
        read(path)
    message = str(caught.value)
    assert "5 of 6 video files not found" in message
    assert "b.mp4" in message and "d.mp4" in message and "e.mp4" not in message
    assert "\n" not in message
    assert len(read(path, check_files=False)) == 6
