"""Adding: each video once and whole, whatever the files are like and whatever happens meanwhile."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from layout_embedder import LayoutEmbedder
from PIL import Image

from fluxclip.video import Clip, chunk_writer, probe, read_clip, windows
from fluxclip.video.chunks import Settings
from retrieval import Collection, cache, ingest
from retrieval.database import DATABASE


def _paths(collection: Collection) -> list[str]:
    return list(collection._store.files())


def _segments(collection: Collection, path: Path) -> list[tuple[int, float, float]]:
    hits = collection.search(vector=np.ones(collection.info()["dim"]), k=1000)
    return sorted((h.id, h.start_s, h.end_s) for h in hits if h.video == str(path))


@pytest.fixture
def folder(tmp_path: Path, clips: list[Path]) -> Path:
    """Three clips and a still in nested folders, and files that are no videos."""
    folder = tmp_path / "videos"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    shutil.copy(clips[0], folder / "b.mp4")
    shutil.copy(clips[1], folder / "deep" / "a.MP4")
    shutil.copy(clips[2], folder / "deep" / "er" / "c.mp4")
    shutil.copy(clips[3], folder / ".hidden" / "d.mp4")
    shutil.copy(clips[3], folder / "._b.mp4")
    stills = clips[0].parents[1] / "stills"
    shutil.copy(min(stills.iterdir()), folder / "still.webp")
    (folder / "notes.txt").write_text("not a video")
    return folder


def test_vectors_are_those_of_the_model_for_each_window(
    cats: Collection, embedder: LayoutEmbedder, clips: list[Path], film: Path
) -> None:
    report = cats.add([*clips, film])
    assert (report.added, report.skipped, report.failed) == (21, 0, {})
    assert len(cats) == 20 + 5
    # 24 s in windows of 5: the last one is moved back to end with the film
    times = [(start, end) for _, start, end in _segments(cats, film)]
    assert times == [(0, 5), (5, 10), (10, 15), (15, 20), (19, 24)]
    for start_s, end_s in times:
        clip = read_clip(film, num_frames=4, start_s=start_s, end_s=end_s, side=32, fit="squash")
        [hit] = cats.search(vector=embedder.embed_video([clip])[0], k=1)
        assert (hit.video, hit.start_s, hit.end_s) == (str(film), start_s, end_s)
        assert hit.score == pytest.approx(1, abs=1e-6)
    for path in clips:
        [hit] = cats.search(vector=embedder.embed_video([path])[0], k=1)
        assert hit.video == str(path) and hit.score == pytest.approx(1, abs=1e-6)
        assert 0 == hit.start_s < hit.end_s <= 5


def test_token_budget_decides_the_frames(
    tmp_path: Path, embedder: LayoutEmbedder, clips: list[Path]
) -> None:
    with Collection.create(tmp_path / "few", model=embedder, token_budget=16) as few:
        few.add(clips[0])
        one_frame = read_clip(clips[0], num_frames=1, side=32, fit="squash")
        [hit] = few.search(vector=embedder.embed_video([one_frame])[0])
        assert hit.score == pytest.approx(1, abs=1e-6)
        [hit] = few.search(video=clips[0])
        assert hit.score == pytest.approx(1, abs=1e-6)


def test_folders_patterns_and_names(cats: Collection, folder: Path) -> None:
    inside = ["b.mp4", "deep/a.MP4", "deep/er/c.mp4", "still.webp"]
    seen: list[tuple[int, int, str]] = []
    report = cats.add(folder, progress=lambda *done: seen.append(done))
    assert _paths(cats) == [str(folder / name) for name in inside]
    assert (report.added, report.skipped, report.failed) == (4, 0, {})
    assert [(done, total) for done, total, _ in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(path for _, _, path in seen) == _paths(cats)
    # an image takes no time
    [(_, start_s, end_s)] = _segments(cats, folder / "still.webp")
    assert (start_s, end_s) == (0, 0)

    for path in _paths(cats):
        cats.remove(video=path)
    assert cats.add([folder], recursive=False).added == 2
    assert cats.add([f"{folder}/*/*.MP4"]).added == 1
    assert cats.add([f"{folder}/**/*.mp4", folder / "b.mp4", folder]).skipped == 3
    assert _paths(cats) == [str(folder / name) for name in inside]


def test_a_folder_of_chunks_is_one_video(
    cats: Collection, clips: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "videos" / "a.mp4.chunks"
    chunk_writer.write([(clips[0], folder)], settings=Settings(seconds=1, side=64))
    shutil.copy(clips[1], tmp_path / "videos" / "b.mp4")
    report = cats.add([tmp_path / "videos"])
    assert (report.added, report.skipped, report.failed) == (2, 0, {})
    hits = cats.search(video=clips[0], k=2)
    assert Path(hits[0].video) == folder
    assert hits[0].end_s == probe(clips[0]).duration_s
    again = cats.add([folder])
    assert (again.added, again.skipped) == (0, 1)


def test_relative_paths_are_made_absolute(
    cats: Collection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = folder / "odd [1]"  # would be a pattern
    (folder / "deep").rename(odd)
    monkeypatch.chdir(odd)
    assert cats.add(["er/../a.MP4", "er/*.mp4", "../*.mp4"]).added == 3
    assert _paths(cats) == [str(folder / "b.mp4"), str(odd / "a.MP4"), str(odd / "er" / "c.mp4")]
    assert cats.add([odd / "a.MP4"]).skipped == 1
    assert cats.remove(video="a.MP4") == 1


def test_same_file_twice_adds_nothing(cats: Collection, clips: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    shutil.copy(clips[0], path)
    assert cats.add([path, path]).added == 1
    revision = cats._store.revision()
    again = cats.add([path, str(path)])
    assert (again.added, again.skipped) == (0, 1)
    assert cats._store.revision() == revision

    os.utime(path, ns=(1, 1))  # another time, the same content
    assert (cats.add(path).added, len(cats)) == (0, 1)
    assert [hit.id for hit in cats.search(video=path)] == [1]

    other = tmp_path / "b.mp4"  # the same content elsewhere is a video of its own
    shutil.copy(path, other)
    assert cats.add([path, other]).added == 1
    assert [hit.id for hit in cats.search(video=path)] == [1, 2]  # equal scores: by id


def test_nothing_new_needs_no_model(cats: Collection, clips: list[Path]) -> None:
    cats.add(clips[:3])
    cats.close()
    with Collection.open(cats._store.folder) as again:  # its name is known to nobody
        assert again.add(clips[:3]).skipped == 3
        with pytest.raises(ValueError, match="'cats' was built by model 'layout', which cannot"):
            again.add(clips[:4])
        assert len(again) == 3


def test_changed_file_replaces_its_segments(
    many_windows: Collection, embedder: LayoutEmbedder, clips: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    shutil.copy(clips[0], path)
    many_windows.add([path, clips[1]], metadata={"camera": "north"})
    before = _segments(many_windows, path)
    shutil.copy(clips[2], path)
    report = many_windows.add([path, clips[1]], metadata={"year": 2020})
    assert (report.added, report.skipped) == (1, 1)
    after = _segments(many_windows, path)
    assert len(before) > 3 and len(after) > 3
    assert min(id for id, *_ in after) > max(id for id, *_ in before)
    for id, start_s, end_s in after:
        clip = read_clip(path, num_frames=4, start_s=start_s, end_s=end_s, side=32, fit="squash")
        hits = many_windows.search(vector=embedder.embed_video([clip])[0], k=100)
        assert id in [hit.id for hit in hits if hit.score == pytest.approx(1, abs=1e-6)]
    assert {hit.video for hit in hits} == {str(path), str(clips[1])}
    assert all(hit.metadata == {"camera": "north", "year": 2020} for hit in hits)


def test_a_moved_file_keeps_its_ids_and_is_not_embedded_again(
    many_windows: Collection, clips: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    for name, clip in (("a.mp4", clips[0]), ("b.mp4", clips[1]), ("twin.mp4", clips[1])):
        shutil.copy(clip, folder / name)
    many_windows.add(folder, metadata={"camera": "north"})
    a, b = (_segments(many_windows, folder / name) for name in ("a.mp4", "b.mp4"))
    many_windows.close()

    (folder / "a.mp4").rename(folder / "deep" / "c.mp4")
    os.utime(folder / "deep" / "c.mp4", ns=(1, 1))
    shutil.copy(folder / "b.mp4", folder / "copy.mp4")
    with Collection.open(many_windows._store.folder) as again:  # with a model that nobody knows
        with pytest.raises(ValueError, match="which cannot be loaded"):
            again.add(folder / "copy.mp4")  # what it is a copy of is still there
        report = again.add(folder / "deep", metadata={"year": 2020})
        assert report.moved == {str(folder / "a.mp4"): str(folder / "deep" / "c.mp4")}
        assert (report.added, report.skipped, report.failed) == (0, 0, {})
        assert report.missing == ()
        assert _segments(again, folder / "deep" / "c.mp4") == a
        [hit, *_] = again.search(vector=again._store.vectors(np.array([a[0][0]]))[1][0], k=1)
        assert hit.metadata == {"camera": "north", "year": 2020}
        assert again.add(folder / "deep").skipped == 1

        # of two that are the same, each goes to one new name; what is left over would be new
        (folder / "copy.mp4").unlink()
        for name in ("b.mp4", "twin.mp4"):
            (folder / name).rename(folder / "deep" / name)
        moved = again.add([folder / "deep"]).moved
        assert sorted(moved) == [str(folder / "b.mp4"), str(folder / "twin.mp4")]
        assert sorted(moved.values()) == [str(folder / "deep" / n) for n in ("b.mp4", "twin.mp4")]
        assert _segments(again, Path(moved[str(folder / "b.mp4")])) == b
        assert again.check().problems == ()


def test_files_that_are_gone_are_reported_and_removed_when_asked(
    cats: Collection, clips: list[Path], tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "videos", tmp_path / "videos 2"
    for name in ("a.mp4", "b.mp4", "deep/c.mp4", "deep/d.mp4"):
        for parent, first in ((folder, 0), (elsewhere, 4)):
            (parent / "deep").mkdir(parents=True, exist_ok=True)
            shutil.copy(clips[first + ord(name[-5]) - ord("a")], parent / name)
    cats.add([folder, elsewhere])
    for parent in (folder, elsewhere):
        (parent / "b.mp4").unlink()
        (parent / "deep" / "c.mp4").unlink()
    gone = tuple(str(folder / name) for name in ("b.mp4", "deep/c.mp4"))
    revision = cats._store.revision()
    assert cats.add(folder).missing == gone
    assert cats.add(folder, recursive=False).missing == gone[:1]
    assert cats.add(folder / "a.mp4").missing == ()
    assert cats._store.revision() == revision and len(cats) == 8

    (folder / "deep" / "c.mp4").symlink_to("nowhere")  # there is something under its name
    report = cats.add(folder, prune=True)
    assert (report.missing, list(report.failed)) == (gone[:1], [gone[1]])
    assert len(cats) == 7 and gone[0] not in _paths(cats)
    hits = cats.search(vector=np.ones(cats.info()["dim"]), k=100)
    assert sorted(hit.video for hit in hits) == _paths(cats)

    for path in elsewhere.rglob("*.mp4"):
        path.unlink()
    with pytest.raises(ValueError, match="no video or image in"):  # as if it were not mounted
        cats.add(elsewhere, prune=True)
    report = cats.add([folder, elsewhere], prune=True)
    assert report.missing == () and list(report.named_failed) == [str(elsewhere)]
    assert len(cats) == 7


def test_what_was_on_a_disk_that_is_not_mounted_is_not_missing(
    cats: Collection, clips: list[Path], tmp_path: Path
) -> None:
    videos, disk = tmp_path / "videos", tmp_path / "disk"
    for i, folder in enumerate((videos / "local", videos / "mounted", disk)):
        folder.mkdir(parents=True)
        for j in range(2):
            shutil.copy(clips[2 * i + j], folder / f"{j}.mp4")
    (videos / "linked").symlink_to(disk)
    cats.add(videos)
    assert len(cats) == 6
    shutil.rmtree(disk)
    for path in (*(videos / "mounted").iterdir(), videos / "local" / "1.mp4"):
        path.unlink()
    report = cats.add(videos, prune=True)
    assert report.missing == (str(videos / "local" / "1.mp4"),)
    assert len(cats) == 5 and len(cats.check().missing_files) == 4


def test_unreadable_change_keeps_what_was_stored(
    cats: Collection, clips: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    shutil.copy(clips[0], path)
    cats.add(path)
    path.write_text("no longer a video")
    report = cats.add(path)
    assert list(report.failed) == [str(path)]
    assert [hit.video for hit in cats.search(video=clips[0])] == [str(path)]


def test_bad_files_named_and_found(
    cats: Collection, clips: list[Path], film: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "text.mp4").write_text("a text file, renamed")
    (folder / "empty.mp4").touch()
    data = film.read_bytes()
    (folder / "truncated.mp4").write_bytes(data[: len(data) // 2])
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (folder / "gone.mp4").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.mp4")
    shutil.copy(clips[0], folder / "good.mp4")
    bad = {str(path) for path in folder.iterdir()} - {str(folder / "good.mp4")}

    report = cats.add([folder])
    assert (report.added, set(report.failed), report.named_failed) == (1, bad, ())
    assert all(reason and "\n" not in reason for reason in report.failed.values())
    assert report.failed[str(folder / "empty.mp4")] == "an empty file (0 bytes)"

    empty = tmp_path / "nothing"
    empty.mkdir()
    missing = [tmp_path / "missing.mp4", tmp_path / "missing*.mp4", empty]
    report = cats.add([folder / "text.mp4", *missing, folder, clips[1]])
    assert (report.added, report.skipped) == (1, 1)
    assert set(report.failed) == bad | set(map(str, missing))
    assert set(report.named_failed) == {str(path) for path in [folder / "text.mp4", *missing]}
    assert cats.check().problems == ()


def test_a_film_cut_off_in_the_middle_is_not_half_added(
    cats: Collection, film: Path, tmp_path: Path
) -> None:
    """The index of the file comes first here, so that its beginning can be read."""
    import av

    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    with (
        av.open(str(film)) as source,
        av.open(str(whole), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    read_clip(cut, num_frames=4, start_s=0, end_s=5)
    report = cats.add(cut)
    assert list(report.failed) == [str(cut)] and report.added == len(cats) == 0


def test_nothing_to_add_says_what_is_looked_for(cats: Collection, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a video")
    for paths in [[tmp_path], [tmp_path / "*.txt"], []]:
        with pytest.raises(ValueError, match=r"no video or image in .*\.mp4.*\.webm"):
            cats.add(paths)


class _DarkIsNan(LayoutEmbedder):
    """A model with a fault: it divides by zero where a clip is dark."""

    def _layout(self, video: str | Path | Clip, token_budget: int | None) -> np.ndarray:
        vector = super()._layout(video, token_budget)
        return vector * (np.nan if vector.mean() < 0 else 1)


class _TwiceAsLong(LayoutEmbedder):
    """A model with a fault: its vectors are not of length 1."""

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> np.ndarray:
        return 2 * super().embed_video(videos, token_budget=token_budget)


def test_vectors_that_are_no_unit_vectors_are_refused(tmp_path: Path, clips: list[Path]) -> None:
    night = tmp_path / "night.png"
    Image.new("RGB", (64, 64), "navy").save(night)
    with Collection.create(tmp_path / "a", model=_DarkIsNan()) as collection:
        report = collection.add([clips[0], night, clips[1]])  # emoji are drawn on white
        assert report.added == 2
        assert report.failed == {str(night): "model 'layout' gave a vector that is not finite"}
    with Collection.create(tmp_path / "b", model=_TwiceAsLong()) as collection:
        report = collection.add(clips[:2])
        assert report.added == 0 and len(collection) == 0
        assert "of length 2 instead of 1" in report.failed[str(clips[0])]


def test_metadata_is_checked_before_any_work(cats: Collection, clips: list[Path]) -> None:
    with pytest.raises(ValueError, match="metadata 'tags' must be text, a finite number"):
        cats.add(clips[:1], metadata={"tags": ["a"]})  # type: ignore[dict-item]
    assert len(cats) == 0
    cats.add(clips[:1], metadata={"camera": "north"})
    cats.add(clips[:1], metadata={"camera": "south"})  # known, yet not ignored
    assert cats.search(video=clips[0])[0].metadata == {"camera": "south"}


def test_add_is_refused_while_another_process_adds(cats: Collection, clips: list[Path]) -> None:
    other = Collection.open(cats._store.folder, model=cats.model)
    refusals = []

    def add_too(done: int, total: int, path: str) -> None:
        assert len(other.search(video=clips[0])) == done  # what is committed can be found
        with pytest.raises(OSError, match="another process is writing to collection 'cats'"):
            other.add(clips[5:6])
        with pytest.raises(OSError, match="another process is writing"):
            other.remove(video=clips[0])
        refusals.append(path)

    cats.add(clips[:3], progress=add_too)
    assert len(refusals) == 3
    assert other.add(clips[5:6]).added == 1
    assert len(cats.search(video=clips[0])) == 4


def test_interrupt_keeps_what_is_committed(cats: Collection, clips: list[Path]) -> None:
    def stop(done: int, total: int, path: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cats.add(clips, progress=stop)
    assert _paths(cats) == [str(path) for path in clips[:3]]
    report = cats.add(clips)
    assert (report.added, report.skipped) == (17, 3)
    assert len(cats.search(video=clips[0], k=50)) == 20


def test_kill_leaves_whole_videos_and_adding_again_completes(
    tmp_path: Path, embedder: LayoutEmbedder, clips: list[Path]
) -> None:
    """Killed while the second batch is embedded, when the second clip has vectors for a part."""
    folder = tmp_path / "cats"
    files = [str(path) for path in clips[:3]]
    num_windows = [len(windows(probe(path).duration_s, 0.25)) for path in files]
    script = f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from layout_embedder import LayoutEmbedder
        from retrieval import Collection

        class Slow(LayoutEmbedder):
            num_calls = 0
            def embed_video(self, videos, *, token_budget=None):
                self.num_calls += 1
                if self.num_calls == 2:
                    print("ready", flush=True)
                    time.sleep(60)
                return super().embed_video(videos, token_budget=token_budget)

        Collection.create({str(folder)!r}, model=Slow(), window_s=0.25).add({files!r})
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    with Collection.open(folder, model=embedder) as collection:
        assert _paths(collection) == files[:1]
        assert len(collection) == len(_segments(collection, clips[0])) == num_windows[0] < 16
        assert collection.check().problems == ()
        report = collection.add(files)
        assert (report.added, report.skipped) == (2, 1)
        assert _paths(collection) == files
        assert [len(_segments(collection, path)) for path in clips[:3]] == num_windows


def test_an_index_that_a_kill_left_unmade_is_made_by_adding_nothing_new(
    cats: Collection, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "MERGE_SEGMENTS", 5)
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(cats._cache, "rebuild", killed)
        cats.add(clips[:8])
    index = cats._store.folder / "index.faiss"
    assert not index.exists()
    said: list[str] = []
    with Collection.open(cats._store.folder, model=cats.model) as again:
        num = len(again)
        report = again.add(clips[:num], say=said.append)
    assert (report.added, report.skipped) == (0, num)
    assert index.exists() and len(said) == 2
    assert f"making an index Flat of {num} segments takes about " in said[0]


def test_a_long_add_makes_the_index_whenever_there_is_twice_as_much(
    many_windows: Collection, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that readers, and who goes on after a kill, have most of it in the index."""
    monkeypatch.setattr(cache, "MERGE_SEGMENTS", 5)
    said: list[str] = []
    beside = []

    def progress(done: int, total: int, path: str) -> None:
        made = many_windows.info()["index_file"] or {"segments": 0}
        beside.append((len(many_windows) - made["segments"], made["segments"]))

    many_windows.add(clips, progress=progress, say=said.append)
    longest = 10  # windows of one clip, at most
    assert all(newer <= max(5, merged) + longest for newer, merged in beside)
    assert len({merged for _, merged in beside}) > 2 and len(said) <= 2 * 8


