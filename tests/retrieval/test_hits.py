"""Pictures, cut-outs and tables of hits, from real collections."""

import csv
import io
import json
import resource
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from layout_embedder import LayoutEmbedder
from PIL import Image

from fluxclip.video import chunk_writer, probe, read_clip
from fluxclip.video.chunks import Settings
from retrieval import Collection, Hit
from retrieval.hits import (
    COLUMNS,
    clip_suffix,
    file_name,
    preview,
    save_all,
    save_clip,
    thumbnail,
    write_csv,
)


@pytest.fixture
def film_hit(film: Path) -> Hit:
    return Hit(7, str(film), 12.0, 20.0, 0.5, {"camera": "north"})


@pytest.fixture
def still_hit(emoji: Path) -> Hit:
    return Hit(8, str(sorted((emoji / "stills").iterdir())[0]), 0.0, 0.0, 0.4)


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_a_thumbnail_is_the_middle_of_the_moment(film_hit: Hit) -> None:
    shown_HWC = picture(thumbnail(film_hit, side=160))
    assert shown_HWC.shape == (90, 160, 3)
    frame_HWC = read_clip(film_hit.video, times_s=[16.0]).frames_THWC[0]
    small_HWC = Image.fromarray(frame_HWC).resize((160, 90), Image.Resampling.BICUBIC)
    assert np.abs(shown_HWC.astype(int) - np.asarray(small_HWC)).mean() < 5


def test_a_preview_is_short_small_silent_and_plays_in_browsers(film_hit: Hit) -> None:
    with av.open(io.BytesIO(preview(film_hit, seconds=2.0, side=160))) as container:
        (video,) = container.streams
        codec = video.codec_context
        assert (codec.name, codec.pix_fmt, codec.width, codec.height) == (
            "h264",
            "yuv420p",
            160,
            90,
        )
        assert float(video.duration * video.time_base) == pytest.approx(2.0, abs=0.01)
        assert video.frames == 48
        first_HWC = next(container.decode(video=0)).to_ndarray(format="rgb24")
    frame_HWC = read_clip(film_hit.video, times_s=[15.0]).frames_THWC[0]
    small_HWC = Image.fromarray(frame_HWC).resize((160, 90), Image.Resampling.BICUBIC)
    assert np.abs(first_HWC.astype(int) - np.asarray(small_HWC)).mean() < 5


