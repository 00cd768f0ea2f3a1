"""Pieces of a video: between its cuts, and as a collection's settings say."""

import math
import tracemalloc
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from video_files import write_video

from fluxclip.video import Cutting, Segment, VideoError, probe, windows
from fluxclip.video.segments import SHORTEST_SHOT_S, shots

seconds = st.floats(0.01, 500, allow_nan=False)


@given(
    duration_s=seconds,
    parts=st.lists(st.floats(0.001, 0.999), unique=True, max_size=12),
    longest_s=st.floats(1, 50),
    stride=st.floats(0.2, 1),
)
def test_shots_cover_the_video_and_reach_over_no_cut_that_was_kept(
    duration_s: float, parts: list[float], longest_s: float, stride: float
) -> None:
    cuts_s = sorted(part * duration_s for part in parts)
    pieces = shots(duration_s, cuts_s, longest_s=longest_s, stride_s=stride * longest_s)

    assert pieces[0].start_s == 0
    assert pieces[-1].end_s == duration_s
    assert all(b.start_s <= a.end_s + 1e-9 for a, b in zip(pieces, pieces[1:], strict=False))
    kept_s = [s for s in cuts_s if s in {piece.start_s for piece in pieces}]
    ends_s = [0.0, *kept_s, duration_s]
    for piece in pieces:
        assert not any(piece.start_s < cut_s < piece.end_s for cut_s in kept_s)
        assert piece.end_s - piece.start_s < 1.25 * longest_s + 1e-9
    if len(kept_s) > 0:
        assert min(b - a for a, b in zip(ends_s, ends_s[1:], strict=False)) >= SHORTEST_SHOT_S
    # what was left out made a shot that is too short
    for cut_s in set(cuts_s) - set(kept_s):
        assert min(abs(cut_s - end_s) for end_s in ends_s) < SHORTEST_SHOT_S


def test_shots_of_known_videos() -> None:
    def spans(*arguments: object, **options: float) -> list[tuple[float, float]]:
        return [(s.start_s, s.end_s) for s in shots(*arguments, **options)]  # type: ignore[arg-type]

    assert spans(9.0, [], longest_s=10.0) == [(0, 9)]
    assert spans(9.0, [2.0, 5.0], longest_s=10.0) == [(0, 2), (2, 5), (5, 9)]
    # a flash belongs to what follows it, the last instants to what was before
    assert spans(9.0, [0.3, 5.0, 5.1, 8.8], longest_s=10.0) == [(0, 5), (5, 9)]
    assert spans(25.0, [4.0], longest_s=10.0) == [(0, 4), (4, 14), (14, 25)]
    assert spans(14.0, [4.0], longest_s=6.0, stride_s=3.0) == [(0, 4), (4, 10), (7, 13), (8, 14)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": "scenes"}, "cut must be one of 'windows', 'shots', not 'scenes'"),
        ({"window_s": 0.0}, "window_s must be more than 0 seconds"),
        ({"window_s": math.nan}, "window_s must be more than 0 seconds"),
        ({"window_s": 5.0, "stride_s": 6.0}, "stride_s must be .* at most window_s=5"),
        ({"stride_s": 0.0}, "stride_s must be more than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cutting(**options)


def test_settings_of_before_there_was_a_choice_are_windows_without_overlap() -> None:
    assert Cutting.of({"window_s": 2.5, "dim": 4}) == Cutting("windows", 2.5, None)
    stored = {"cut": "shots", "window_s": 8.0, "stride_s": 4.0}
    assert Cutting.of(stored) == Cutting("shots", 8.0, 4.0)


@pytest.mark.parametrize("cut", ["windows", "shots"])
def test_what_says_it_lasts_for_ever_is_refused_before_any_work(
    tmp_path: Path, cut: Literal["windows", "shots"]
) -> None:
    pictures = [np.full((48, 64, 3), level, np.uint8) for level in (10, 120, 230)]
    path = write_video(tmp_path / "a.mkv", pictures, times_s=[0.0, 0.04, 1e8])
    duration_s = probe(path).duration_s
    assert duration_s >= 1e8
    tracemalloc.start()
    try:
        with pytest.raises(VideoError, match=r"a\.mkv: says it lasts 1000000\d\d s, too long"):
            Cutting(cut, 10.0).segments(path, duration_s)
        with pytest.raises(
            VideoError, match="says it lasts 3600 s, too long for pieces of 0.003 s"
        ):
            Cutting(cut, 0.003).segments(path, 3600.0)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_video_is_cut_as_the_settings_say(tmp_path: Path, emoji: Path) -> None:
    red, blue = (np.full((48, 64, 3), colour, np.uint8) for colour in ((200, 0, 0), (0, 0, 200)))
    path = write_video(tmp_path / "a.mp4", [red] * 30 + [blue] * 95)
    duration_s = probe(path).duration_s
    by_windows = Cutting("windows", 2.0, 1.0).segments(path, duration_s)
    assert by_windows == windows(duration_s, 2.0, 1.0)
    by_shots = Cutting("shots", 2.0).segments(path, duration_s)
    expected = [(0, 1.2), (1.2, 3.2), (3.0, 5.0)]
    assert [(s.start_s, s.end_s) for s in by_shots] == [pytest.approx(span) for span in expected]
    still = next((emoji / "stills").iterdir())
    assert Cutting("shots").segments(still, 0.0) == [Segment(0.0, 0.0)]
