"""Folders of chunks: the frames and times of the video, whole at any moment, one crop per clip."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_files import grey_pictures, level_of, on_screen, remux, write_video

from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.sources import MissingFiles, annotations, missing
from fluxclip.tokens.budget import FluxSampling
from fluxclip.video import VideoError, probe, read_clip
from fluxclip.video.chunk_writer import Report, find, write
from fluxclip.video.chunks import TABLE, Settings, contents

FIVE_SECONDS = Settings(seconds=5)


def psnr_T(a_THWC: np.ndarray, b_THWC: np.ndarray) -> np.ndarray:
    """Of each frame, in dB."""
    error_T = ((a_THWC.astype(float) - b_THWC) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error_T, 1e-9))


@pytest.fixture(scope="session")
def film(assets: Path) -> Path:
    """24 s at 24 frames per second, with a keyframe every ten."""
    return assets / "film" / "film_720p.mp4"


@pytest.fixture(scope="session")
def made(film: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The film in chunks of five seconds."""
    folder = tmp_path_factory.mktemp("made") / "film.chunks"
    report = write([(film, folder)], settings=FIVE_SECONDS, workers=2)
    assert (report.written, report.kept, report.failed) == ([folder], [], {})
    return folder


@pytest.fixture(scope="session")
def in_one_piece(film: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The film coded in the same way, without cuts."""
    folder = tmp_path_factory.mktemp("one") / "film.chunks"
    write([(film, folder)], settings=Settings(seconds=1000))
    return folder / "000000.mp4"


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run_cli(*arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fluxclip.cli", "chunk", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# ---- frames and times ----


def test_every_frame_is_there_once_at_its_time(film: Path, made: Path, in_one_piece: Path) -> None:
    assert sorted(files_in(made)) == [f"{start:06d}.mp4" for start in range(0, 24, 5)] + [TABLE]
    assert sum(probe(path).num_frames or 0 for path in made.glob("*.mp4")) == 24 * 24
    info, of_film = probe(made), probe(film)
    assert (info.path, info.width, info.height, info.num_frames) == (made, 512, 288, 24 * 24)
    assert (info.duration_s, info.fps) == (of_film.duration_s, of_film.fps)

    every_s = np.arange(24 * 24) / 24
    clip = read_clip(made, times_s=every_s, side=128)
    np.testing.assert_array_equal(clip.times_s, every_s)
    uncut = read_clip(in_one_piece, times_s=every_s, side=128)
    assert psnr_T(clip.frames_THWC, uncut.frames_THWC).min() >= 40
    source = read_clip(film, times_s=every_s[::7], side=128)
    assert psnr_T(clip.frames_THWC[::7], source.frames_THWC).min() >= 36

    wanted_s = np.sort(np.random.default_rng(0).uniform(0, 24, 40))
    np.testing.assert_array_equal(
        read_clip(made, times_s=wanted_s, side=32).times_s,
        read_clip(film, times_s=wanted_s, side=32).times_s,
    )


def test_a_clip_across_a_boundary_has_one_crop(made: Path, in_one_piece: Path) -> None:
    wanted_s = [4.8, 4.99, 5.0, 5.02, 5.2, 9.99, 10.0]
    crop = (0.113, 0.297, 0.771, 0.683)
    clip = read_clip(made, times_s=wanted_s, side=96, crop=crop)
    uncut = read_clip(in_one_piece, times_s=wanted_s, side=96, crop=crop)
    np.testing.assert_array_equal(clip.times_s, np.floor(np.array(wanted_s) * 24 + 1e-6) / 24)
    assert psnr_T(clip.frames_THWC, uncut.frames_THWC).min() >= 38
    again = read_clip(made, times_s=wanted_s, side=96, crop=crop)
    np.testing.assert_array_equal(again.frames_THWC, clip.frames_THWC)
    for time_s, frame in zip(wanted_s, clip.frames_THWC, strict=True):
        alone = read_clip(made, times_s=[time_s], side=96, crop=crop)
        np.testing.assert_array_equal(alone.frames_THWC[0], frame)


def test_only_chunks_with_wanted_times_are_opened(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "film.chunks"))
    for name in ("000000.mp4", "000015.mp4", "000020.mp4"):
        (copy / name).write_bytes(bytes((copy / name).stat().st_size))
    clip = read_clip(copy, num_frames=4, start_s=8, end_s=12, side=32)
    expected = read_clip(made, num_frames=4, start_s=8, end_s=12, side=32)
    np.testing.assert_array_equal(clip.frames_THWC, expected.frames_THWC)
    with pytest.raises(VideoError, match=r"000015\.mp4"):
        read_clip(copy, num_frames=4, start_s=8, end_s=18, side=32)


UNEVEN_S = [0, 0.04, 0.08, 1.0, 1.02, 1.03, 3.0, 3.5, 3.52, 3.54, 9.0, 9.04, 9.08]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_uneven_times_stay_uneven(tmp_path: Path, suffix: str) -> None:
    """Frames that stay for seconds: some chunks have no frame of their own, and are no files."""
    pictures = grey_pictures(len(UNEVEN_S))
    video = write_video(tmp_path / f"v.{suffix}", pictures, times_s=UNEVEN_S, coding={"bf": "2"})
    folder = tmp_path / "v.chunks"
    assert write([(video, folder)], settings=Settings(seconds=1), workers=3).failed == {}
    assert [path.stem for path in sorted(folder.glob("*.mp4"))] == [
        "000000", "000001", "000003", "000009",
    ]  # fmt: skip
    wanted_s = np.arange(0, 9.1, 0.01)
    clip = read_clip(folder, times_s=wanted_s)
    expected = on_screen(np.array(UNEVEN_S), wanted_s + 1e-6)
    np.testing.assert_array_equal(clip.times_s, read_clip(video, times_s=wanted_s).times_s)
    np.testing.assert_allclose(clip.times_s, np.array(UNEVEN_S)[expected], atol=1e-9)
    levels = clip.frames_THWC.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, [level_of(i) for i in expected], atol=3)


def _colours(index: int) -> np.ndarray:
    """A picture without symmetry, smooth, of many colours, unlike its neighbours in time."""
    y, x = np.mgrid[0:76, 0:100]
    x = x + 3 * index
    waves = [np.sin(x / 25 + y / 90), np.sin(x / 40 - y / 30), np.sin(x / 60 + y / 20 + 1)]
    return (128 + 100 * np.stack(waves, axis=2)).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "writing"),
    [
        ("sideways.mp4", {"rotation": 90}),
        ("upside_down.mp4", {"rotation": 180}),
        ("phone.mp4", {"rotation": -90}),
        ("full_range.mp4", {"pixels": "yuvj420p"}),
        ("fine_colours.mkv", {"pixels": "yuv444p"}),
        ("a.gif", {"codec": "gif", "pixels": "rgb8"}),
        ("shifted.mkv", {}),
        ("program_stream.mpg", {"codec": "mpeg2video", "tick": Fraction(1, 25)}),
    ],
)
def test_pictures_look_the_same(tmp_path: Path, name: str, writing: dict[str, Any]) -> None:
    """Upright, in the same colours, whatever they were stored as."""
    pictures = [_colours(i) for i in range(40)]
    if name == "shifted.mkv":
        video = remux(write_video(tmp_path / "v.mp4", pictures), tmp_path / name, shift_s=7.3)
    else:
        video = write_video(tmp_path / name, pictures, **writing)
    folder = tmp_path / "v.chunks"
    assert write([(video, folder)], settings=Settings(seconds=1, side=64)).failed == {}
    of_video, info = probe(video), probe(folder)
    assert min(info.width, info.height) == 64
    assert (info.width > info.height) == (of_video.width > of_video.height)
    wanted_s = np.arange(0, of_video.duration_s - 1e-3, 0.13)
    expected = read_clip(video, times_s=wanted_s, side=64, fit="squash")
    clip = read_clip(folder, times_s=wanted_s, side=64, fit="squash")
    np.testing.assert_array_equal(clip.times_s, expected.times_s)
    assert psnr_T(clip.frames_THWC, expected.frames_THWC).min() >= 30
    means = [c.frames_THWC.mean(axis=(0, 1, 2)) for c in (clip, expected)]
    np.testing.assert_allclose(means[0], means[1], atol=2)


# ---- writing ----


@pytest.fixture(scope="session")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty seconds, small."""
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", grey_pictures(1000))


def test_any_number_of_workers_writes_the_same_bytes(long_video: Path, tmp_path: Path) -> None:
    folders = [tmp_path / str(workers) / "v.chunks" for workers in (1, 2, 5)]
    for workers, folder in zip((1, 2, 5), folders, strict=True):
        write([(long_video, folder)], settings=Settings(seconds=3), workers=workers)
    assert len(files_in(folders[0])) == 14 + 1
    assert files_in(folders[0]) == files_in(folders[1]) == files_in(folders[2])


def test_killed_and_run_again_it_goes_on(film: Path, long_video: Path, tmp_path: Path) -> None:
    settings, whole = Settings(seconds=3, side=64), 2
    options = ("--output", tmp_path / "out", "--seconds", 3, "--side", 64, "--workers", 2)
    arguments = (film, long_video, *options)
    part = tmp_path / "out" / f".{film.name}.chunks.part"
    process = run_cli(*arguments)
    while len(list(part.glob("0*.json"))) < whole and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / f"{film.name}.chunks").exists()
    kept = {path.stem: path.stat().st_mtime_ns for path in part.glob("0*.json")}
    assert len(kept) >= whole
    changed = {stem: (part / "chunks" / f"{stem}.mp4").stat().st_mtime_ns for stem in kept}

    _, errors = (again := run_cli(*arguments)).communicate()
    assert again.returncode == 0, errors
    folder = tmp_path / "out" / f"{film.name}.chunks"
    assert {stem: (folder / f"{stem}.mp4").stat().st_mtime_ns for stem in kept} == changed
    straight = tmp_path / "straight.chunks"
    write([(film, straight)], settings=settings)
    assert files_in(folder) == files_in(straight)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{film.name}.chunks", f"{long_video.name}.chunks",
    ]  # fmt: skip
    report = write([(film, folder)], settings=settings)
    assert (report.written, report.kept) == ([], [folder])


