"""Files that cannot be read: one line that names path and reason, and never a wrong frame."""

import gc
import pickle
import shutil
import weakref
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import decode_all, grey_pictures, on_screen, remux, write_video

from fluxclip.video import Clip, VideoError, probe, read_clip
from fluxclip.video.decoders import pyav
from fluxclip.video.framing import Framing


@pytest.fixture
def clip_path(emoji: Path) -> Path:
    return emoji / "clips" / "1f300.mp4"


@pytest.fixture(autouse=True)
def nothing_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> object:
    """FFmpeg's own messages stay off the terminal."""
    yield
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def refused(path: Path, reason: str, **wanted: object) -> VideoError:
    with pytest.raises(VideoError, match=reason) as caught:
        read_clip(path, **(wanted or {"num_frames": 4}))  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return caught.value


def test_missing_file(tmp_path: Path) -> None:
    for name in ("no.mp4", "no.png"):
        with pytest.raises(FileNotFoundError, match=name):
            read_clip(tmp_path / name, num_frames=1)
        with pytest.raises(FileNotFoundError, match=name):
            probe(tmp_path / name)


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    refused(tmp_path / "folder.mp4", "a folder")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"hello world\n" * 100, "not a video"),
        (b"1\n00:00:01,000 --> 00:00:04,000\nsubtitles\n\n", "no video in it"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot be opened"),
        (b"#EXTM3U\n#EXTINF:10,\nhttp://192.0.2.1/a.ts\n#EXT-X-ENDLIST\n", "not a video"),
    ],
    ids=["zero bytes", "text", "subtitles", "list of files", "list of addresses"],
)
def test_something_else_renamed(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "renamed.mp4"
    path.write_bytes(content)
    refused(path, reason)


def test_only_sound(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        samples = av.AudioFrame.from_ndarray(
            np.zeros((1, 44100), np.float32), format="flt", layout="mono"
        )
        samples.sample_rate = 44100
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    refused(path, "no video in it")


def test_end_of_the_file_missing_with_its_table_of_contents(
    clip_path: Path, tmp_path: Path
) -> None:
    data = clip_path.read_bytes()
    assert data.index(b"moov") > data.index(b"mdat")
    for keep in (0.2, 0.6, 0.95):
        path = tmp_path / "cut.mp4"
        path.write_bytes(data[: int(keep * len(data))])
        refused(path, "head or end is missing")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_data_cut_behind_a_whole_head(clip_path: Path, tmp_path: Path, suffix: str) -> None:
    """Frames before the cut are right, later ones an error: the last is never shown for them."""
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    whole = remux(clip_path, tmp_path / f"whole.{suffix}", **options)
    frames, times_s = decode_all(whole)
    data, path = whole.read_bytes(), tmp_path / f"cut.{suffix}"
    # The whole file but a byte; of Matroska less: its index and the last pictures in coding order,
    # which are not the last ones on screen, can go without a trace.
    end = len(data) - 1 if suffix == "mp4" else data.rindex(b"\x1c\x53\xbb\x6b") - 1000
    counts = []
    for num_bytes in np.linspace(0.2 * end, end, 12):
        path.write_bytes(data[: int(num_bytes)])
        refused(path, "cut short", times_s=times_s)  # at least one of all frames is lost
        counts.append(0)
        for wanted in range(3, len(times_s), 8):
            try:
                clip = read_clip(path, times_s=times_s[wanted : wanted + 1])
            except VideoError as error:
                assert "cut short" in str(error) and str(error).startswith(f"{path}: ")
                continue
            np.testing.assert_array_equal(clip.frames_THWC[0], frames[wanted])
            assert clip.times_s[0] == times_s[wanted]
            counts[-1] += 1
    assert counts == sorted(counts) and counts[-1] >= 7  # more data, more frames


def test_data_cut_between_two_pictures(clip_path: Path, tmp_path: Path) -> None:
    """Nothing is half there, and the lost picture is not the last on screen: still noticed."""
    whole, path = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    remux(clip_path, whole, movflags="faststart")
    frames, times_s = decode_all(whole)
    with av.open(str(whole)) as container:
        stream = container.streams.video[0]
        places = [(entry.pos, entry.timestamp) for entry in stream.index_entries]
        coded = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
    for lost in (1, 2, 3, 20):
        path.write_bytes(whole.read_bytes()[: places[-lost][0]])
        refused(path, "cut short", times_s=times_s)
        last_whole = sorted(coded)[: -lost - 8][-1] / 16000
        clip = read_clip(path, times_s=[last_whole])
        np.testing.assert_array_equal(clip.frames_THWC[0], frames[times_s == clip.times_s[0]][0])


def test_data_cut_far_away(assets: Path, tmp_path: Path) -> None:
    """A seek behind the cut is noticed too."""
    whole = remux(assets / "film" / "film_360p.mp4", tmp_path / "film.mp4", movflags="faststart")
    data, path = whole.read_bytes(), tmp_path / "cut.mp4"
    path.write_bytes(data[: len(data) // 3])
    refused(path, "cut short", times_s=[70.0], side=32)
    refused(path, "cut short", num_frames=8, side=32)
    early = read_clip(path, times_s=[3.0], side=32)
    np.testing.assert_array_equal(
        early.frames_THWC, read_clip(whole, times_s=[3.0], side=32).frames_THWC
    )


@pytest.mark.parametrize("place", [0, 1, 5, 20])
def test_a_damaged_picture_is_refused(clip_path: Path, tmp_path: Path, place: int) -> None:
    """Wherever it stands in coding order, the first keyframe included; later ones can be read."""
    whole, path = tmp_path / "whole.mp4", tmp_path / "damaged.mp4"
    remux(clip_path, whole, movflags="faststart")
    frames, times_s = decode_all(whole)
    with av.open(str(whole)) as container:
        stream = container.streams.video[0]
        keyframes = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
        entry = stream.index_entries[place]
        start, stop = entry.pos, entry.pos + entry.size
    damaged = bytearray(whole.read_bytes())
    damaged[start:stop] = bytes(stop - start)
    path.write_bytes(damaged)
    refused(path, "damaged", times_s=times_s)
    if place >= 5:  # earlier ones hide where the first frame ends
        behind = on_screen(times_s, np.array([keyframes[1] / 16000 + 0.5]))
        clip = read_clip(path, times_s=times_s[behind])
        np.testing.assert_array_equal(clip.frames_THWC, frames[behind])


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.mkv", "mpeg2video")])
def test_a_picture_that_the_decoder_patched_up_is_refused(
    assets: Path, tmp_path: Path, name: str, codec: str
) -> None:
    film = assets / "film" / "film_360p.mp4"
    moving = list(read_clip(film, times_s=np.arange(240, 264) / 24, side=96).frames_THWC)
    path = write_video(tmp_path / name, moving, codec=codec, tick=Fraction(1, 25))
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][9]
    middle = packet.pos + packet.size // 2
    damaged = bytearray(path.read_bytes())
    damaged[middle : middle + 8] = b"\xa5" * 8
    path.write_bytes(damaged)
    assert read_clip(path, times_s=[0.2]).frames_THWC.shape == (1, 96, 96, 3)
    for wanted in (9, 10):  # the next one refers to it
        refused(path, "damaged", times_s=[wanted / 25])


def test_a_recording_that_begins_between_keyframes(clip_path: Path, tmp_path: Path) -> None:
    """Time starts with the first picture that can be decoded, and ends with the last."""
    whole = remux(clip_path, tmp_path / "whole.ts").read_bytes()
    path = tmp_path / "recording.ts"
    path.write_bytes(whole[188 * 20 :])
    frames, times_s = decode_all(path)
    assert len(frames) == 24  # from the second keyframe on
    assert probe(path).duration_s == pytest.approx(24 * 0.042, abs=0.05)
    clip = read_clip(path, times_s=times_s)
    np.testing.assert_array_equal(clip.frames_THWC, frames)
    np.testing.assert_array_equal(clip.times_s, times_s)


def test_only_what_is_needed_is_decoded(assets: Path, tmp_path: Path) -> None:
    """Damage between the first frame and the keyframe before a wanted one does not matter."""
    film, path = assets / "film" / "film_360p.mp4", tmp_path / "damaged.mp4"
    with av.open(str(film)) as container:
        index = container.streams.video[0].index_entries
        start, stop = index[10].pos, index[1100].pos  # frames at 0.4 and 45.8 s
    damaged = bytearray(film.read_bytes())
    damaged[start:stop] = bytes(stop - start)
    path.write_bytes(damaged)
    late = {"times_s": [56.0, 57.0, 74.0], "side": 32}
    np.testing.assert_array_equal(
        read_clip(path, **late).frames_THWC,  # type: ignore[arg-type]
        read_clip(film, **late).frames_THWC,  # type: ignore[arg-type]
    )
    refused(path, "damaged", times_s=[20.0])


def test_a_song_with_a_cover_is_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=44100)
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 48, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.start_encoding()
        picture = av.VideoFrame.from_ndarray(grey_pictures(1)[0], format="rgb24")
        picture.pts = 0
        container.mux([*cover.encode(picture), *cover.encode()])
        silence = np.zeros((1, 44100), np.float32)
        samples = av.AudioFrame.from_ndarray(silence, format="flt", layout="mono")
        samples.sample_rate = 44100
        container.mux([*sound.encode(samples), *sound.encode()])
    refused(path, "no video in it")


def test_damage_in_the_middle_raises_nothing_but_video_errors(
    clip_path: Path, tmp_path: Path
) -> None:
    whole = remux(clip_path, tmp_path / "whole.mp4", movflags="faststart")
    data, path = whole.read_bytes(), tmp_path / "damaged.mp4"
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(40):
        damaged = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, len(data), rng.choice([1, 20, 200]))
        damaged[places] = rng.integers(0, 256, len(places))
        path.write_bytes(damaged.tobytes())
        try:
            assert isinstance(read_clip(path, num_frames=4, side=32), Clip)
        except VideoError as error:
            num_refused += 1
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert num_refused > 10


def test_times_outside_the_video(clip_path: Path) -> None:
    refused(clip_path, "start_s=3.1 is outside: it lasts 3.02", num_frames=2, start_s=3.1)
    refused(clip_path, "start_s=-1 is outside", num_frames=2, start_s=-1.0)
    refused(clip_path, "end_s=1 must come after start_s=1", num_frames=2, start_s=1.0, end_s=1.0)
    refused(clip_path, "end_s=0.5 must come after", num_frames=2, start_s=1.0, end_s=0.5)
    refused(clip_path, "no frame at 3.5 s, it lasts 3.02", times_s=[1.0, 3.5])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "either num_frames or times_s"),
        ({"num_frames": 2, "times_s": [0.0]}, "either num_frames or times_s"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"times_s": []}, "at least one time"),
        ({"times_s": [1.0, 0.5]}, "ascending"),
        ({"times_s": [-0.5]}, "not negative"),
        ({"times_s": [float("nan")]}, "ascending"),
        ({"times_s": [0.5], "start_s": 0.2}, "start_s and end_s go with num_frames"),
        ({"num_frames": 1, "side": 0}, "side must be at least 1"),
        ({"num_frames": 1, "fit": "stretch"}, "fit must be 'crop' or 'squash'"),
        ({"num_frames": 1, "crop": (0.5, 0.0, 0.5, 1.0)}, "top < bottom"),
        ({"num_frames": 1, "crop": (0.0, 0.0, 1.5, 1.0)}, "fractions in"),
        ({"num_frames": 1, "decoder": "pyavv"}, "did you mean 'pyav'"),
    ],
)
def test_arguments_that_no_file_could_meet(
    clip_path: Path, arguments: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        read_clip(clip_path, **arguments)  # type: ignore[arg-type]


def test_pictures_that_change_size_need_a_side(tmp_path: Path) -> None:
    """As in recordings of a call: two streams of different size in one transport stream."""
    coding = {"g": "5", "repeat-headers": "1"}
    parts = [
        write_video(
            tmp_path / f"{width}.ts",
            grey_pictures(10, width=width),
            times_s=[start_s + i / 25 for i in range(10)],
            coding=coding,
        )
        for width, start_s in ((64, 0.0), (96, 0.8))
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    clip = read_clip(path, times_s=[0.0, 1.0], side=16)
    assert clip.frames_THWC.shape == (2, 16, 16, 3)
    refused(path, "change size on the way; give a side", times_s=[0.0, 1.0])


def test_names_that_look_like_addresses_are_files(
    clip_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("http:x.mp4", "concat:a|b.mp4", "50% off #1.mp4", "Ünï.mp4", "-.mp4"):
        shutil.copy(clip_path, tmp_path / name)
        assert read_clip(name, num_frames=1, side=8).frames_THWC.shape == (1, 8, 8, 3)


def test_errors_travel_between_processes(tmp_path: Path) -> None:
    for path in (tmp_path / "a.mp4", "./a.mp4"):
        error = VideoError(path, "two\n lines")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is VideoError and again.path == error.path == Path(path)
        assert str(again) == str(error) == f"{path}: two lines"


def test_pixels_that_cannot_be_converted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.nut", grey_pictures(2), codec="rawvideo", pixels="rgb4")
    refused(path, r"its pictures \(rgb4\) cannot be converted", num_frames=1)
    refused(path, r"its pictures \(rgb4\) cannot be converted", num_frames=1, side=16)


def test_a_closed_file_leaves_nothing_to_the_garbage_collector(
    clip_path: Path, tmp_path: Path
) -> None:
    """Read as wanted, refused half way, or refused on opening."""
    broken = write_video(tmp_path / "a.nut", grey_pictures(2), codec="rawvideo", pixels="rgb4")
    cut = remux(clip_path, tmp_path / "cut.mp4", movflags="faststart")
    cut.write_bytes(cut.read_bytes()[:4000])

    def alive() -> Counter[str]:
        kinds = (type(thing) for thing in gc.get_objects())
        names = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
        return Counter(name for name in names if name.startswith(("av.", pyav.__name__)))

    gc.collect()
    gc.disable()
    try:
        before = alive()
        with pyav.open_video(clip_path) as video:
            watched = weakref.ref(video)
            assert alive() > before
        del video
        assert watched() is None
        read_clip(clip_path, num_frames=3, side=32, crop=(0.1, 0.1, 0.5, 0.5))
        for path in (broken, cut):
            with suppress(VideoError):  # pytest.raises would leave a cycle of its own
                read_clip(path, num_frames=1)
                pytest.fail("it can be read")
        assert alive() == before
    finally:
        gc.enable()


def test_an_error_that_is_kept_keeps_no_pictures(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.nut", grey_pictures(2), codec="rawvideo", pixels="rgb4")
    with pytest.raises(VideoError), pyav.open_video(path) as video:
        video.read(np.zeros(1), Framing())
    assert not vars(video)
