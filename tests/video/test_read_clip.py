"""`read_clip`: the right frames at the right times, whatever the container, wherever it starts."""

import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from video_files import decode_all, grey_pictures, level_of, on_screen, remux, write_video

from fluxclip.video import evenly_spread, probe, probe_and_read, random_crop, read_clip


@pytest.fixture(scope="session")
def film(assets: Path) -> Path:
    return assets / "film" / "film_360p.mp4"


def assert_same_as_decoding_all(path: Path, wanted_s: np.ndarray) -> None:
    """Every frame, bit by bit, and its time are those found by decoding from first to last."""
    frames, times_s = decode_all(path)
    clip = read_clip(path, times_s=wanted_s)
    expected = on_screen(times_s, wanted_s)
    np.testing.assert_array_equal(clip.times_s, times_s[expected])
    np.testing.assert_array_equal(clip.frames_THWC, frames[expected])


# ---- time ----


@pytest.mark.parametrize("name", ["1f300", "1f436"])
def test_emoji_clips_as_decoded_from_first_to_last(emoji: Path, name: str) -> None:
    path = emoji / "clips" / f"{name}.mp4"
    duration_s = probe(path).duration_s
    rng = np.random.default_rng(0)
    for wanted_s in (
        np.sort(rng.uniform(0, duration_s, 12)),
        np.arange(0, duration_s, 0.02),
        np.array([duration_s - 1e-4]),
    ):
        assert_same_as_decoding_all(path, wanted_s)


def test_seeking_in_a_film_gives_what_decoding_from_the_start_gives(
    film: Path, decoder: str
) -> None:
    """At 24 fps with B-frames and keyframes seconds apart: anywhere, at and beside keyframes."""
    keyframes_s = np.array([46592, 115712, 247808 - 2560, 647168]) / 12288
    beside_s = np.concatenate([keyframes_s - 0.02, keyframes_s, keyframes_s + 0.02])
    anywhere_s = np.random.default_rng(1).uniform(0, 75, 12)
    wanted_s = np.sort(np.concatenate([beside_s, anywhere_s, [74.99]]))

    together = read_clip(film, times_s=wanted_s, side=64, decoder=decoder)
    np.testing.assert_array_equal(together.times_s, np.floor(wanted_s * 24 + 1e-9) / 24)
    every_s = np.arange(1800) / 24
    from_the_start = read_clip(film, times_s=every_s, side=64, decoder=decoder)
    np.testing.assert_array_equal(from_the_start.times_s, every_s)
    np.testing.assert_array_equal(
        together.frames_THWC, from_the_start.frames_THWC[on_screen(every_s, together.times_s)]
    )
    for time_s, frame in zip(wanted_s[::5], together.frames_THWC[::5], strict=True):
        alone = read_clip(film, times_s=[time_s], side=64, decoder=decoder)
        np.testing.assert_array_equal(alone.frames_THWC[0], frame)


def test_frames_in_decoding_order_are_shown_in_presentation_order(tmp_path: Path) -> None:
    coding = {"bf": "3", "b_strategy": "0", "g": "12"}
    path = write_video(tmp_path / "b.mp4", grey_pictures(40), coding=coding)
    clip = read_clip(path, times_s=np.arange(40) / 25)
    np.testing.assert_array_equal(clip.times_s, np.arange(40) / 25)
    levels = clip.frames_THWC.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, [level_of(i) for i in range(40)], atol=3)


VARIABLE_S = [0, 0.04, 0.08, 1.0, 1.02, 1.03, 3.0, 3.5, 3.52, 3.54, 9.0, 9.04, 9.08]


