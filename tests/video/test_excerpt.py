"""A part of a video as a video: the same frames at the same times, with their sound."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import decode_all, grey_pictures, write_video

from fluxclip.video import VideoError, chunk_writer, probe
from fluxclip.video.chunks import Settings
from fluxclip.video.excerpt import write_excerpt


def excerpt(path: Path, target: Path, **options: object) -> Path:
    with open(target, "w+b") as file:
        write_excerpt(path, file, **options)  # type: ignore[arg-type]
    return target


def levels(pictures_THWC: np.ndarray) -> np.ndarray:
    return pictures_THWC.mean((1, 2, 3))


@pytest.mark.parametrize(("start_s", "end_s"), [(0.0, 2.0), (0.4, 1.2), (0.43, 1.19), (1.0, 99.0)])
def test_frames_and_times_are_those_of_the_interval(
    tmp_path: Path, start_s: float, end_s: float
) -> None:
    path = write_video(tmp_path / "grey.mp4", grey_pictures(50))
    pictures, times_s = decode_all(path)
    cut, cut_times_s = decode_all(excerpt(path, tmp_path / "cut.mp4", start_s=start_s, end_s=end_s))
    first = np.searchsorted(times_s, start_s + 1e-6, side="right") - 1
    inside = [first, *(i for i in range(first + 1, 50) if times_s[i] < end_s)]
    expected_s = np.maximum(times_s[inside] - start_s, 0)
    np.testing.assert_allclose(cut_times_s, expected_s, atol=1.1e-3)
    np.testing.assert_allclose(levels(cut), levels(pictures[inside]), atol=3)
    duration_s = probe(tmp_path / "cut.mp4").duration_s
    assert duration_s == pytest.approx(min(end_s, 2.0) - start_s, abs=2e-3)


def test_uneven_rates_keep_their_times(tmp_path: Path) -> None:
    times_s = [0.0, 0.04, 0.5, 0.54, 1.3, 1.34, 1.38, 2.0]
    path = write_video(tmp_path / "uneven.mkv", grey_pictures(8), times_s=times_s)
    pictures, cut_times_s = decode_all(excerpt(path, tmp_path / "cut.mp4", start_s=0.6, end_s=1.36))
    np.testing.assert_allclose(cut_times_s, [0.0, 0.7, 0.74], atol=1e-3)
    np.testing.assert_allclose(levels(pictures), levels(decode_all(path)[0][3:6]), atol=3)


def test_pictures_come_upright_small_and_even(tmp_path: Path) -> None:
    pictures = grey_pictures(10, width=99, height=63)
    for i, picture in enumerate(pictures):
        picture[:, :50] = 255 - 10 * i
    path = write_video(tmp_path / "turned.mkv", pictures, pixels="yuv444p", rotation=90)
    info = probe(path)
    assert (info.width, info.height) == (63, 99)
    small = probe(excerpt(path, tmp_path / "s.mp4", start_s=0.0, end_s=0.2, side=40))
    assert max(small.width, small.height) <= 40
    assert small.width % 2 == small.height % 2 == 0
    whole, _ = decode_all(excerpt(path, tmp_path / "w.mp4", start_s=0.0, end_s=0.2))
    top, bottom = whole[0][:40].mean(), whole[0][60:].mean()
    assert abs(top - bottom) > 100  # what was left is at an end now, not at a side


def test_a_folder_of_chunks_gives_what_its_video_gives(tmp_path: Path) -> None:
    film = write_video(tmp_path / "grey.mp4", grey_pictures(90, width=128, height=96))
    folder = tmp_path / "film.chunks"
    chunk_writer.write([(film, folder)], settings=Settings(seconds=1, side=96))
    span = {"start_s": 0.7, "end_s": 3.3}
    ours, times_s = decode_all(excerpt(folder, tmp_path / "a.mp4", side=96, **span))
    theirs, expected_s = decode_all(excerpt(film, tmp_path / "b.mp4", side=96, **span))
    np.testing.assert_allclose(times_s, expected_s, atol=1e-3)
    assert np.abs(ours.astype(int) - theirs).mean() < 4


def tone_file(path: Path, *, begin_s: float = 0.0, rate: int = 44_100) -> Path:
    """Three seconds of pictures, and a sound that is there in [1, 2) only."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=rate, layout="stereo")
        for i, picture in enumerate(grey_pictures(75)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            container.mux(video.encode(frame))
        container.mux(video.encode())
        at_s = np.arange(round(begin_s * rate), 3 * rate) / rate
        wave = 0.5 * np.sin(2 * np.pi * 440 * at_s) * ((at_s >= 1) & (at_s < 2))
        samples = av.AudioFrame.from_ndarray(
            np.stack([wave, wave]).astype(np.float32), format="fltp", layout="stereo"
        )
        samples.sample_rate, samples.pts = rate, round(begin_s * rate)
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    return path


def loud_from_to(path: Path) -> tuple[float, float]:
    """When the sound of a file begins and ends to be loud, in seconds of its clock."""
    with av.open(str(path)) as container:
        loud = _loud(container)
    return loud[0], loud[-1]


def _loud(container: av.container.InputContainer) -> list[float]:
    found: list[float] = []
    for frame in container.decode(audio=0):
        at = np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.2)
        found += [frame.time + i / frame.sample_rate for i in at]
    return found


