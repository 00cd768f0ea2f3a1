"""What every decoder is held to: the frames and times of pyav, or an error; never another frame."""

import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from video_files import grey_pictures, remux, write_video

from fluxclip import plugins
from fluxclip.doctor import findings
from fluxclip.video import Clip, VideoError, probe, read_clip
from fluxclip.video.decoders._by_number import NumberedVideo
from fluxclip.video.framing import Framing


@pytest.fixture(autouse=True)
def nothing_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


@pytest.fixture(scope="session")
def film(assets: Path) -> Path:
    return assets / "film" / "film_360p.mp4"


@pytest.fixture(scope="session")
def moving(film: Path) -> list[np.ndarray]:
    """Pictures of a film, 24 of 360 x 640 with a cut between the twelfth and the thirteenth."""
    times_s = np.concatenate([np.arange(240, 252), np.arange(720, 732)]) / 24
    return list(read_clip(film, times_s=times_s).frames_THWC)


def assert_like_pyav(path: Path, decoder: str, *, most: float = 2.0, **wanted: Any) -> Clip:
    """Equal times, and frames that differ by at most so many grey levels on average, each."""
    expected = read_clip(path, **wanted)
    clip = read_clip(path, decoder=decoder, **wanted)
    np.testing.assert_array_equal(clip.times_s, expected.times_s)
    assert clip.frames_THWC.shape == expected.frames_THWC.shape
    difference = np.abs(clip.frames_THWC.astype(int) - expected.frames_THWC)
    assert difference.mean(axis=(1, 2, 3)).max() <= most
    assert probe(path, decoder=decoder) == probe(path)
    return clip


@pytest.mark.parametrize("name", ["film_360p", "film_720p"])
def test_films(assets: Path, other_decoder: str, name: str) -> None:
    path = assets / "film" / f"{name}.mp4"
    duration_s = probe(path).duration_s
    anywhere_s = np.sort(np.random.default_rng(0).uniform(0, duration_s, 5))
    assert_like_pyav(path, other_decoder, num_frames=8, side=224)
    assert_like_pyav(path, other_decoder, times_s=[*anywhere_s, duration_s - 1e-4], side=96)
    assert_like_pyav(path, other_decoder, times_s=[7.3], fit="squash", side=64)
    assert_like_pyav(path, other_decoder, times_s=[7.3])


def test_emoji_clips(emoji: Path, other_decoder: str) -> None:
    for name in ("1f300", "1f308", "1f436"):
        path = emoji / "clips" / f"{name}.mp4"
        assert_like_pyav(path, other_decoder, times_s=np.arange(0, 2.9, 0.02))
        assert_like_pyav(path, other_decoder, num_frames=11, side=112)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate_and_pictures_in_another_order(
    tmp_path: Path, moving: list[np.ndarray], other_decoder: str, suffix: str
) -> None:
    times_s = [0, 0.04, 0.08, 1.0, 1.02, 1.03, 3.0, 3.5, 3.52, 3.54, 9.0, 9.04, 9.08]
    coding = {"bf": "2", "b_strategy": "0", "g": "5", "preset": "veryfast"}
    path = write_video(tmp_path / f"v.{suffix}", moving[6:19], times_s=times_s, coding=coding)
    wanted_s = np.sort(np.random.default_rng(1).uniform(0, 9.1, 12))
    assert_like_pyav(path, other_decoder, times_s=wanted_s, side=128)
    for time_s in times_s:
        assert_like_pyav(path, other_decoder, times_s=[time_s], side=128)


def test_a_file_that_begins_late(tmp_path: Path, emoji: Path, other_decoder: str) -> None:
    source = emoji / "clips" / "1f300.mp4"
    for suffix in ("mp4", "mkv"):
        late = remux(source, tmp_path / f"late.{suffix}", shift_s=100.0)
        clip = assert_like_pyav(late, other_decoder, num_frames=6, side=112)
        assert clip.times_s[0] < 1


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_crops_of_a_phone_video(
    tmp_path: Path, moving: list[np.ndarray], other_decoder: str, rotation: int
) -> None:
    """A sample of colour is that of two pixels: cuts begin at the same ones, wherever asked for."""
    coding = {"preset": "veryfast"}
    path = write_video(tmp_path / "p.mp4", moving[:4], rotation=rotation, coding=coding)
    for box in ((0.1, 0.2, 0.5, 0.9), (0.123, 0.077, 0.9, 0.5), (0.0, 0.0, 1.0, 1.0)):
        assert_like_pyav(path, other_decoder, num_frames=2, crop=box)
        assert_like_pyav(path, other_decoder, num_frames=2, crop=box, side=90)