@pytest.fixture(scope="session")
def variable_rate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Irregular times, B-frames that stay on screen for seconds, two containers."""
    folder = tmp_path_factory.mktemp("variable")
    pictures, coding = (
        grey_pictures(len(VARIABLE_S)),
        {"bf": "2", "b_strategy": "0", "b_pyramid": "none"},
    )
    return {
        suffix: write_video(folder / f"v.{suffix}", pictures, times_s=VARIABLE_S, coding=coding)
        for suffix in ("mp4", "mkv")
    }


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(wanted_s=st.lists(st.floats(0, 9.1), min_size=1, max_size=6))
def test_variable_frame_rate(
    variable_rate: dict[str, Path], suffix: str, wanted_s: list[float]
) -> None:
    wanted = np.sort(wanted_s)
    clip = read_clip(variable_rate[suffix], times_s=wanted)
    expected = on_screen(np.array(VARIABLE_S), wanted + 1e-6)
    np.testing.assert_allclose(clip.times_s, np.array(VARIABLE_S)[expected], atol=1e-9)
    levels = clip.frames_THWC.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, [level_of(i) for i in expected], atol=3)


CONTAINERS: dict[str, dict[str, Any]] = {
    "a.mp4": {},
    "fragmented.mp4": {"muxing": {"movflags": "frag_keyframe+empty_moov"}},
    "a.mov": {},
    "a.mkv": {},
    "no_duration.mkv": {"muxing": {"live": "1"}},
    "longer_sound.mkv": {"sound_s": 7.0},
    "a.webm": {"codec": "libvpx-vp9", "coding": {"deadline": "realtime", "cpu-used": "8"}},
    "a.avi": {"codec": "mpeg4", "tick": Fraction(1, 25), "coding": {"bf": "2", "g": "15"}},
    "a.mpg": {
        "codec": "mpeg2video",
        "coding": {"bf": "2", "g": "12"},
        "tick": Fraction(1, 25),
        "times_s": [i / 25 for i in range(150)],
    },
    "a.ts": {},
    "a.flv": {},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
    "open_gop.mp4": {"coding": {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3"}},
    "open_gop_hevc.mp4": {
        "codec": "libx265",
        "coding": {"x265-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:log-level=none"},
    },
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_and_coding(tmp_path: Path, name: str) -> None:
    writing = {"times_s": [i / 10 for i in range(60)], **CONTAINERS[name]}
    path = write_video(tmp_path / name, grey_pictures(len(writing["times_s"])), **writing)
    rng = np.random.default_rng(2)
    assert probe(path).duration_s == pytest.approx(6.0, abs=0.1)
    assert_same_as_decoding_all(path, np.sort(rng.uniform(0, 5.9, 5)))
    assert_same_as_decoding_all(path, np.array([5.8]))  # far ahead: by a seek where one is possible


@pytest.mark.parametrize(
    "refresh",
    ["open-gop=1:keyint=12:min-keyint=12:bframes=3", "intra-refresh=1:keyint=12:bframes=0"],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_seek_between_pictures_that_refer_to_earlier_ones(
    film: Path, tmp_path: Path, suffix: str, refresh: str
) -> None:
    """Where decoding can begin, what is shown next may still need what came before."""
    moving = list(read_clip(film, times_s=np.arange(240, 300) / 24, side=64).frames_THWC)
    every_s = np.arange(60) / 4
    coding = {"x264-params": f"{refresh}:scenecut=0"}
    path = write_video(tmp_path / f"r.{suffix}", moving, times_s=list(every_s), coding=coding)
    frames, times_s = decode_all(path)
    for i in range(30, 60):
        clip = read_clip(path, times_s=[times_s[i]])
        np.testing.assert_array_equal(clip.frames_THWC[0], frames[i])
        assert clip.times_s[0] == times_s[i]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_times_count_from_the_first_frame(emoji: Path, tmp_path: Path, suffix: str) -> None:
    """... and not from the zero of the container's clock."""
    source = emoji / "clips" / "1f300.mp4"
    late = remux(source, tmp_path / f"late.{suffix}", shift_s=100.0)
    wanted_s = (np.arange(0, 72, 7) + 0.5) * 0.042  # in the middle of frames of 42 ms
    at_once, shifted = read_clip(source, times_s=wanted_s), read_clip(late, times_s=wanted_s)
    np.testing.assert_array_equal(at_once.frames_THWC, shifted.frames_THWC)
    np.testing.assert_allclose(at_once.times_s, shifted.times_s, atol=1e-3)
    assert probe(late).duration_s == pytest.approx(probe(source).duration_s, abs=0.05)


def test_number_of_frames_means_midpoints_of_equal_parts(film: Path) -> None:
    by_number = read_clip(film, num_frames=4, start_s=10.0, end_s=20.0, side=32)
    by_time = read_clip(film, times_s=evenly_spread(10.0, 20.0, 4), side=32)
    np.testing.assert_array_equal(by_number.frames_THWC, by_time.frames_THWC)
    np.testing.assert_array_equal(by_number.times_s, by_time.times_s)
    to_the_end = read_clip(film, num_frames=2, start_s=70.0, side=32)
    beyond_the_end = read_clip(film, num_frames=2, start_s=70.0, end_s=75.2, side=32)
    np.testing.assert_array_equal(to_the_end.times_s, beyond_the_end.times_s)


