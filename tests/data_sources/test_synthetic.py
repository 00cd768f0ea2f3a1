"""Synthetic pairs: their sentences are true of their frames, and they are clips like any other."""

import numpy as np
import pytest

from fluxclip.data.sources.synthetic import _COLOURS, _GROUNDS, _MOTIONS, _SHAPES, read
from fluxclip.video import Clip, VideoError


def where(clip: Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each frame: middle of what differs from its corner (x, y in 0-1), and its share."""
    frames = clip.frames_THWC.astype(int)
    shape_THW = np.abs(frames - frames[:1, :1, :1]).sum(-1) > 100
    down, across = np.indices(shape_THW.shape[1:]) / shape_THW.shape[1]
    share = shape_THW.mean((1, 2))
    x, y = (np.array([place[frame].mean() for frame in shape_THW]) for place in (across, down))
    return x, y, share


def test_captions_say_what_is_to_be_seen() -> None:
    records = read("60?side=64")
    seen = set()
    for index, record in enumerate(records):
        name, longer = record.captions
        _, colour, shape, *motion = name.split()
        ground = longer.split()[1]
        assert longer.endswith(name)
        seen |= {colour, shape, " ".join(motion), ground}
        clip = records.clip(index, num_frames=4)
        x, y, share = where(clip)
        corner = clip.frames_THWC[0, 0, 0]
        assert tuple(corner) == _GROUNDS[ground]
        painted = clip.frames_THWC[1].reshape(-1, 3)
        assert (painted == _COLOURS[colour]).all(-1).mean() > 0.5 * share[1]
        right, down, larger = x[-1] - x[0], y[-1] - y[0], share[-1] / share[0]
        told = {
            "moves left": right < -0.2, "moves right": right > 0.2, "moves up": down < -0.2,
            "moves down": down > 0.2, "grows": larger > 1.5, "shrinks": larger < 0.7,
            "stands still": abs(right) + abs(down) < 0.01 and 0.99 < larger < 1.01,
        }  # fmt: skip
        assert [motion for motion, is_so in told.items() if is_so] == [" ".join(motion)], name
    assert seen == {*_COLOURS, *_SHAPES, *_MOTIONS, *_GROUNDS}


def test_every_shape_is_another() -> None:
    sizes = {}
    side = 64
    place = ((np.arange(side) + 0.5) / side * 2.2 - 1.1).astype(np.float32)
    for name, inside in _SHAPES.items():
        sizes[name] = inside(place[None, :], place[:, None]) + 0 * place[:, None] > 0
        assert 0.1 < sizes[name].mean() < 0.75
    shapes = list(sizes.values())
    for i, one in enumerate(shapes):
        assert all((one ^ other).mean() > 0.03 for other in shapes[:i])


def test_clips_follow_from_seed_and_number() -> None:
    one, again, other = read("50"), read("1000?seed=0"), read("50?seed=1")
    assert list(one) == list(again[:50])
    assert [r.captions for r in one] != [r.captions for r in other]
    a, b = one.clip(7, num_frames=3, side=40), again.clip(7, num_frames=3, side=40)
    assert np.array_equal(a.frames_THWC, b.frames_THWC)


def test_times_sizes_and_crops_are_those_of_a_file() -> None:
    records = read("5?frames=8&side=48")
    info = records.info(0)
    assert (info.duration_s, info.num_frames, info.fps) == (1, 8, 8)
    assert (info.width, info.height) == (48, 48)
    clip = records.clip(0, times_s=[0.0, 0.1, 0.124, 0.99])
    assert clip.times_s.tolist() == [0, 0, 0, 0.875]
    assert clip.frames_THWC.shape == (4, 48, 48, 3)
    assert np.array_equal(clip.frames_THWC[0], clip.frames_THWC[2])
    with pytest.raises(VideoError, match="synthetic-0.mp4: no frame at 1 s, it lasts 1 s"):
        records.clip(0, times_s=[0.5, 1.0])
    assert records.clip(0, num_frames=2, start_s=0.5, end_s=9).times_s.tolist() == [0.625, 0.875]
    with pytest.raises(ValueError, match="either num_frames or times_s"):
        records.clip(0, side=96)
    whole = records.clip(0, num_frames=2, side=96).frames_THWC
    part = records.clip(0, num_frames=2, side=48, crop=(0.5, 0.25, 1.0, 0.75)).frames_THWC
    # but for the rounding of places at the shape's edge
    assert np.abs(part.astype(int) - whole[:, 48:, 24:72]).max() <= 1
    assert records.clip(0, num_frames=1, crop=(0, 0, 0.5, 1)).frames_THWC.shape == (1, 24, 48, 3)


def test_stills_are_pictures_of_the_shape() -> None:
    records = read("200?stills=0.3")
    stills = [record for record in records if record.is_still]
    assert 40 < len(stills) < 80
    assert all("moves" not in record.captions[0] for record in stills)
    index = [record.is_still for record in records].index(True)
    assert records.clip(index, num_frames=5).frames_THWC.shape == (1, 128, 128, 3)
    assert records.info(index).duration_s == 0


@pytest.mark.parametrize("name", ["", "0", "-3", "many", "5?side=0", "5?stills=2", "5?side=x"])
def test_other_names_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="called by its number of pairs, as in 1000 or") as caught:
        read(name)
    assert "\n" not in str(caught.value)