def test_bytes_in_memory(film: Path, other_decoder: str) -> None:
    wanted: dict[str, Any] = {"times_s": [3.0, 40.0], "side": 64, "decoder": other_decoder}
    from_bytes = read_clip("shard/film.mp4", content=film.read_bytes(), **wanted)
    np.testing.assert_array_equal(from_bytes.frames_THWC, read_clip(film, **wanted).frames_THWC)


OPEN_GROUPS = "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"
DIFFICULT: dict[str, dict[str, Any]] = {
    "fragmented.mp4": {"muxing": {"movflags": "frag_keyframe+empty_moov"}},
    "live.mkv": {"muxing": {"live": "1"}},
    "sound.mkv": {"sound_s": 7.0},
    "a.webm": {"codec": "libvpx-vp9", "coding": {"deadline": "realtime", "cpu-used": "8"}},
    "a.avi": {"codec": "mpeg4", "tick": Fraction(1, 25), "coding": {"bf": "2", "g": "15"}},
    "a.mpg": {"codec": "mpeg2video", "coding": {"bf": "2", "g": "12"}, "tick": Fraction(1, 25)},
    "a.ts": {"coding": {"g": "12"}},
    "a.flv": {},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
    "open.mp4": {"coding": {"x264-params": OPEN_GROUPS}},
    "open.mkv": {"coding": {"x264-params": OPEN_GROUPS}},
    "open_hevc.mp4": {
        "codec": "libx265", "coding": {"x265-params": f"{OPEN_GROUPS}:log-level=none"},
    },
    "refresh.mp4": {
        "coding": {"x264-params": "intra-refresh=1:keyint=12:bframes=0:scenecut=0"},
    },
    "10bit.mp4": {"pixels": "yuv420p10le"},
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFICULT)
def test_the_right_frame_or_an_error(tmp_path: Path, decoder: str, name: str) -> None:
    """Neighbours differ by 37 grey levels; pyav reads them all."""
    how = {"times_s": [i / 25 for i in range(60)], **DIFFICULT[name]}
    path = write_video(tmp_path / name, grey_pictures(60), **how)
    for wanted_s in ([0.0, 1.3, 1.9], [1.9], [0.9], list(np.arange(0.62, 1.7, 0.04))):
        try:
            clip = read_clip(path, times_s=wanted_s, decoder=decoder)
        except VideoError as error:
            assert decoder != "pyav"
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            assert "read it with pyav" in str(error)
            continue
        expected = read_clip(path, times_s=wanted_s)
        np.testing.assert_array_equal(clip.times_s, expected.times_s)
        assert np.abs(clip.frames_THWC.astype(int) - expected.frames_THWC).max() <= 4


def test_a_seek_into_pictures_that_refer_to_what_was_before_is_refused(
    tmp_path: Path, moving: list[np.ndarray], other_decoder: str
) -> None:
    """The libraries take them for whole; there the picture is grey, or of before the cut."""
    coding = {"x264-params": "intra-refresh=1:keyint=8:bframes=0:scenecut=0", "preset": "veryfast"}
    path = write_video(tmp_path / "r.mp4", moving, coding=coding)
    with pytest.raises(VideoError, match="before a keyframe"):
        read_clip(path, times_s=[0.6], decoder=other_decoder)


# ---- files that cannot be read ----


def refused(path: Path, decoder: str, reason: str, **wanted: Any) -> None:
    with pytest.raises(VideoError, match=reason) as caught:
        read_clip(path, decoder=decoder, **(wanted or {"num_frames": 4}))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_what_is_no_video(tmp_path: Path, decoder: str) -> None:
    with pytest.raises(FileNotFoundError, match="missing.mp4"):
        read_clip(tmp_path / "missing.mp4", num_frames=1, decoder=decoder)
    for content, reason in ((b"", "empty"), (b"hello world\n" * 100, "not a video")):
        path = tmp_path / "renamed.mp4"
        path.write_bytes(content)
        refused(path, decoder, reason)


