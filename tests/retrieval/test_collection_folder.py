"""The folder: made, opened, checked, and its cache lost, damaged or out of date."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layout_embedder import LayoutEmbedder

from retrieval import Collection, cache
from retrieval.collection import CheckReport
from retrieval.database import DATABASE


@pytest.fixture
def filled(cats: Collection, clips: list[Path]) -> Collection:
    """Twelve clips, and an index file of them."""
    cats.add(clips[:12])
    cats.rebuild()
    return cats


def _ids(collection: Collection) -> list[int]:
    hits = collection.search(vector=np.ones(collection.info()["dim"]), k=1000)
    return sorted(hit.id for hit in hits)


def test_what_create_refuses(
    tmp_path: Path, embedder: LayoutEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Collection.create("a/cats", model=embedder).close()
    (tmp_path / "file").touch()
    for name in ("a/cats", "a", "file"):
        with pytest.raises(FileExistsError, match=f"{tmp_path / name}' exists already"):
            Collection.create(name, model="no such model, which is not even looked for")
    for budget in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="a token budget must be a whole number"):
            Collection.create("b", model=embedder, token_budget=budget)
    for window_s in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="window_s must be"):
            Collection.create("b", model=embedder, window_s=window_s)
    with pytest.raises(ValueError, match="no such model"):
        Collection.create("b", model="no such model")
    assert sorted(os.listdir(tmp_path)) == ["a", "file"]


def test_an_empty_path_is_not_the_working_folder(
    cats: Collection, clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(clips[0], "a.mp4")
    for use in (
        lambda: cats.add(""),
        lambda: cats.add(["a.mp4", ""]),
        lambda: cats.remove(video=""),
        lambda: Collection.create("", model=cats.model),
        lambda: Collection.open(""),
    ):
        with pytest.raises(ValueError, match="the path is empty"):
            use()
    assert len(cats) == 0


def test_what_open_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no collection .*nowhere"):
        Collection.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a collection: it holds no collection.sqlite"):
        Collection.open(tmp_path)
    (tmp_path / DATABASE).touch()
    with pytest.raises(ValueError, match="is not the file of a collection"):
        Collection.open(tmp_path)


def test_another_model_is_refused(filled: Collection, embedder: LayoutEmbedder) -> None:
    folder = filled._store.folder
    for other in (LayoutEmbedder("small", cells=2), LayoutEmbedder("small", contrast=0.5)):
        with pytest.raises(ValueError) as error:
            Collection.open(folder, model=other)
        assert str(error.value) == (
            f"collection 'cats' was built by layout@{embedder.fingerprint[:6]}; "
            f"this model is small@{other.fingerprint[:6]}"
        )
    renamed = LayoutEmbedder("the same under another name")
    assert len(Collection.open(folder, model=renamed).search("a dog", k=3)) == 3


def test_a_model_named_by_a_relative_file_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    import torch

    name = "tiny-for-collections"
    settings = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 16,
                       "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1,
                     "layers": 1},
    }  # fmt: skip
    (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    torch.save(open_clip.create_model(name).state_dict(), tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    with Collection.create("cats", model=f"open_clip:{name}/weights.pt") as cats:
        cats.add_texts(["a cat"])
    monkeypatch.chdir("/")
    with Collection.open(tmp_path / "cats") as again:
        assert again.search("a cat", target="text")[0].score == pytest.approx(1, abs=1e-5)
        source = again.model.source
    with Collection.open(tmp_path / "cats", model=source) as again:
        assert not again._serving.is_loaded  # not loaded: the same string


def test_what_needs_no_model_loads_none(filled: Collection) -> None:
    filled.close()
    with Collection.open(filled._store.folder) as again:
        info = again.info()
        assert (info["videos"], info["segments"], info["texts"]) == (12, 12, 0)
        assert (info["name"], info["model_name"], info["window_s"]) == ("cats", "layout", 5.0)
        assert info["token_budget"] is None and info["index"] == "auto"
        assert info["size_bytes"] > 10_000
        assert _ids(again) == list(range(1, 13))
        assert again.remove(id=3) == 1 and len(again) == 11
        with pytest.raises(ValueError, match="built by model 'layout', which cannot be loaded"):
            again.search("a dog")
    with pytest.raises(ValueError, match="'cats' is closed"):
        len(again)


def test_removed_is_gone_and_its_id_too(filled: Collection, clips: list[Path]) -> None:
    [hit] = filled.search(video=clips[4], k=1)
    assert filled.remove(video=clips[4]) == 1
    assert hit.id not in _ids(filled) and len(filled) == 11
    assert filled.search(video=clips[4], k=1)[0].video != str(clips[4])
    filled.add(clips[4])
    [again] = filled.search(video=clips[4], k=1)
    assert again.video == str(clips[4]) and again.id == 13
    for what in ({"video": "nowhere.mp4"}, {"id": hit.id}):
        with pytest.raises(ValueError, match="'cats' holds no (video|segment)"):
            filled.remove(**what)  # type: ignore[arg-type]
    for what in ({}, {"video": clips[0], "id": 1}):
        with pytest.raises(ValueError, match="remove takes one of"):
            filled.remove(**what)  # type: ignore[arg-type]
    assert len(filled) == 12


def test_one_segment_of_a_video_can_be_removed(many_windows: Collection, clips: list[Path]) -> None:
    many_windows.add(clips[0])
    n = len(many_windows)
    assert n > 3 and many_windows.remove(id=2) == 1
    assert _ids(many_windows) == [1, *range(3, n + 1)]
    assert many_windows.add(clips[0]).skipped == 1  # known; what was removed stays removed
    assert many_windows.remove(video=clips[0]) == n - 1
    assert many_windows.info()["videos"] == 0 and _ids(many_windows) == []


def test_a_list_is_removed_in_one_step_or_not_at_all(filled: Collection, clips: list[Path]) -> None:
    before = filled._store.revision()[0]
    for what, named in (
        ({"video": [clips[0], "/no/where.mp4", "/nor/here.mp4"]}, "video '/no/where.mp4', nor 1"),
        ({"id": [1, 99]}, "segment 99"),
        ({"id": [1, 2**70]}, f"segment {2**70}"),
        ({"text": ["a dog"]}, "text 'a dog'"),
    ):
        with pytest.raises(ValueError, match=f"'cats' holds no {named}"):
            filled.remove(**what)  # type: ignore[arg-type]
    for id in ("12", [3.7], ["1"], 3.0, {}.get):
        with pytest.raises(ValueError, match="an id is a whole number, got"):
            filled.remove(id=id)  # type: ignore[arg-type]
    assert filled._store.revision()[0] == before and len(filled) == 12
    assert filled.remove(video=[clips[0], str(clips[1])]) == 2
    assert filled.remove(id=[3, 5, 12]) == 3
    assert filled._store.revision()[0] == before + 2
    assert _ids(filled) == [4, 6, 7, 8, 9, 10, 11]
    filled.add_texts(["a dog", "a cat"])
    assert filled.remove(text=["a cat", "a dog"]) == 2


def test_a_backup_answers_as_the_collection_did(
    filled: Collection, embedder: LayoutEmbedder, clips: list[Path], tmp_path: Path
) -> None:
    folder, target = filled._store.folder, tmp_path / "kept" / "copy"
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "manifest.json").write_text("{}")
    filled.add(clips[12:14], metadata={"year": 2020})  # newer than the index
    expected = filled.search(video=clips[3], k=20)
    with filled._store.sole_writer():  # nobody is waited for
        filled.backup(target)
    filled.remove(video=clips[:10])
    assert sorted(os.listdir(target)) == [DATABASE, "index.faiss", "text_encoder"]
    with Collection.open(target, model=embedder) as copy:
        assert copy.search(video=clips[3], k=20) == expected
        assert copy.check() == CheckReport((), (), ())
        assert copy.add(clips[14]).added == 1
    with pytest.raises(FileExistsError, match="exists already"):
        filled.backup(target)
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


def test_a_backup_with_a_damaged_index_finds_all(
    filled: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _flip_a_byte(filled._store.folder / "index.faiss")
    filled.backup(tmp_path / "copy")
    with Collection.open(tmp_path / "copy") as copy:
        assert _ids(copy) == list(range(1, 13))
        assert "its checksum is wrong" in caplog.text


def _delete(index: Path) -> None:
    index.unlink()


def _flip_a_byte(index: Path) -> None:
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 1
    index.write_bytes(data)


def _truncate(index: Path) -> None:
    index.write_bytes(index.read_bytes()[:1000])


def _empty(index: Path) -> None:
    index.write_bytes(b"")


def _make_a_folder_of_it(index: Path) -> None:
    index.unlink()
    index.mkdir()


@pytest.mark.parametrize("harm", [_delete, _flip_a_byte, _truncate, _empty, _make_a_folder_of_it])
def test_cache_is_made_anew(filled: Collection, harm: Callable[[Path], None]) -> None:
    folder = filled._store.folder
    filled.close()
    harm(folder / "index.faiss")
    with Collection.open(folder) as again:
        assert _ids(again) == list(range(1, 13))
    if harm is not _make_a_folder_of_it:  # which nothing can replace, yet search goes on
        with Collection.open(folder) as again:
            assert again.check().fixed == ()  # the search has written it


@pytest.mark.parametrize("harm", [_delete, _flip_a_byte, _truncate])
def test_check_mends_the_cache(
    filled: Collection, harm: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MERGE_SEGMENTS", 8)  # with fewer, a missing file is no fault
    index = filled._store.folder / "index.faiss"
    assert filled.check().fixed == ()
    harm(index)
    report = filled.check()
    assert len(report.fixed) == 1 and report.problems == report.missing_files == ()
    assert filled.check().fixed == ()
    assert _ids(filled) == list(range(1, 13))


def test_check_removes_what_a_kill_left(filled: Collection) -> None:
    folder = filled._store.folder
    whole = (folder / "index.faiss").read_bytes()
    (folder / "index.faiss.tmp").write_bytes(whole[:1000])
    (folder.parent / ".cats.123.unfinished").mkdir()
    fixed = filled.check().fixed
    assert len(fixed) == 2 and all("a killed process left it" in line for line in fixed)
    assert filled.check().fixed == () and (folder / "index.faiss").read_bytes() == whole
    assert not list(folder.glob("*.tmp")) and not list(folder.parent.glob(".*"))


def test_check_says_what_is_wrong_with_the_settings_of_the_index(filled: Collection) -> None:
    filled._store.set_settings({"memory_limit": -1})
    (filled._store.folder / "index.faiss").write_bytes(b"junk")
    [problem] = filled.check().problems
    assert "cannot be mended: memory_limit must be more than 0" in problem


def test_check_says_what_it_cannot_mend(filled: Collection) -> None:
    (filled._store.folder / "index.faiss").write_bytes(b"junk")
    with Collection.open(filled._store.folder)._store.sole_writer():
        report = filled.check()
    [problem] = report.problems
    assert "cannot be mended: another process is writing" in problem and report.fixed == ()
    assert len(filled.check().fixed) == 1


def test_cache_of_an_older_revision_catches_up(filled: Collection, clips: list[Path]) -> None:
    index = filled._store.folder / "index.faiss"
    old = index.read_bytes()
    filled.remove(video=clips[2])
    filled.add(clips[12:14])
    filled.close()
    index.write_bytes(old)
    with Collection.open(filled._store.folder) as again:
        assert _ids(again) == [1, 2, *range(4, 15)]
        assert again.check().fixed == ()
        assert index.read_bytes() == old  # three changes are no reason to write it all


def test_cache_of_another_collection_is_not_taken(
    filled: Collection, tmp_path: Path, embedder: LayoutEmbedder, clips: list[Path]
) -> None:
    """The same model, the same ids, the same revision, other videos."""
    with Collection.create(tmp_path / "dogs", model=embedder, window_s=5.0) as dogs:
        dogs.add(clips[3:15])
        dogs.rebuild()
        assert dogs._store.revision()[0] == filled._store.revision()[0]
    shutil.copy(tmp_path / "dogs" / "index.faiss", filled._store.folder / "index.faiss")
    with Collection.open(filled._store.folder, model=embedder) as again:
        assert again.search(video=clips[0], k=1)[0].video == str(clips[0])


def _back_up_and_restore(collection: Collection, meanwhile: Callable[[], object]) -> None:
    """`meanwhile` is undone in SQLite, not in the index; with SQLite's own backup."""
    with sqlite3.connect(":memory:") as kept:
        collection._store._db.backup(kept)
        meanwhile()
        kept.backup(collection._store._db)
    kept.close()


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("kind", ["Flat", "HNSW8"])
def test_after_a_restored_backup_the_same_id_is_another_segment(
    filled: Collection, embedder: LayoutEmbedder, clips: list[Path], kind: str, is_open: bool
) -> None:
    filled.rebuild(index=kind)
    _back_up_and_restore(filled, lambda: (filled.add(clips[12]), filled.rebuild()))
    if not is_open:
        filled.close()
        filled = Collection.open(filled._store.folder, model=embedder)
    filled.add(clips[13])
    [hit] = filled.search(video=clips[13], k=1)
    assert (hit.id, hit.video) == (13, str(clips[13]))
    assert hit.score == pytest.approx(1, abs=1e-6)
    assert filled._cache.segment_ids_N.tolist() == list(range(1, 14))
    assert filled.check().fixed == ()