def test_reading_at_the_times_of_a_clip_gives_that_clip(emoji: Path) -> None:
    path = emoji / "clips" / "1f308.mp4"
    clip = read_clip(path, num_frames=11, side=48)
    again = read_clip(path, times_s=clip.times_s, side=48)
    np.testing.assert_array_equal(clip.frames_THWC, again.frames_THWC)
    np.testing.assert_array_equal(clip.times_s, again.times_s)


def test_a_short_video_repeats_the_frame_that_is_on_screen(tmp_path: Path) -> None:
    path = write_video(tmp_path / "three.mp4", grey_pictures(3), times_s=[0, 0.25, 0.5])
    clip = read_clip(path, num_frames=7)
    expected = on_screen(np.array([0, 0.25, 0.5]), evenly_spread(0, probe(path).duration_s, 7))
    assert len(set(expected)) >= 2 and len(set(expected)) < 7
    levels = clip.frames_THWC.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, [level_of(i) for i in expected], atol=3)


@pytest.mark.parametrize("name", ["one.mp4", "one.mkv", "one.ts", "one.gif"])
def test_a_video_of_one_frame(tmp_path: Path, name: str) -> None:
    extra = {"codec": "gif", "pixels": "rgb8"} if name.endswith("gif") else {}
    path = write_video(tmp_path / name, grey_pictures(1), **extra)
    clip = read_clip(path, num_frames=4, side=16)
    assert clip.frames_THWC.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(clip.times_s, np.zeros(4))
    assert probe(path).duration_s > 0


def test_sound_that_is_longer_than_the_pictures_shows_the_last_one(tmp_path: Path) -> None:
    """A tag says when the pictures end; without it (live) only the sound says how long it lasts."""
    pictures = grey_pictures(50)
    tagged = write_video(tmp_path / "tagged.mkv", pictures, sound_s=6.0)
    assert probe(tagged).duration_s == pytest.approx(2.0, abs=0.05)
    flash = tmp_path / "sound.flv"  # states one duration for the whole file
    with_sound = _flv_with_sound(flash, pictures, sound_s=6.0)
    assert probe(with_sound).duration_s == pytest.approx(6.0, abs=0.2)
    clip = read_clip(with_sound, times_s=[1.0, 5.5])
    assert clip.times_s[1] == pytest.approx(49 / 25, abs=2e-3)


def _flv_with_sound(path: Path, pictures: list[np.ndarray], *, sound_s: float) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        sound = container.add_stream("aac", rate=44100)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        silence = np.zeros((1, round(44100 * sound_s)), np.float32)
        samples = av.AudioFrame.from_ndarray(silence, format="flt", layout="mono")
        samples.sample_rate, samples.pts = 44100, 0
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    return path


# ---- picture ----


@pytest.fixture(scope="session")
def scene(assets: Path) -> np.ndarray:
    """A picture with detail: (200, 320, 3)."""
    frames = read_clip(assets / "film" / "film_360p.mp4", times_s=[30.0]).frames_THWC
    return np.ascontiguousarray(frames[0, 80:280, 160:480])


def sliced(
    picture: np.ndarray, box: tuple[float, float, float, float], *, step: int = 1
) -> np.ndarray:
    """The part of a picture in a box of fractions (top, left, bottom, right).

    The box is moved up and left to where multiples of `step` pixels begin.
    """
    height, width = picture.shape[:2]
    top, left, bottom, right = (
        int(fraction * size + 0.5) for fraction, size in zip(box, (height, width) * 2, strict=True)
    )
    up, back = top % step, left % step
    return picture[top - up : bottom - up, left - back : right - back]


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    """The reference: Pillow's antialiased bicubic."""
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("size", [(320, 200), (200, 320), (321, 199), (200, 200)])
@pytest.mark.parametrize("side", [32, 112, 400])
def test_fit(tmp_path: Path, scene: np.ndarray, size: tuple[int, int], side: int) -> None:
    """Landscape, portrait, odd and square pictures, made smaller and larger."""
    picture = np.asarray(Image.fromarray(scene).resize(size))
    coding = {"codec": "libx264", "pixels": "yuv444p", "coding": {"crf": "1"}}
    path = write_video(tmp_path / "s.mp4", [picture] * 2, **coding)
    native = read_clip(path, num_frames=1).frames_THWC[0]
    assert native.shape == picture.shape
    assert (probe(path).width, probe(path).height) == size

    width, height = size
    across, down = (max(0, 1 - height / width) / 2, max(0, 1 - width / height) / 2)
    boxes = {"crop": (down, across, 1 - down, 1 - across), "squash": (0.0, 0.0, 1.0, 1.0)}
    for fit, box in boxes.items():
        clip = read_clip(path, num_frames=1, side=side, fit=fit)
        assert clip.frames_THWC.shape == (1, side, side, 3)
        assert distance(clip.frames_THWC[0], resized(sliced(native, box), side)) < 1.0, fit


