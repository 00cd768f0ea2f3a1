"""`Clip` checks itself; sampling and windows are arithmetic on time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxclip.video import Clip, Segment, evenly_spread, random_crop, random_per_part, windows

FRAMES = np.zeros((3, 4, 5, 3), np.uint8)
TIMES = np.array([0.19, 0.5, 2.81])


def test_clip_says_what_it_holds() -> None:
    assert repr(Clip(FRAMES, TIMES)) == "Clip(frames_THWC=(3, 4, 5, 3), times_s=0.19..2.81)"
    with pytest.raises(AttributeError):
        Clip(FRAMES, TIMES).times_s = TIMES  # type: ignore[misc]


@pytest.mark.parametrize(
    ("frames", "times", "reason"),
    [
        (FRAMES.astype(np.float32), TIMES, "uint8 array, not float32"),
        (FRAMES.tolist(), TIMES, "uint8 array, not list"),
        (FRAMES[0], TIMES, r"\(T, H, W, 3\)"),
        (FRAMES[..., :1], TIMES, r"\(T, H, W, 3\)"),
        (FRAMES[:0], TIMES[:0], "T, H, W >= 1"),
        (FRAMES[:, :, :0], TIMES, "T, H, W >= 1"),
        (FRAMES, TIMES.astype(np.float32), "float64 array, not float32"),
        (FRAMES, [0.0, 1.0, 2.0], "float64 array, not list"),
        (FRAMES, TIMES[:2], r"shape \(3,\)"),
        (FRAMES, TIMES[:, None], r"shape \(3,\)"),
        (FRAMES, TIMES[::-1].copy(), "non-decreasing"),
        (FRAMES, np.array([0.0, np.nan, 1.0]), "finite"),
        (FRAMES, np.array([0.0, 1.0, np.inf]), "finite"),
    ],
)
def test_clip_refuses_what_is_not_one(frames: object, times: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Clip(frames, times)  # type: ignore[arg-type]


STARTS = st.floats(0, 1e5)
LENGTHS = st.floats(1e-3, 1e5)


@given(STARTS, LENGTHS, st.integers(1, 64), st.integers(0, 2**32))
def test_one_time_in_each_part(start_s: float, length_s: float, num: int, seed: int) -> None:
    end_s = start_s + length_s
    edges = np.linspace(start_s, end_s, num + 1)
    slack = 1e-9 * end_s
    even = evenly_spread(start_s, end_s, num)
    np.testing.assert_allclose(even, (edges[1:] + edges[:-1]) / 2, rtol=1e-12, atol=slack)
    drawn = random_per_part(start_s, end_s, num, np.random.default_rng(seed))
    for times_s in (even, drawn):
        assert times_s.shape == (num,) and times_s.dtype == np.float64
        assert (times_s >= edges[:-1] - slack).all() and (times_s <= edges[1:] + slack).all()
        assert times_s[0] >= start_s and times_s[-1] < end_s
        assert (np.diff(times_s) >= 0).all()


def test_random_times_are_uniform_in_their_part() -> None:
    rng = np.random.default_rng(0)
    drawn = np.stack([random_per_part(2.0, 6.0, 4, rng) for _ in range(4000)]) - np.arange(2, 6)
    np.testing.assert_allclose(drawn.mean(axis=0), 0.5, atol=0.02)
    np.testing.assert_allclose(drawn.var(axis=0), 1 / 12, atol=0.005)


@pytest.mark.parametrize("interval", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_times_need_an_interval(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite and not empty"):
        evenly_spread(*interval, 4)
    with pytest.raises(ValueError, match="at least 1"):
        random_per_part(0.0, 1.0, 0, np.random.default_rng(0))


@given(
    seed=st.integers(0, 2**32),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted),
    aspect=st.floats(0.1, 10),
)
def test_random_crop_is_a_box_in_the_picture(
    seed: int, scale: list[float], ratio: list[float], aspect: float
) -> None:
    rng = np.random.default_rng(seed)
    top, left, bottom, right = random_crop(rng, tuple(scale), tuple(ratio), aspect)
    assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
    shape = aspect * (right - left) / (bottom - top)
    assert ratio[0] * (1 - 1e-9) <= shape <= ratio[1] * (1 + 1e-9)
    assert (bottom - top) * (right - left) <= scale[1] + 1e-9 or 1.0 in (bottom - top, right - left)


def test_random_crop_has_the_areas_and_shapes_asked_for() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop(rng, (0.2, 0.4), (0.75, 4 / 3), 16 / 9) for _ in range(3000)])
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (height * width).mean() == pytest.approx(0.3, abs=0.01)
    assert np.log(width / height * 16 / 9).mean() == pytest.approx(0, abs=0.02)
    assert (boxes[:, 0] / (1 - height)).mean() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="scale"):
        random_crop(rng, (0.5, 0.2), (1, 1))
    with pytest.raises(ValueError, match="ratio"):
        random_crop(rng, (0.5, 1), (2, 1))


@given(
    duration_s=st.floats(0, 500),
    length_s=st.floats(0.5, 60),
    stride_share=st.one_of(st.none(), st.floats(0.05, 1)),
)
def test_windows_cover_the_video_and_do_not_leave_it(
    duration_s: float, length_s: float, stride_share: float | None
) -> None:
    stride_s = None if stride_share is None else stride_share * length_s
    pieces = windows(duration_s, length_s, stride_s)
    stride = stride_s or length_s
    assert pieces[0].start_s == 0 and pieces[-1].end_s == duration_s
    for piece in pieces[:-1]:
        assert piece.end_s - piece.start_s == pytest.approx(length_s)
    for before, after in zip(pieces, pieces[1:], strict=False):
        assert after.start_s <= before.end_s + 1e-9, "a gap"
        assert after.start_s - before.start_s >= stride / 4 - 1e-6, "nearly the same window twice"
        assert after.start_s - before.start_s <= stride + 1e-6
    last_s = pieces[-1].end_s - pieces[-1].start_s
    assert last_s <= length_s + stride / 4
    assert last_s >= min(length_s, duration_s) - 1e-9


def test_windows_by_example() -> None:
    def spans(*arguments: float) -> list[tuple[float, float]]:
        return [(w.start_s, w.end_s) for w in windows(*arguments)]

    assert spans(6.0, 10.0) == [(0, 6)]
    assert spans(10.0, 10.0) == [(0, 10)]
    assert spans(12.4, 10.0) == [(0, 12.4)]  # 2.4 s more: not worth a window
    assert spans(13.0, 10.0) == [(0, 10), (3, 13)]
    assert spans(30.0, 10.0) == [(0, 10), (10, 20), (20, 30)]
    assert spans(16.0, 10.0, 5.0) == [(0, 10), (5, 16)]
    assert spans(17.0, 10.0, 5.0) == [(0, 10), (5, 15), (7, 17)]
    assert len(windows(0.3, 0.1)) == 3  # although 0.3 / 0.1 < 3 in floating point
    assert windows(0.0, 10.0) == [Segment(0.0, 0.0)]  # a still


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((-1.0, 1.0), "duration_s"),
        ((math.nan, 1.0), "duration_s"),
        ((1.0, 0.0), "length_s"),
        ((1.0, 1.0, 0.0), "stride_s"),
        ((9.0, 1.0, 1.5), "stride_s"),
    ],
)
def test_windows_refuse_what_would_not_cover(arguments: tuple[float, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        windows(*arguments)
    with pytest.raises(ValueError, match="segment needs"):
        Segment(2.0, 1.0)