@pytest.mark.parametrize(
    ("name", "begin_s", "start_s"),
    [
        ("tone.mp4", 0.0, 0.48),
        ("tone.mp4", 0.0, 1.6),  # after a seek
        ("late.mp4", 0.8, 0.48),
        ("tone.mkv", 0.0, 1.6),
        ("tone.ts", 0.0, 0.48),
        ("tone.ts", 0.0, 1.6),
    ],
)
def test_sound_is_cut_at_the_same_times(
    tmp_path: Path, name: str, begin_s: float, start_s: float
) -> None:
    path = tone_file(tmp_path / name, begin_s=begin_s)
    cut = excerpt(path, tmp_path / "cut.mp4", start_s=start_s, end_s=2.52)
    begin, end = loud_from_to(cut)
    assert begin == pytest.approx(max(0.0, 1 - start_s), abs=0.01)
    assert end == pytest.approx(2 - start_s, abs=0.01)
    with av.open(str(cut)) as container:
        (sound,) = container.streams.audio
        assert (sound.codec_context.name, sound.codec_context.sample_rate) == ("aac", 48_000)
        assert float(sound.duration * sound.time_base) == pytest.approx(2.52 - start_s, abs=0.05)
        assert container.streams.video[0].codec_context.name == "h264"


def test_sound_that_is_damaged_is_silent_for_as_long(tmp_path: Path) -> None:
    path = tone_file(tmp_path / "tone.mp4")
    with av.open(str(path)) as container:
        packets = [
            p for p in container.demux(audio=0) if p.size and 1.4 < p.pts * p.time_base < 1.6
        ]
        places = [(packet.pos, packet.size) for packet in packets]
    content = bytearray(path.read_bytes())
    for at, size in places:
        content[at : at + size] = b"\xff" * size
    path.write_bytes(content)
    with av.open(str(path)) as container, pytest.raises(av.FFmpegError):
        list(container.decode(audio=0))
    begin, end = loud_from_to(excerpt(path, tmp_path / "cut.mp4", start_s=0.5, end_s=2.5))
    assert (begin, end) == (pytest.approx(0.5, abs=0.01), pytest.approx(1.5, abs=0.01))


def test_sound_can_be_left_out(tmp_path: Path) -> None:
    path = tone_file(tmp_path / "tone.mp4")
    cut = excerpt(path, tmp_path / "cut.mp4", start_s=0.5, end_s=2.5, sound="drop")
    with av.open(str(cut)) as container:
        assert not container.streams.audio


def test_a_still_is_shown_for_as_long_as_is_asked(emoji: Path, tmp_path: Path) -> None:
    still = next((emoji / "stills").iterdir())
    pictures, _ = decode_all(excerpt(still, tmp_path / "s.mp4", start_s=0.0, end_s=3.0, side=96))
    assert len(pictures) == 1
    assert probe(tmp_path / "s.mp4").duration_s == pytest.approx(3.0)


def test_what_is_not_there_is_said_in_a_line(tmp_path: Path) -> None:
    path = write_video(tmp_path / "grey.mp4", grey_pictures(25))
    with pytest.raises(VideoError, match=r"nothing in \[1.5, 2\) s: it lasts 1 s"):
        write_excerpt(path, io.BytesIO(), start_s=1.5, end_s=2.0)
    with pytest.raises(FileNotFoundError, match="gone.mp4"):
        write_excerpt(tmp_path / "gone.mp4", io.BytesIO(), start_s=0.0, end_s=2.0)


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    path = write_video(tmp_path / "grey.mp4", grey_pictures(25))
    with pytest.raises(OSError, match="No space left on device"):
        write_excerpt(path, Full(), start_s=0.0, end_s=1.0)