def test_crop_is_a_slice(film: Path) -> None:
    """It begins where a sample of colour does.

    Colour at its edges is interpolated from its own side only.
    """
    rng = np.random.default_rng(3)
    whole = read_clip(film, times_s=[12.0, 30.0]).frames_THWC
    boxes = [random_crop(rng, (0.05, 1.0), (0.5, 2.0), 16 / 9) for _ in range(6)]
    for box in [*boxes, (0.25, 0.1, 0.75, 0.55), (0.0, 0.0, 1.0, 1.0)]:
        part = read_clip(film, times_s=[12.0, 30.0], crop=box).frames_THWC
        assert distance(part[0], sliced(whole[0], box, step=2)) < 1.5
        for side in (48, 224):
            scaled = read_clip(film, times_s=[30.0], side=side, crop=box).frames_THWC[0]
            assert distance(scaled, resized(sliced(whole[1], box, step=2), side)) < 1.5, (box, side)


@pytest.mark.parametrize("rotation", [None, 90])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le", "yuv422p10le", "nv12"])
def test_a_crop_keeps_the_colour(tmp_path: Path, pixels: str, rotation: int | None) -> None:
    """Wherever it begins: a sample of colour is that of two pixels."""
    codec, suffix = ("rawvideo", "nut") if pixels == "nv12" else ("libx264", "mp4")
    picture = np.full((40, 62, 3), (200, 60, 30), np.uint8)
    path = write_video(
        tmp_path / f"c.{suffix}", [picture], codec=codec, pixels=pixels, rotation=rotation
    )
    info = probe(path)
    for top, left in ((0, 11), (11, 0), (11, 11), (10, 10), (info.height - 1, info.width - 1)):
        box = (top / info.height, left / info.width, 1.0, 1.0)
        native = read_clip(path, num_frames=1, crop=box).frames_THWC[0]
        assert native.shape == (info.height - top, info.width - left, 3)
        scaled = read_clip(path, num_frames=1, crop=box, side=20).frames_THWC[0]
        for frame in (native, scaled):
            assert np.abs(frame.astype(int) - (200, 60, 30)).max() <= 3


@pytest.mark.parametrize("box", [(0.5, 0.5, 0.504, 0.503), (0.0, 0.9999, 1.0, 1.0)])
def test_a_crop_of_next_to_nothing_is_at_least_a_pixel(
    film: Path, box: tuple[float, float, float, float]
) -> None:
    assert read_clip(film, times_s=[1.0], crop=box).frames_THWC.size > 0
    assert read_clip(film, times_s=[1.0], crop=box, side=64).frames_THWC.shape == (1, 64, 64, 3)


def test_one_crop_for_the_whole_clip(tmp_path: Path, scene: np.ndarray) -> None:
    path = write_video(tmp_path / "s.mp4", [scene] * 12, coding={"crf": "1"})
    frames = read_clip(path, num_frames=4, side=64, crop=(0.1, 0.2, 0.6, 0.7)).frames_THWC
    assert max(distance(frames[0], frame) for frame in frames) < 1.0


def test_shrinking_does_not_alias(tmp_path: Path) -> None:
    """A fine checkerboard becomes grey, not a coarse pattern."""
    board = np.indices((200, 200)).sum(axis=0) % 2 * 255
    picture = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    path = write_video(tmp_path / "c.mp4", [picture], pixels="yuv444p", coding={"qp": "0"})
    small = read_clip(path, num_frames=1, side=70).frames_THWC[0].astype(int)
    assert abs(small[5:-5, 5:-5] - 127).max() < 16