def test_a_disk_that_fills_up_keeps_what_is_committed(cats: Collection, clips: list[Path]) -> None:
    """A limit on the size of files stands for the disk: it needs no rights."""
    script = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from layout_embedder import LayoutEmbedder
        from retrieval import Collection

        collection = Collection.open({str(cats._store.folder)!r}, model=LayoutEmbedder())
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            collection.add({[str(path) for path in clips]!r}, progress=lambda *done: print(done[0]))
        except OSError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *committed, message = done.stdout.splitlines()
    assert message.startswith("the disk of collection 'cats' fails or is full")
    assert message.endswith("what was committed is kept")
    assert 0 < len(committed) < len(clips) and len(cats) == len(committed)
    assert cats.check().problems == ()
    assert len(cats.search(video=clips[0], k=50)) == len(committed)
    report = cats.add(clips)
    assert (report.added, report.skipped) == (20 - len(committed), len(committed))


class _Breaks(LayoutEmbedder):
    """A model with a fault of the program, not of a file."""

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> np.ndarray:
        raise RuntimeError("out of memory")


def test_commits_are_flushed_one_by_one_again_after_an_add(
    cats: Collection, clips: list[Path]
) -> None:
    def flushing() -> int:
        [(level,)] = cats._store._db.execute("PRAGMA synchronous").fetchall()
        return int(level)

    def stop(done: int, total: int, path: str) -> None:
        levels.append(flushing())
        raise KeyboardInterrupt

    levels: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        cats.add(clips[:3], progress=stop)
    assert levels == [1] and flushing() == 2  # NORMAL, FULL
    # all of it is in the database by then, none of it in the log alone
    name = f"file:{cats._store.folder / DATABASE}?immutable=1"
    with closing(sqlite3.connect(name, uri=True)) as alone:
        assert alone.execute("SELECT count(*) FROM videos").fetchone() == (1,)