def test_check_finds_the_index_of_before_a_restored_backup(
    filled: Collection, clips: list[Path]
) -> None:
    index = filled._store.folder / "index.faiss"
    _back_up_and_restore(filled, lambda: (filled.add(clips[12]), filled.rebuild()))
    of_before = index.read_bytes()
    filled.add(clips[13])
    index.write_bytes(of_before)
    [fixed] = filled.check().fixed
    assert "not of this history" in fixed
    assert filled.check().fixed == ()


def test_check_compares_vectors(filled: Collection, clips: list[Path]) -> None:
    """Changed by another program, so that nothing tells of it."""
    db = sqlite3.connect(filled._store.folder / DATABASE, isolation_level=None)
    db.execute("UPDATE vectors_1 SET vector = (SELECT vector FROM vectors_1 WHERE segment_id = 1)")
    [fixed] = filled.check().fixed
    assert "its vectors are not those of the collection" in fixed
    assert filled.check().fixed == ()


def test_writes_of_another_process_are_seen(filled: Collection, clips: list[Path]) -> None:
    other = Collection.open(filled._store.folder, model=filled.model)
    assert _ids(other) == list(range(1, 13))
    filled.remove(video=clips[0])
    filled.add(clips[12:13])
    assert _ids(other) == list(range(2, 14))
    assert other.search(video=clips[12], k=1)[0].id == 13