def test_white_stays_white(emoji: Path) -> None:
    frames = read_clip(emoji / "clips" / "1f308.mp4", num_frames=4, side=112).frames_THWC
    assert frames[:, :4, :4].min() >= 254


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pictures = []
    for red in (200, 100):
        picture = np.zeros((24, 32, 4), np.uint8)
        picture[:, :16] = (red, 0, 0, 255)
        pictures.append(Image.fromarray(picture))
    path = tmp_path / "sticker.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=200, disposal=2)
    frames = read_clip(path, times_s=[0.1, 0.3]).frames_THWC
    np.testing.assert_allclose(frames[:, :, :16, 0].mean(axis=(1, 2)), [200, 100], atol=2)
    assert frames[:, :, 17:].min() >= 254


@pytest.mark.parametrize("rotation", [90, 180, -90])
@pytest.mark.parametrize("side", [None, 40])
def test_a_phone_video_is_set_upright(
    tmp_path: Path, scene: np.ndarray, rotation: int, side: int | None
) -> None:
    """And crop and fit are those of the upright picture."""
    stored = write_video(tmp_path / "stored.mp4", [scene] * 3)
    turned = write_video(tmp_path / "turned.mp4", [scene] * 3, rotation=rotation)
    quarter_turns = rotation // 90
    upright = np.rot90(read_clip(stored, num_frames=2).frames_THWC, quarter_turns, axes=(1, 2))
    info = probe(turned)
    assert (info.height, info.width) == upright.shape[1:3]
    if side is None:
        np.testing.assert_array_equal(read_clip(turned, num_frames=2).frames_THWC, upright)
    else:
        square = read_clip(stored, num_frames=2, side=side).frames_THWC
        np.testing.assert_array_equal(
            read_clip(turned, num_frames=2, side=side).frames_THWC,
            np.rot90(square, quarter_turns, axes=(1, 2)),
        )
    box = (0.1, 0.2, 0.5, 1.0)
    part = read_clip(turned, num_frames=2, side=side, crop=box).frames_THWC[0]
    expected = sliced(upright[0], box)
    assert distance(part, expected if side is None else resized(expected, side)) < 1.5


# ---- what is known without reading ----


def test_probe(assets: Path, emoji: Path) -> None:
    film = probe(assets / "film" / "film_720p.mp4")
    assert (film.width, film.height, film.fps, film.num_frames) == (1280, 720, 24.0, 576)
    assert film.duration_s == 24.0 and not film.is_image
    clip = probe(str(emoji / "clips" / "1f300.mp4"))
    assert clip.num_frames == 72 and clip.duration_s == pytest.approx(3.0237, abs=1e-3)


def test_importing_the_package_loads_neither_torch_nor_a_decoder() -> None:
    code = (
        "import sys, fluxclip.video\nprint([m for m in ('torch', 'av', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_decoder_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dotted name is a module anywhere on the path."""
    (tmp_path / "outside_decoder.py").write_text(
        "from fluxclip.video.decoders.pyav import open_video\n"
    )
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside_decoder.py").rename(tmp_path / "outside" / "decoder.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write_video(tmp_path / "v.mp4", grey_pictures(5))
    clip = read_clip(path, num_frames=2, decoder="outside.decoder")
    assert clip.frames_THWC.shape == (2, 48, 64, 3)


def test_probing_and_reading_at_once_gives_what_each_gives(
    emoji: Path, film: Path, decoder: str
) -> None:
    still = emoji / "stills" / "00a9-fe0f.webp"
    for path in (emoji / "clips" / "1f300.mp4", film, still):
        duration_s = probe(path, decoder=decoder).duration_s
        read = partial(probe_and_read, path, num_frames=5, side=48, fit="squash", decoder=decoder)
        info, clip = read(up_to_s=duration_s)
        alone = read_clip(path, num_frames=5, side=48, fit="squash", decoder=decoder)
        assert info == probe(path, decoder=decoder) and clip is not None
        np.testing.assert_array_equal(clip.frames_THWC, alone.frames_THWC)
        np.testing.assert_array_equal(clip.times_s, alone.times_s)
        if duration_s:
            assert read(up_to_s=duration_s - 0.01) == (info, None)
