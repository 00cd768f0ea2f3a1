"""Single images are clips of one frame at time 0."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxclip.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoError, is_image, probe, read_clip


def gradient(width: int, height: int) -> np.ndarray:
    rows, columns = np.indices((height, width))
    return np.stack([rows * 3, columns * 2, rows + columns], axis=2).astype(np.uint8)


def test_stills_that_ship_with_the_repository(emoji: Path) -> None:
    for path in sorted((emoji / "stills").iterdir())[::60]:
        clip = read_clip(path, num_frames=8, side=112)
        assert clip.frames_THWC.shape == (1, 112, 112, 3)
        np.testing.assert_array_equal(clip.times_s, [0.0])
        assert clip.frames_THWC[0, 0, 0].min() > 250  # art on white
        info = probe(path)
        assert info.is_image and (info.width, info.height) == (224, 224)
        assert (info.num_frames, info.duration_s) == (1, 0.0)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_known_kind(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix.upper()}"
    Image.fromarray(gradient(60, 40)).save(path)
    assert is_image(path)
    frames = read_clip(path, num_frames=1).frames_THWC
    assert frames.shape == (1, 40, 60, 3)
    assert np.abs(frames[0].astype(int) - gradient(60, 40)).mean() < 6


def test_suffixes_tell_images_from_videos() -> None:
    assert not IMAGE_SUFFIXES & VIDEO_SUFFIXES
    assert is_image("a.WebP") and not is_image("a.mp4") and not is_image("jpg")


def test_a_still_is_one_frame_whatever_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(gradient(60, 40)).save(path)
    for wanted in ({"num_frames": 8, "start_s": 2.0, "end_s": 3.0}, {"times_s": [0.0, 1.0]}):
        assert read_clip(path, **wanted).frames_THWC.shape == (1, 40, 60, 3)  # type: ignore[arg-type]


def test_fit_and_crop(tmp_path: Path) -> None:
    picture = gradient(60, 40)
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)

    def read(**framing: object) -> np.ndarray:
        return read_clip(path, num_frames=1, **framing).frames_THWC[0]  # type: ignore[arg-type]

    np.testing.assert_array_equal(read(side=40), picture[:, 10:50])
    squashed = Image.fromarray(picture).resize((40, 40), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(read(side=40, fit="squash"), np.asarray(squashed))
    np.testing.assert_array_equal(read(crop=(0.25, 0.5, 0.75, 1.0)), picture[10:30, 30:60])
    np.testing.assert_array_equal(
        read(side=20, crop=(0.25, 0.5, 0.75, 5 / 6)), picture[10:30, 30:50]
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_cameras(tmp_path: Path, orientation: int) -> None:
    """EXIF: the pixels are stored so that undoing the tag gives the scene."""
    scene = gradient(60, 40)
    undone = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.swapaxes(0, 1),
        6: np.rot90(scene),
        7: scene[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(scene, -1),
    }
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(np.ascontiguousarray(undone[orientation])).save(path, exif=exif)
    np.testing.assert_array_equal(read_clip(path, num_frames=1).frames_THWC[0], scene)
    assert (probe(path).width, probe(path).height) == (60, 40)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    picture = np.zeros((4, 6, 4), np.uint8)
    picture[..., 0] = 200
    picture[:, :2, 3], picture[:, 2:4, 3] = 255, 51
    for suffix in ("png", "webp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(picture).save(path, lossless=True)
        row = read_clip(path, num_frames=1).frames_THWC[0, 0]
        np.testing.assert_array_equal(row[[0, 1]], [[200, 0, 0]] * 2)
        np.testing.assert_allclose(row[[2, 3]].astype(int), [[244, 204, 204]] * 2, atol=1)
        np.testing.assert_array_equal(row[[4, 5]], [[255, 255, 255]] * 2)


def test_other_kinds_of_pixels(tmp_path: Path) -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    grey16 = read_clip(tmp_path / "grey16.png", num_frames=1).frames_THWC[0]
    np.testing.assert_array_equal(grey16[..., 0], np.arange(256).reshape(16, 16))

    for highest, shift in ((255, 0), (256, 8), (65535, 8)):
        deep = np.linspace(0, highest, 256).round().astype(np.int32).reshape(16, 16)
        Image.fromarray(deep).save(tmp_path / "deep.tiff")
        grey32 = read_clip(tmp_path / "deep.tiff", num_frames=1).frames_THWC[0]
        np.testing.assert_array_equal(grey32[..., 0], deep >> shift)

    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    frames = read_clip(tmp_path / "palette.png", num_frames=1).frames_THWC
    np.testing.assert_array_equal(frames[0, 0, 0], [10, 20, 30])

    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red = read_clip(tmp_path / "print.jpg", num_frames=1).frames_THWC[0, 0, 0]
    np.testing.assert_allclose(red.astype(int), [255, 0, 0], atol=3)


@pytest.mark.parametrize(
    "values", [np.float32([[0, 0.5]]), np.int32([[0, 65536]]), np.int32([[-1, 255]])]
)
def test_values_of_unknown_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "depth.tiff"
    Image.fromarray(values).save(path)
    with pytest.raises(VideoError, match="no known range; save it with 8 or 16 bits") as caught:
        read_clip(path, num_frames=1)
    assert str(caught.value).startswith(f"{path}: its values") and "\n" not in str(caught.value)


def test_files_that_are_no_images(tmp_path: Path, emoji: Path) -> None:
    text, cut, empty = tmp_path / "text.png", tmp_path / "cut.jpg", tmp_path / "empty.webp"
    text.write_text("hello " * 100)
    Image.fromarray(gradient(60, 40)).save(cut)
    cut.write_bytes(cut.read_bytes()[:700])
    empty.write_bytes(b"")
    video = tmp_path / "video.jpg"
    video.write_bytes((emoji / "clips" / "1f300.mp4").read_bytes())
    for path, reason in (
        (text, "not an image"),
        (cut, "damaged image"),
        (empty, "empty file"),
        (video, "not an image"),
    ):
        with pytest.raises(VideoError, match=reason) as caught:
            read_clip(path, num_frames=1)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        assert (caught.value.kind == "truncated") == (path == cut)