def test_a_file_that_is_cut_short(tmp_path: Path, emoji: Path, decoder: str) -> None:
    whole = remux(emoji / "clips" / "1f300.mp4", tmp_path / "whole.mp4", movflags="faststart")
    path, data = tmp_path / "cut.mp4", whole.read_bytes()
    for keep in (0.3, 0.6, 0.9):
        path.write_bytes(data[: int(keep * len(data))])
        refused(path, decoder, "cut short", times_s=[2.9])
        refused(path, decoder, "cut short", num_frames=8)


def test_damage_gives_right_frames_or_an_error(
    tmp_path: Path, moving: list[np.ndarray], decoder: str
) -> None:
    """Also of frames that are asked for after one that could not be decoded."""
    coding = {"g": "6", "bf": "2", "preset": "veryfast"}
    whole = write_video(tmp_path / "whole.mp4", moving, coding=coding)
    expected = read_clip(whole, times_s=np.arange(24) / 25).frames_THWC.astype(int)
    with av.open(str(whole)) as container:
        entries = [(e.pos, e.size) for e in container.streams.video[0].index_entries]
    damaged, path = bytearray(whole.read_bytes()), tmp_path / "damaged.mp4"
    start, size = entries[13]
    damaged[start : start + size] = bytes(size)
    path.write_bytes(damaged)
    refused(path, decoder, "damaged|cannot decode", times_s=np.arange(24) / 25)
    for number in range(24):
        try:
            clip = read_clip(path, times_s=[number / 25], decoder=decoder)
        except VideoError:
            continue
        assert np.abs(clip.frames_THWC[0] - expected[number]).mean() <= 2


# ---- what a library is held to ----


class Grey:
    """A library that counts and times the pictures of a file as it is told to."""

    name = "grey"
    errors = (RuntimeError,)

    def __init__(self, num_pictures: int, *, late_s: float = 0.0, height: int = 48) -> None:
        self.num_pictures, self.late_s, self.height = num_pictures, late_s, height

    def open(self, source: str | bytes) -> int:
        return self.num_pictures

    def picture(self, number: int) -> tuple[npt.NDArray[np.uint8], float]:
        return np.full((self.height, 64, 3), number, np.uint8), number / 25 + self.late_s


def test_a_library_that_counts_or_times_otherwise_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", grey_pictures(10))
    times_s = np.array([0.0, 0.1, 0.12, 0.15])
    frames, shown_s = NumberedVideo(path, None, Grey(10)).read(times_s, Framing())
    assert frames[:, 0, 0, 0].tolist() == [0, 2, 3, 3]
    np.testing.assert_allclose(shown_s, [0.0, 0.08, 0.12, 0.12])
    for num_pictures in (9, 11):
        with pytest.raises(VideoError, match=f"grey finds {num_pictures} of its 10 pictures"):
            NumberedVideo(path, None, Grey(num_pictures))
    with pytest.raises(VideoError, match="the picture of 0.120 s where that of 0.080 s"):
        NumberedVideo(path, None, Grey(10, late_s=0.04)).read(times_s[1:], Framing())
    with pytest.raises(VideoError, match="another size"):
        NumberedVideo(path, None, Grey(10, height=24)).read(times_s, Framing())


@pytest.mark.parametrize(
    ("name", "remedy"), [("torchcodec", "apt-get install ffmpeg"), ("decord", "pip install")]
)
def test_a_library_that_is_missing_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"fluxclip.video.decoders.{name}", raising=False)
    path = write_video(tmp_path / "v.mp4", grey_pictures(3))
    with pytest.raises(ValueError, match=remedy) as caught:
        read_clip(path, num_frames=1, decoder=name)
    assert "\n" not in str(caught.value)


def test_doctor_says_which_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = findings()
    assert facts["video decoder"].startswith("pyav ") and "default" in facts["video decoder"]
    for name in ("torchcodec", "decord"):
        said = facts[f"decoder {name}"]
        assert said.endswith("can be chosen") or said.startswith("cannot be chosen: ")
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.delitem(sys.modules, "fluxclip.video.decoders.decord", raising=False)
    assert "pip install 'fluxclip[decord]'" in findings()["decoder decord"]


def test_names_that_begin_with_an_underscore_are_no_decoders() -> None:
    assert plugins.available("fluxclip.video.decoders") == ["decord", "pyav", "torchcodec"]