def test_a_preview_of_a_shorter_moment_is_all_of_it(film: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.mp4"
    file.write_bytes(preview(Hit(1, str(film), 3.0, 4.0, 0.1), side=96))
    assert probe(file).duration_s == pytest.approx(1.0, abs=0.01)
    with pytest.raises(ValueError, match="more than 0 seconds"):
        preview(Hit(1, str(film), 3.0, 4.0, 0.1), seconds=0)


def test_a_still_has_a_thumbnail_a_preview_and_a_copy(still_hit: Hit, tmp_path: Path) -> None:
    assert max(picture(thumbnail(still_hit, side=64)).shape) == 64
    file = tmp_path / "p.mp4"
    file.write_bytes(preview(still_hit, seconds=1.5, side=64))
    assert probe(file).duration_s == pytest.approx(1.5)
    copy = tmp_path / f"copy{clip_suffix(still_hit)}"
    save_clip(still_hit, copy)
    assert copy.read_bytes() == Path(still_hit.video).read_bytes()
    with pytest.raises(ValueError, match=r"is saved as \.webp"):
        save_clip(still_hit, tmp_path / "copy.mp4")


def test_a_clip_is_the_moment_and_nothing_else_is_left(film_hit: Hit, tmp_path: Path) -> None:
    source = Path(film_hit.video).read_bytes()
    short = Hit(7, film_hit.video, 2.0, 3.0, 0.5)
    save_clip(short, tmp_path / "a.mp4")
    save_clip(short, tmp_path / "a.mp4")  # again, over it
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    info = probe(tmp_path / "a.mp4")
    assert (info.width, info.height, info.num_frames) == (1280, 720, 24)
    times_s = [0.0, 0.45, 0.9]
    ours = read_clip(tmp_path / "a.mp4", times_s=times_s, side=64).frames_THWC
    theirs = read_clip(film_hit.video, times_s=[2.0 + t for t in times_s], side=64).frames_THWC
    assert np.abs(ours.astype(int) - theirs).mean() < 3
    assert Path(film_hit.video).read_bytes() == source


def test_a_clip_that_fails_leaves_what_was_there(film_hit: Hit, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"as it was")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # a file must not be larger
    try:
        with pytest.raises(OSError, match="File too large"):
            save_clip(film_hit, tmp_path / "a.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"as it was"


def test_a_video_is_never_written_over(film: Path, tmp_path: Path) -> None:
    copy = tmp_path / "film.mp4"
    shutil.copy(film, copy)
    with pytest.raises(ValueError, match="the video itself"):
        save_clip(Hit(1, str(copy), 0.0, 1.0, 0.5), tmp_path / "film.mp4")
    assert copy.read_bytes() == film.read_bytes()


def test_moments_of_a_folder_of_chunks(film: Path, tmp_path: Path) -> None:
    folder, small = tmp_path / "film.chunks", tmp_path / "small.mp4"
    small.write_bytes(preview(Hit(1, str(film), 0.0, 3.0, 0.5), seconds=3.0, side=96))
    chunk_writer.write([(small, folder)], settings=Settings(seconds=1, side=54))
    hit = Hit(1, str(folder), 0.5, 2.5, 0.5)
    assert picture(thumbnail(hit, side=96)).shape == (54, 96, 3)
    save_clip(hit, tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4").num_frames == 48


def test_what_is_gone_is_said_in_a_line_and_stops_no_other(
    film: Path, still_hit: Hit, tmp_path: Path
) -> None:
    gone = Hit(3, str(tmp_path / "gone.mp4"), 0.0, 5.0, 0.3)
    for show in (thumbnail, preview):
        with pytest.raises(FileNotFoundError, match=r"gone\.mp4: not there any more"):
            show(gone)
    with pytest.raises(ValueError, match="among texts"):
        thumbnail(Hit(1, "", 0.0, 0.0, 0.2, {"text": "a cat"}))
    shorter = Hit(4, str(film), 90.0, 95.0, 0.2)
    hits = [gone, Hit(5, str(film), 0.0, 0.2, 0.5), shorter, still_hit]
    for what, saved in (("clips", [".mp4", ".webp"]), ("thumbnails", [".jpg", ".jpg"])):
        folder = tmp_path / "new" / what
        failed = save_all(hits, folder, what=what)
        assert sorted(entry.suffix for entry in folder.iterdir()) == saved
        assert len(failed) == 2
        assert all(len(reason.splitlines()) == 1 for reason in failed.values())


def test_a_folder_that_cannot_be_entered_stops_no_other_hit(film: Path, tmp_path: Path) -> None:
    # a name that is too long is such an error for root too
    closed = Hit(3, f"/{'x' * 300}/a.mp4", 0.0, 5.0, 0.3)
    shown = Hit(5, str(film), 0.0, 0.2, 0.5)
    for what in ("clips", "thumbnails"):
        failed = save_all([closed, shown], tmp_path / what, what=what)
        [reason] = failed.values()
        assert reason == f"{closed.video}: cannot be opened (File name too long)"
        assert len(list((tmp_path / what).iterdir())) == 1


def test_names_are_safe_and_tell_all_hits_apart(tmp_path: Path) -> None:
    videos = [
        "/a/clip.mp4",
        "/b/clip.mp4",
        "/a/" + "é" * 120 + ".mp4",
        "/a/..; rm -rf $HOME `x` \n.mp4",
        "/a/\udcff.mp4",
        "/a/-o.mp4",
    ]
    spans = [(0.0, 10.0), (10.0, 20.0), (7200.0, 7210.5)]
    names = [
        file_name(Hit(1, video, *span, 0.5), rank=1, suffix=".mp4")
        for video in videos
        for span in spans
    ]
    assert len(set(names)) == len(names)
    for name in names:
        assert name.startswith("001-")
        assert not set(name) & set('/\\:*?"<>|\n\0 ;`$')
        (tmp_path / name).touch()  # not too long, and UTF-8
    assert file_name(Hit(1, videos[0], 1.5, 2.25, 0.1), rank=12, suffix=".jpg").startswith(
        "012-clip-1.50-2.25-"
    )


def test_a_table_reads_back_as_the_hits(
    embedder: LayoutEmbedder, clips: list[Path], tmp_path: Path
) -> None:
    with Collection.create(tmp_path / "c", model=embedder, window_s=1.0) as collection:
        collection.add(clips[:3], metadata={"camera": 'no"rth, 2\nst', "year": 2020, "ok": True})
        hits = collection.search(video=clips[0], k=5)
    file = io.StringIO(newline="")
    write_csv(hits, file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue(), newline="")))
    assert tuple(rows[0]) == COLUMNS
    for row, hit in zip(rows, hits, strict=True):
        assert json.loads(row.pop("metadata")) == hit.metadata
        read = {key: float(value) for key, value in row.items() if key != "video"}
        assert (row["video"], read) == (
            hit.video,
            {"id": hit.id, "start_s": hit.start_s, "end_s": hit.end_s, "score": hit.score},
        )