def test_decoders_give_way_to_what_embeds() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    with ThreadPoolExecutor(1, initializer=ingest._step_back) as pool:
        more = ingest.NICENESS_OF_DECODERS if sys.platform == "linux" else 0
        assert pool.submit(niceness).result() == min(19, before + more)
    assert niceness() == before


def test_whatever_breaks_names_the_files(tmp_path: Path, clips: list[Path]) -> None:
    with (
        Collection.create(tmp_path / "a", model=_Breaks()) as collection,
        pytest.raises(RuntimeError, match="out of memory") as error,
    ):
        collection.add(clips[:2])
    assert error.value.__notes__ == [f"while embedding {clips[0]}, {clips[1]}"]


def test_a_file_that_breaks_the_reader_is_named(
    cats: Collection, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fluxclip.video.decoders import pyav

    monkeypatch.delattr(pyav, "open_video")  # a fault of the program
    with pytest.raises(AttributeError, match="open_video") as error:
        cats.add(clips[:1])
    assert error.value.__notes__ == [f"while reading {clips[0]}"]


def test_linked_folders_are_searched_once(
    cats: Collection, clips: list[Path], tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    (folder / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copy(clips[0], folder / "deep" / "a.mp4")
    shutil.copy(clips[1], elsewhere / "b.mp4")
    (folder / "link").symlink_to(elsewhere)
    (folder / "link again").symlink_to(elsewhere)
    (folder / "deep" / "up").symlink_to(folder)
    (elsewhere / "round").symlink_to(elsewhere)
    assert cats.add(folder).failed == {}
    assert _paths(cats) == [str(folder / "deep" / "a.mp4"), str(folder / "link" / "b.mp4")]


def test_files_that_only_look_like_videos(
    cats: Collection, film: Path, clips: list[Path], tmp_path: Path
) -> None:
    """A header and nothing behind it, nothing at all, and 4 GiB of holes."""
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "header.mp4").write_bytes(clips[0].read_bytes()[:48])
    (folder / "header.webm").write_bytes(bytes.fromhex("1a45dfa39f4286810142f7810142f28104"))
    (folder / "empty.mp4").touch()
    for name in ("sparse.mp4", "sparse_with_header.mp4"):
        with (folder / name).open("wb") as file:
            file.write(film.read_bytes()[:64] if "header" in name else b"")
            file.truncate(4 << 30)
    shutil.copy(clips[0], folder / "good.mp4")
    report = cats.add(folder)
    bad = {str(path) for path in folder.iterdir()} - {str(folder / "good.mp4")}
    assert report.added == 1 and set(report.failed) == bad and report.named_failed == ()
    assert all(reason and "\n" not in reason for reason in report.failed.values())
    assert len(cats) == 1 and cats.check().problems == ()


def test_sql_in_metadata_is_only_text(cats: Collection, clips: list[Path]) -> None:
    hostile = "'; DROP TABLE videos; --"
    metadata = {hostile: hostile, 'a" OR 1=1': 1}
    cats.add(clips[0], metadata=metadata)
    cats.add(clips[1])
    for where in (metadata, {hostile: {"in": [hostile]}}, {'a" OR 1=1': {"gte": 1}}):
        [hit] = cats.search(video=clips[1], where=where)
        assert hit.video == str(clips[0]) and hit.metadata == metadata
    assert cats.search(video=clips[1], where={"camera": "x' OR '1'='1"}) == []
    assert len(cats) == 2 and cats.check().problems == ()


def test_a_name_that_is_not_utf8_is_said(
    cats: Collection, clips: list[Path], tmp_path: Path
) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.mp4")
    shutil.copy(clips[0], name)
    assert cats.add(tmp_path).failed == {name: "its name is not UTF-8: rename it"}