def test_never_more_threads_write_than_workers(long_video: Path, tmp_path: Path) -> None:
    videos = [Path(shutil.copy(long_video, tmp_path / f"{i}.mp4")) for i in range(2)]
    writers: set[str] = set()
    dones = [0]

    def progress(done: int, total: int) -> None:
        if done > dones[-1]:
            dones.append(done)
            writers.add(threading.current_thread().name)

    write(find(videos, tmp_path), settings=Settings(seconds=5), workers=3, progress=progress)
    assert dones == list(range(17))
    assert len(writers) <= 3


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"format": 2}, "begun by another version"),
        ({"coding": {"crf": "30"}}, "begun by another version"),
        ({"source": {}}, "damaged"),
        ({"settings": [1]}, "damaged"),
        (None, "damaged"),
    ],
)
def test_a_begun_folder_that_cannot_be_gone_on_with_is_one_line(
    long_video: Path, tmp_path: Path, header: dict[str, object] | None, reason: str
) -> None:
    folder, part = tmp_path / "v.chunks", tmp_path / ".v.chunks.part"
    with pytest.raises(KeyboardInterrupt):
        write([(long_video, folder)], settings=Settings(), progress=_stop)
    begun = json.loads((part / TABLE).read_text())
    (part / TABLE).write_text(json.dumps({} if header is None else begun | header))
    failed = write([(long_video, folder)], settings=Settings()).failed[str(long_video)]
    assert reason in failed and f"{part}: " in failed and "remove" in failed
    assert "\n" not in failed
    shutil.rmtree(part)
    assert write([(long_video, folder)], settings=Settings()).written == [folder]


