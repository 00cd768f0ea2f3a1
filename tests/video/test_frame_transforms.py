"""What is done to frames on the device gives the same pictures as doing it while reading."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxclip.video import read_clip
from fluxclip.video.transforms import IMAGENET_MEAN, IMAGENET_STD, flip, resize, to_float


@pytest.fixture(scope="module")
def frames_BTHWC(assets: Path) -> torch.Tensor:
    film = assets / "film" / "film_360p.mp4"
    clips = [read_clip(film, times_s=[start_s, start_s + 1]) for start_s in (10.0, 30.0)]
    return torch.from_numpy(np.stack([clip.frames_THWC for clip in clips]))


def test_to_float_normalises_each_colour(frames_BTHWC: torch.Tensor) -> None:
    x = to_float(frames_BTHWC)
    assert x.dtype == torch.float32 and x.shape == frames_BTHWC.shape
    for c in range(3):
        expected = (frames_BTHWC[..., c].double() / 255 - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
        torch.testing.assert_close(x[..., c].double(), expected, atol=1e-6, rtol=1e-6)
    unit = to_float(frames_BTHWC, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert unit.min() >= -1 and unit.max() <= 1


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("side", [32, 112, 400])
def test_resize_agrees_with_pillow(frames_BTHWC: torch.Tensor, side: int, fit: str) -> None:
    small = resize(frames_BTHWC, side, fit)  # type: ignore[arg-type]
    assert small.shape == (2, 2, side, side, 3) and small.dtype == torch.uint8
    picture = Image.fromarray(frames_BTHWC[1, 0].numpy())
    box = (140, 0, 500, 360) if fit == "crop" else None
    expected = picture.resize((side, side), Image.Resampling.BICUBIC, box=box)
    # Pillow rounds between its two passes.
    assert np.abs(small[1, 0].numpy().astype(int) - np.asarray(expected)).mean() < 0.3


def test_resizing_after_reading_is_resizing_while_reading(
    assets: Path, frames_BTHWC: torch.Tensor
) -> None:
    for fit in ("crop", "squash"):
        film = assets / "film" / "film_360p.mp4"
        read = read_clip(film, times_s=[30.0, 31.0], side=112, fit=fit).frames_THWC
        after = resize(frames_BTHWC[1:], 112, fit)[0].numpy()
        assert np.abs(read.astype(int) - after).mean() < 1.0


def test_frames_of_the_right_size_stay_as_they_are(frames_BTHWC: torch.Tensor) -> None:
    square = frames_BTHWC[:, :, :360, :360]
    assert resize(square, 360) is square


def test_flip_mirrors_the_chosen_clips(frames_BTHWC: torch.Tensor) -> None:
    flipped = flip(frames_BTHWC, torch.tensor([True, False]))
    torch.testing.assert_close(flipped[0, :, :, 0], frames_BTHWC[0, :, :, -1])
    torch.testing.assert_close(flipped[1], frames_BTHWC[1])
    torch.testing.assert_close(flip(flipped, torch.tensor([True, False])), frames_BTHWC)


def test_only_uint8_frames_are_taken(frames_BTHWC: torch.Tensor) -> None:
    for wrong in (frames_BTHWC.float(), frames_BTHWC[0], frames_BTHWC[..., :1]):
        with pytest.raises(ValueError, match="frames must be uint8"):
            to_float(wrong)
        with pytest.raises(ValueError, match="frames must be uint8"):
            resize(wrong, 32)