def test_check_finds_damage_and_missing_files(
    cats: Collection, clips: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    shutil.copy(clips[0], path)
    cats.add([path, *clips[1:4]])
    path.unlink()
    assert cats.check().missing_files == (str(path),)
    assert cats.search(video=clips[0], k=1)[0].video == str(path)  # stays searchable

    db = sqlite3.connect(cats._store.folder / DATABASE, isolation_level=None)
    db.execute("UPDATE vectors_1 SET vector = zeroblob(length(vector)) WHERE segment_id = 2")
    db.execute("UPDATE vectors_1 SET vector = x'0102' WHERE segment_id = 3")
    problems = cats.check().problems
    assert len(problems) == 2
    assert "the vector of segment 2 is of length 0 instead of 1: remove" in problems[0]
    assert "the vector of segment 3 is of 2 bytes instead of 192" in problems[1]
    cats.add_texts(["a dog"])
    db.execute("DELETE FROM text_vectors_1")
    assert "a text's vector has the wrong size" in cats.check().problems[2]
    cats.remove(text="a dog")
    for damaged in clips[1:3]:  # as it says
        cats.remove(video=damaged)
    cats.add(clips[1:3])
    assert cats.check().problems == ()
    assert len(_ids(cats)) == 4

    db.execute("INSERT INTO segments VALUES (90, 77, 0, 1)")
    assert cats.check().problems == ("segments 90 belongs to no videos",)


def test_check_of_a_damaged_database(filled: Collection) -> None:
    filled.close()
    database = filled._store.folder / DATABASE
    data = bytearray(database.read_bytes())
    for page in range(8, len(data) // 4096):
        data[page * 4096 : page * 4096 + 200] = b"\xa5" * 200
    database.write_bytes(data)
    with Collection.open(filled._store.folder) as again:
        assert len(again.check().problems) > 0
        with pytest.raises(ValueError, match="'cats' is damaged"):
            _ids(again)


@pytest.mark.parametrize("kind", ["IVF2,Flat", "HNSW8", "SQ8"])
def test_rebuild_as_another_kind(
    filled: Collection, clips: list[Path], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    exact = {path: filled.search(video=path, k=1) for path in clips[:12]}
    filled.add(clips[12:14], metadata={"camera": "north"})
    filled.rebuild(index=kind)
    assert filled.info()["index"] == kind
    filled.close()
    with Collection.open(filled._store.folder, model=LayoutEmbedder()) as again:
        assert not caplog.records  # taken from its file
        for path, hits in exact.items():
            assert again.search(video=path, k=1) == hits  # the score too
        north = again.search(video=clips[0], k=5, where={"camera": "north"})
        assert {hit.video for hit in north} == set(map(str, clips[12:14]))
        again.remove(video=clips[3])
        again.add(clips[14:15])
        assert again.search(video=clips[14], k=1)[0].video == str(clips[14])
        assert str(clips[3]) not in {hit.video for hit in again.search(video=clips[3], k=100)}
        again.rebuild()
        assert again.info()["index"] == kind
        again.rebuild(index="Flat")
        assert len(_ids(again)) == 14


@pytest.mark.parametrize("kind", ["IVF4,Flat", "HNSW8"])
def test_an_approximate_index_gives_as_many_hits_as_there_are(
    cats: Collection, clips: list[Path], kind: str
) -> None:
    cats.add(clips)
    for k in (10, len(cats)):
        exact = cats.search(video=clips[4], k=k)
        cats.rebuild(index=kind)
        assert len(cats.search(video=clips[4], k=k)) == k
        assert len(cats.search(video=clips[4], k=k, group_by="video")) == k
        cats.rebuild(index="Flat")
    cats.rebuild(index=kind)
    assert cats.search(video=clips[4], k=len(cats)) == exact
    assert len(cats.search(video=clips[4], k=1000)) == len(cats)


def test_rebuild_refuses_and_changes_nothing(filled: Collection) -> None:
    with pytest.raises(ValueError, match="'IVF4096,SQ8' cannot be made from 12 vectors"):
        filled.rebuild(index="IVF4096,SQ8")
    with pytest.raises(ValueError, match="does not know the index 'Flatt'"):
        filled.rebuild(index="Flatt")
    assert filled.info()["index"] == "auto" and _ids(filled) == list(range(1, 13))


def test_too_few_vectors_for_the_kind_are_searched_one_by_one(
    filled: Collection, clips: list[Path]
) -> None:
    filled.rebuild(index="IVF8,Flat")
    for path in clips[:8]:
        filled.remove(video=path)
    assert _ids(filled) == [9, 10, 11, 12]
    filled.close()
    with Collection.open(filled._store.folder) as again:
        assert _ids(again) == [9, 10, 11, 12]


def test_read_only_folder_can_be_searched_not_changed(
    filled: Collection, clips: list[Path]
) -> None:
    """In a process without rights to the folder, whoever runs the tests."""
    filled.close()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "cats"
        shutil.copytree(filled._store.folder, folder)
        (folder / "index.faiss").unlink()
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        Path(parent).chmod(0o755)
        script = f"""
            import os
            import numpy as np
            from retrieval import Collection
            collection = Collection.open({str(folder)!r})
            import retrieval.backends.faiss_index, fluxclip.video.stills  # before the rights go
            collection.close()
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            collection = Collection.open({str(folder)!r})
            print(len(collection.search(vector=np.ones(collection.info()["dim"]), k=100)))
            for change in (lambda: collection.remove(id=1), lambda: collection.rebuild()):
                try:
                    change()
                except PermissionError as error:
                    print(error)
            """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
        )
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    refusal = "collection 'cats' cannot be written: Permission denied"
    lines = done.stdout.splitlines()
    assert lines[0] == "12" and len(lines) == 3
    assert all(line.startswith(refusal) for line in lines[1:])
    assert done.stderr == ""


def test_a_full_disk_is_said_and_nothing_is_lost(
    filled: Collection, clips: list[Path], tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk: it needs no rights."""
    expected = filled.search(video=clips[3], k=100)
    folder = filled._store.folder
    filled.close()
    script = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from layout_embedder import LayoutEmbedder
        from retrieval import Collection

        collection = Collection.open({str(folder)!r}, model=LayoutEmbedder())
        collection.search(video={str(clips[3])!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for write in (
            lambda: collection.add({str(clips[12])!r}),
            lambda: collection.remove(id=[1, 2, 3]),
            lambda: collection.rebuild(index="SQ8"),
            lambda: collection.rebuild(),
            lambda: collection.backup({str(tmp_path / "copy")!r}),
        ):
            try:
                write()
            except OSError as error:
                print(error)
        print(len(collection.search(video={str(clips[3])!r}, k=100)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # FAISS complains there too
    *messages, num_hits = done.stdout.splitlines()
    assert len(messages) == 5 and num_hits == "12"
    for message in messages:
        assert "of collection 'c" in message or "cannot write" in message
    assert sorted(os.listdir(tmp_path)) == ["cats"]
    with Collection.open(folder, model=LayoutEmbedder()) as again:
        assert again.search(video=clips[3], k=100) == expected
        assert again.check() == CheckReport((), (), ())
        assert again.add(clips[12]).added == 1 and again.remove(id=[1, 2]) == 2


def test_importing_a_collection_loads_neither_torch_nor_faiss() -> None:
    script = "import sys, retrieval.collection; print({'torch', 'faiss', 'av'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_without_faiss_all_is_compared_one_by_one_and_the_log_says_what_to_do(
    filled: Collection,
    clips: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = filled.search(video=clips[3])
    monkeypatch.delitem(sys.modules, "retrieval.backends.faiss_index", raising=False)
    monkeypatch.setitem(sys.modules, "faiss", None)  # how Python notes that there is none
    with Collection.open(filled._store.folder, model=filled.model) as again:
        assert again.search(video=clips[3]) == expected
        assert "FAISS is not installed: pip install 'fluxclip[cpu]'" in caplog.text
        assert again.add(clips[12:14]).added == 2
        assert _ids(again) == list(range(1, 15))
        with pytest.raises(OSError, match="FAISS is not installed"):
            again.rebuild()