def _stop(done: int, total: int) -> None:
    if done:
        raise KeyboardInterrupt


def test_a_broken_video_stops_no_other_and_leaves_nothing(long_video: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(long_video, videos / "good.mp4")
    remux(long_video, videos / "cut.mkv")
    size = (videos / "cut.mkv").stat().st_size
    os.truncate(videos / "cut.mkv", size // 2)
    (videos / "text.mp4").write_text("no video")
    process = run_cli(videos, tmp_path / "gone.mp4", "--output", tmp_path / "out")
    out, errors = process.communicate()
    assert process.returncode == 2
    assert out == f"{tmp_path / 'out'}: 1 written, 0 there already, 3 failed\n"
    lines = errors.splitlines()
    assert len(lines) == 3 and all(line.startswith("fluxclip: not cut: ") for line in lines)
    for name in ("cut.mkv", "text.mp4", "gone.mp4"):
        assert sum(name in line for line in lines) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.mp4.chunks"]


def test_two_processes_do_not_make_the_same(film: Path, tmp_path: Path) -> None:
    process = run_cli(film, "--output", tmp_path, "--side", 64, "--workers", 1)
    part = tmp_path / f".{film.name}.chunks.part"
    while not (part / TABLE).exists() and process.poll() is None:
        time.sleep(0.01)
    report = write(find([film], tmp_path), settings=Settings(side=64))
    assert "another process" in report.failed[str(film)]
    assert process.wait() == 0
    assert write(find([film], tmp_path), settings=Settings(side=64)).kept != []


def test_whoever_comes_while_it_is_finished_finds_it_made_or_waits(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", grey_pictures(5))
    for number in range(10):
        folder = tmp_path / str(number) / "v.chunks"
        with ThreadPoolExecutor(12) as pool:
            found: list[Future[Report]] = []
            progress = partial(_come, pool, found, video, folder)
            assert write([(video, folder)], settings=Settings(), progress=progress).failed == {}
        reports = [job.result() for job in found]
        assert len(reports) >= 12
        for report in reports:
            assert report.kept == [folder] or "another process makes" in report.failed[str(video)]
        assert list(folder.parent.iterdir()) == [folder]


def _come(
    pool: ThreadPoolExecutor, found: list[Future[Report]], video: Path, folder: Path,
    done: int, total: int,
) -> None:  # fmt: skip
    """When all chunks are done, begin to make the same, one after the other."""

    def again(after_s: float) -> Report:
        time.sleep(after_s)
        return write([(video, folder)], settings=Settings())

    if done:
        found += [pool.submit(again, place / 2000) for place in range(12)]


def test_a_full_disk_is_one_line_and_going_on_completes(long_video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.run(
        [sys.executable, "-m", "fluxclip.cli", "chunk", str(long_video), "--output", str(out)],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)),
    )  # fmt: skip
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1 and "File too large" in process.stderr
    assert str(out) in process.stderr and "run again to go on" in process.stderr
    assert list(out.glob("*.chunks")) == []
    report = write(find([long_video], out), settings=Settings())
    assert report.written == [out / f"{long_video.name}.chunks"]


def test_other_settings_or_another_video_of_that_name_are_refused(
    long_video: Path, film: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "v.chunks"
    write([(long_video, folder)], settings=Settings(seconds=20))
    before = files_in(folder)
    with pytest.raises(ValueError, match="was made with seconds 20, .* not seconds 15"):
        write([(long_video, folder)], settings=Settings(seconds=15))
    report = write([(film, folder)], settings=Settings(seconds=20))
    assert "was made from another video" in report.failed[str(film)]
    moved = Path(shutil.copy(long_video, tmp_path / "moved.mp4"))  # the same video at another time
    assert write([(moved, folder)], settings=Settings(seconds=20)).kept == [folder]
    assert files_in(folder) == before


def test_videos_of_one_name_do_not_collide(long_video: Path, tmp_path: Path) -> None:
    for place in ("a", "b/c", "b/old.chunks", ".hidden"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(long_video, tmp_path / place / "x.mp4")
    out = tmp_path / "out"
    assert find([tmp_path], out) == [
        (tmp_path / "a/x.mp4", out / "a/x.mp4.chunks"),
        (tmp_path / "b/c/x.mp4", out / "b/c/x.mp4.chunks"),
    ]
    with pytest.raises(ValueError, match="would both be made into"):
        find([tmp_path / "a/x.mp4", tmp_path / "b/c/x.mp4"], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no video in it"):
        find([tmp_path / "empty"], out)


# ---- folders that are not sound ----


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: _edit(folder, format=2), "is of format 2, and this version reads 1"),
        (lambda folder: (folder / "000010.mp4").unlink(), "000010.mp4: a chunk that is missing"),
        (lambda folder: (folder / TABLE).unlink(), f"{TABLE}: not there"),
        (lambda folder: (folder / TABLE).write_text("{"), "damaged"),
        (lambda folder: (folder / TABLE).write_text("{}"), "damaged"),
        (lambda folder: _edit(folder, tick=[0, 1]), "damaged"),
        (lambda folder: _edit(folder, chunks=[]), "damaged"),
    ],
)
def test_a_folder_that_is_not_sound_is_one_line(
    made: Path, tmp_path: Path, harm: object, reason: str
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "film.chunks"))
    assert callable(harm)
    harm(copy)
    for use in (lambda: probe(copy), lambda: read_clip(copy, num_frames=2)):
        with pytest.raises(ValueError, match="fluxclip chunk") as caught:
            use()
        message = str(caught.value)
        assert reason in message and str(copy) in message and "\n" not in message


def test_a_table_is_parsed_once_and_anew_when_it_changes(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "film.chunks"))
    assert contents(copy) is contents(copy)
    _edit(copy, fps=12.0)
    assert (contents(copy).info.fps, contents(made).info.fps) == (12.0, 24.0)
    (copy / "000010.mp4").unlink()
    with pytest.raises(VideoError, match="000010"):
        contents(copy)


