"""Cuts are found at the presentation time of the first frame of a shot, in every kind of file."""

import builtins
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_files import write_video

from fluxclip.video import chunk_writer, read_clip
from fluxclip.video import reader as reader_module
from fluxclip.video.chunks import Settings
from fluxclip.video.reader import read_on
from fluxclip.video.shots import cut_times_s

COLOURS = [(200, 40, 40), (40, 160, 60), (50, 60, 210), (230, 220, 60)]


def moving_shots(lengths: Sequence[int], *, width: int = 96, height: int = 64) -> list[np.ndarray]:
    """Pictures of shots of so many frames: a bright box that moves over a ground of one colour."""
    pictures = []
    for shot, num_frames in enumerate(lengths):
        for i in range(num_frames):
            picture = np.full((height, width, 3), COLOURS[shot % 4], np.uint8)
            left = (7 * shot + 2 * i) % (width - 16)
            picture[20:36, left : left + 16] = 255
            pictures.append(picture)
    return pictures


def test_cuts_are_the_times_of_first_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_shots([30, 40, 25, 30]))
    assert cut_times_s(path) == pytest.approx([30 / 25, 70 / 25, 95 / 25], abs=1e-9)


def test_times_are_those_at_which_frames_are_shown_not_their_numbers(tmp_path: Path) -> None:
    pictures = moving_shots([20, 20, 20])
    times_s = np.cumsum([0.0] + [0.04 if i < 20 else 0.1 if i < 40 else 0.05 for i in range(59)])
    path = write_video(tmp_path / "uneven.mkv", pictures, times_s=times_s.round(3))
    assert cut_times_s(path) == pytest.approx(times_s[[20, 40]], abs=2e-3)


def test_the_times_of_a_long_video_are_not_made_at_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", moving_shots([3]), times_s=[0.0, 0.04, 3e6])
    tracemalloc.start()
    try:
        clip = next(read_on(path, step_s=1 / 30, side=16))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert clip.times_s.tolist() == pytest.approx([0.0, 0.04])


def test_a_video_on_its_side_has_the_same_cuts(tmp_path: Path) -> None:
    pictures = moving_shots([30, 40, 25])
    upright = write_video(tmp_path / "upright.mp4", pictures)
    turned = write_video(tmp_path / "turned.mp4", pictures, rotation=90)
    assert cut_times_s(turned) == cut_times_s(upright) != []


def test_faster_videos_are_cut_to_a_thirtieth_of_a_second(tmp_path: Path) -> None:
    pictures = moving_shots([61, 60])
    path = write_video(tmp_path / "fast.mkv", pictures, times_s=[i / 60 for i in range(121)])
    [cut_s] = cut_times_s(path)
    assert 61 / 60 - 1e-3 <= cut_s <= 61 / 60 + 1 / 30 + 1e-3


def test_a_folder_of_chunks_has_the_cuts_of_its_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_shots([30, 45, 25]))
    folder = tmp_path / "a.chunks"
    chunk_writer.write([(path, folder)], settings=Settings(seconds=1, side=64))
    assert cut_times_s(folder) == cut_times_s(path) == pytest.approx([1.2, 3.0])


def test_a_film_has_about_as_many_cuts_as_its_note_says(assets: Path) -> None:
    assert 6 <= len(cut_times_s(assets / "film" / "film_720p.mp4")) <= 10  # "about 8"


def test_one_shot_and_a_still_have_no_cuts(tmp_path: Path, emoji: Path) -> None:
    assert cut_times_s(write_video(tmp_path / "one.mp4", moving_shots([50]))) == []
    assert cut_times_s(next((emoji / "stills").iterdir())) == []


def test_reading_on_gives_each_frame_once_and_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "FRAMES_AT_ONCE", 8)
    path = write_video(tmp_path / "a.mp4", moving_shots([30, 20]))
    clips = list(read_on(path, step_s=1 / 50, side=32))
    assert max(len(clip.times_s) for clip in clips) <= 8
    times_s = np.concatenate([clip.times_s for clip in clips])
    frames_THWC = np.concatenate([clip.frames_THWC for clip in clips])
    whole = read_clip(path, times_s=[i / 25 for i in range(50)], side=32, fit="squash")
    assert np.array_equal(times_s, whole.times_s)
    assert np.array_equal(frames_THWC, whole.frames_THWC)


def test_without_pyscenedetect_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "scenedetect":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'fluxclip\[shots\]'"):
        cut_times_s(tmp_path / "any.mp4")


def test_nothing_loads_it_before_shots_are_wanted() -> None:
    code = (
        "import sys, fluxclip.video, retrieval.ingest\n"
        "print(sorted({'scenedetect', 'cv2', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