def test_a_folder_that_is_not_whole_is_a_file_that_is_missing(
    made: Path, film: Path, tmp_path: Path
) -> None:
    """It is counted and no reason to stop, but that another version wrote it may be so of all."""
    copies = [Path(shutil.copytree(made, tmp_path / f"{name}.chunks")) for name in "abc"]
    (copies[0] / "000010.mp4").unlink()
    (copies[1] / TABLE).unlink()
    pairs = tmp_path / "pairs.json"
    videos = [film, *copies, copies[0]]
    pairs.write_text(json.dumps([{"video": str(v), "caption": "a film"} for v in videos]))
    records = annotations.read(pairs, check_files=False)
    assert missing(records) == [copies[0] / "000010.mp4", copies[1] / TABLE]
    with pytest.raises(MissingFiles, match=r"2 of 4 .*a\.chunks/000010\.mp4") as caught:
        annotations.read(pairs)
    assert caught.value.share == 0.5

    sampling = FluxSampling((2, 4, 1), (28, 56, 28), (4, 64), (16, 8))
    data = Steps([Source(records, 4)], sampling, Augment(), seed=1)
    found = {path: fault for number in range(3) for path, fault in data[number].unreadable.items()}
    assert found.keys() == {str(copies[0]), str(copies[1])}
    assert {fault.kind for fault in found.values()} == {"damaged"}

    _edit(copies[2], format=2)
    with pytest.raises(VideoError, match="is of format 2, .*fluxclip chunk"):
        annotations.read(pairs)


def _edit(folder: Path, **changes: object) -> None:
    table = json.loads((folder / TABLE).read_text())
    (folder / TABLE).write_text(json.dumps(table | changes))


def test_a_folder_of_chunks_is_a_video_of_annotations(made: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"video": str(made), "caption": "a film"}]))
    records = annotations.read(pairs)
    assert records.info(0).duration_s == contents(made).info.duration_s
    clip = records.clip(0, num_frames=3, side=32)
    np.testing.assert_array_equal(clip.times_s, [4.0, 12.0, 20.0])


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"side": 8}, {"gop": 0}])
def test_settings_that_no_video_meets_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Settings(**wrong)
