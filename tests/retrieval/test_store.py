"""The SQLite file: whole transactions, ids that never come back, errors in a line."""

import dataclasses
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from retrieval import database
from retrieval import schema as schema_module
from retrieval.database import DATABASE
from retrieval.store import FileState, SegmentRow, Store, VideoRow

DIM = 8
STATE = FileState(size=10, mtime_ns=20, sha256="30")


def _vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)


def _put(store: Store, path: str, num_segments: int = 1, **metadata: str | int | float) -> None:
    segments = [(float(i), float(i + 1)) for i in range(num_segments)]
    vectors = _vectors(num_segments, seed=len(path))
    store.put_video(path, STATE, float(num_segments), segments, vectors, metadata)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    Store.create(tmp_path / "cats", {"dim": DIM, "model_name": "m"})
    return Store(tmp_path / "cats")


def test_create_makes_the_folder_in_one_step(tmp_path: Path) -> None:
    Store.create(tmp_path / "a" / "cats", {"dim": DIM, "window_s": 2.5})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["cats"]
    settings = Store(tmp_path / "a" / "cats").settings()
    assert settings == {"dim": DIM, "window_s": 2.5, "space": 1}
    with pytest.raises(FileExistsError, match="exists already"):
        Store.create(tmp_path / "a" / "cats", {"dim": DIM})
    with pytest.raises(TypeError):  # what JSON cannot hold
        Store.create(tmp_path / "a" / "dogs", {"dim": object()})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["cats"]


def test_the_unfinished_folder_of_another_machine_stays(tmp_path: Path) -> None:
    of_another = tmp_path / f".cats.{os.getpid()}.unfinished"
    of_another.mkdir()
    (of_another / DATABASE).write_text("on its way")
    with pytest.raises(FileExistsError, match="another process is making 'cats'"):
        Store.create(tmp_path / "cats", {"dim": DIM})
    assert [path.name for path in of_another.iterdir()] == [DATABASE]


def test_what_belongs_beside_the_database_is_there_before_the_name(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        assert not (tmp_path / "cats").exists()
        (folder / "tower").write_text("x")

    Store.create(tmp_path / "cats", {"dim": DIM}, beside=write)
    assert (tmp_path / "cats" / "tower").read_text() == "x"

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the disk of collection 'dogs' fails or is full"):
        Store.create(tmp_path / "dogs", {"dim": DIM}, beside=full)
    assert [path.name for path in tmp_path.iterdir()] == ["cats"]


def test_vectors_come_back_bit_for_bit_in_the_order_of_ids(store: Store) -> None:
    _put(store, "/a", 3)
    _put(store, "/bb", 2)
    ids, vectors = store.vectors()
    assert ids.tolist() == [1, 2, 3, 4, 5] and vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.concatenate([_vectors(3, 2), _vectors(2, 3)]))
    ids, some = store.vectors(np.array([5, 2, 99]))
    assert ids.tolist() == [2, 5]
    np.testing.assert_array_equal(some, vectors[[1, 4]])
    assert store.segments(np.array([4, 99])) == {4: SegmentRow(4, 2, "/bb", 0.0, 1.0)}


def test_ids_are_never_used_again(store: Store) -> None:
    _put(store, "/a", 3)
    assert store.remove_videos(["/a"]) == 3
    _put(store, "/a", 2)
    assert store.segment_ids().tolist() == [4, 5]
    _put(store, "/a", 2)  # replaced
    assert store.segment_ids().tolist() == [6, 7]
    assert store.remove_segments([7]) == 1 and store.remove_segments([7]) == 0
    assert list(store.files()) == ["/a"]
    store.remove_segments([6])
    assert store.counts() == {"videos": 0, "segments": 0, "texts": 0}
    store.put_texts(["x"], _vectors(1))
    assert store.remove_texts(["x"]) == 1 and store.remove_texts(["x"]) == 0
    store.put_texts(["x"], _vectors(1))
    assert store.texts()[0] == [(2, "x")]


def test_a_failing_write_leaves_nothing(store: Store) -> None:
    _put(store, "/a", 2, camera="north")
    revision = store.revision()
    with pytest.raises(ValueError):  # fewer vectors than segments, found after the first insert
        store.put_video("/b", STATE, 2.0, [(0.0, 1.0), (1.0, 2.0)], _vectors(1))
    with pytest.raises(ValueError):
        store.put_video("/a", STATE, 2.0, [(0.0, 1.0), (1.0, 2.0)], _vectors(1))
    assert store.revision() == revision
    assert list(store.files()) == ["/a"] and store.segment_ids().tolist() == [1, 2]
    assert store.metadata(1) == {"camera": "north"}


def test_revision_grows_with_every_write_that_changes_something(store: Store) -> None:
    seen = [store.revision()]
    _put(store, "/a")
    seen.append(store.revision())
    store.touch_video("/a", STATE, {"camera": "north"})
    seen.append(store.revision())
    store.touch_video("/a", STATE, {"camera": "north"})  # known already
    assert store.revision() == seen[-1]
    store.put_texts(["x"], _vectors(1))
    seen.append(store.revision())
    store.remove_videos(["/a"])
    seen.append(store.revision())
    assert seen == sorted(set(seen))


def test_metadata_keeps_types_and_compares_by_them(store: Store) -> None:
    _put(store, "/a", year=2020, camera="north", share=0.5)
    _put(store, "/b", 2, year="2020", camera="north")
    _put(store, "/c", year=True, camera="ñ 'x' \"y\"")
    assert store.metadata(1) == {"year": 2020, "camera": "north", "share": 0.5}
    assert store.metadata(3) == {"year": True, "camera": "ñ 'x' \"y\""}
    assert store.segment_ids({"year": 2020}).tolist() == [1]
    assert store.segment_ids({"year": 2020.0}).tolist() == [1]
    assert store.segment_ids({"year": "2020"}).tolist() == [2, 3]
    assert store.segment_ids({"year": 1}).tolist() == []
    assert store.segment_ids({"year": True}).tolist() == [4]
    assert store.segment_ids({"camera": "north"}).tolist() == [1, 2, 3]
    assert store.segment_ids({"camera": "north", "share": 0.5}).tolist() == [1]
    assert store.segment_ids({"camera": "ñ 'x' \"y\""}).tolist() == [4]
    assert store.segment_ids({"camra": "north"}).tolist() == []
    assert store.segment_ids({}).tolist() == store.segment_ids().tolist() == [1, 2, 3, 4]


def test_a_reader_sees_one_revision_and_holds_up_no_writer(store: Store) -> None:
    _put(store, "/a")
    reader = Store(store.folder)
    with reader.snapshot():
        assert reader.segment_ids().tolist() == [1]
        _put(store, "/b")
        assert reader.segment_ids().tolist() == [1]
    assert reader.segment_ids().tolist() == [1, 2]


@pytest.mark.parametrize("wait_s", [0, None])
def test_one_writer_at_a_time(store: Store, wait_s: float | None) -> None:
    other = Store(store.folder)
    start_s = time.monotonic()
    with (
        store.sole_writer(),
        pytest.raises(OSError, match="another process is writing to collection 'cats'"),
        other.sole_writer(wait_s=wait_s),
    ):
        pass
    waited_s = time.monotonic() - start_s
    assert (waited_s < database.BUSY_TIMEOUT_S) == (wait_s == 0)
    with other.sole_writer(wait_s=0):
        pass


def test_a_writer_waits_for_one_who_is_done_soon(store: Store) -> None:
    """As a search that writes its index is."""
    held = store.sole_writer()
    held.__enter__()
    done = threading.Timer(0.05, held.__exit__, (None, None, None))
    done.start()
    with Store(store.folder).sole_writer():
        assert done.finished.is_set()
    done.join()


def test_a_lock_held_by_another_program_is_an_os_error(store: Store) -> None:
    late = Store(store.folder)
    foreign = sqlite3.connect(store.folder / DATABASE, isolation_level=None)
    foreign.execute("BEGIN IMMEDIATE")
    assert late.segment_ids().tolist() == []  # reading goes on
    with pytest.raises(OSError, match="collection 'cats' is locked by another process"):
        _put(late, "/a")
    foreign.execute("ROLLBACK")
    _put(late, "/a")


def test_a_full_disk_is_an_os_error_and_loses_nothing(store: Store) -> None:
    _put(store, "/a")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to be full
    with pytest.raises(OSError, match="the disk of collection 'cats' fails or is full"):
        _put(store, "/b", 500)
    assert list(store.files()) == ["/a"] and store.problems() == []


def test_what_is_no_collection_is_said(store: Store, tmp_path: Path) -> None:
    database = store.folder / DATABASE
    store.close()
    with pytest.raises(ValueError, match="collection 'cats' is closed"):
        store.counts()

    sqlite3.connect(tmp_path / DATABASE).execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(ValueError, match="is not the file of a collection"):
        Store(tmp_path)

    newer = sqlite3.connect(database)
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(ValueError, match="'cats' has format 99, this program reads up to 4"):
        Store(store.folder)

    database.write_bytes(b"not a database at all, not even nearly" * 100)
    with pytest.raises(ValueError, match="collection 'cats' is damaged"):
        Store(store.folder)


def test_a_file_of_an_older_format_is_brought_up_to_date(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(store, "/a", 2)
    later = ("ALTER TABLE videos ADD COLUMN title TEXT", "CREATE TABLE extra (x)")
    monkeypatch.setattr(schema_module, "MIGRATIONS", (*schema_module.MIGRATIONS, later))
    again = Store(store.folder)
    assert again._db.execute("SELECT path, title FROM videos").fetchall() == [("/a", None)]
    assert again._db.execute("PRAGMA user_version").fetchone() == (5,)
    assert again.segment_ids().tolist() == [1, 2]
    assert again.has_revision(store.revision())


def test_a_file_of_the_first_format_goes_on_with_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema_module, "MIGRATIONS", schema_module.MIGRATIONS[:1])
        Store.create(tmp_path / "old", {"dim": DIM, "revision": 41})
    store = Store(tmp_path / "old")
    number, _ = store.revision()
    assert number >= 41 and store.settings() == {"dim": DIM, "space": 1}
    _put(store, "/a")
    assert store.revision()[0] > number


def test_a_file_of_format_3_keeps_all_it_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written when vectors stood in `segments`, and metadata were JSON."""
    with monkeypatch.context() as patch:
        patch.setattr(schema_module, "MIGRATIONS", schema_module.MIGRATIONS[:3])
        Store.create(tmp_path / "old", {"dim": DIM, "index": "Flat"})
    vectors = _vectors(4)
    old = sqlite3.connect(tmp_path / "old" / DATABASE, isolation_level=None)
    old.execute("BEGIN")
    old.execute("INSERT INTO videos VALUES (3, '/a', 10, 20, '30', 2.0, 'then')")
    old.executemany(
        "INSERT INTO segments VALUES (?, 3, ?, ?, ?)",
        [(id, id, id + 1, vectors[id - 5].tobytes()) for id in (5, 6, 7)],
    )
    values = {"text": 'a\0b \u00f1 "x"', "whole": 2020, "part": 0.5, "yes": True, "big": 10**30}
    old.executemany(
        "INSERT INTO metadata VALUES (3, ?, ?)",
        [(key, json.dumps(value)) for key, value in values.items()],
    )
    old.execute("INSERT INTO texts VALUES (2, 'a cat', ?)", [vectors[3].tobytes()])
    old.execute("INSERT INTO revisions DEFAULT VALUES")
    old.execute("DELETE FROM segments WHERE id = 7")
    old.execute("COMMIT")
    assert old.execute("PRAGMA user_version").fetchone() == (3,)
    revision = old.execute("SELECT max(revision), token FROM revisions").fetchone()
    old.close()

    with closing(Store(tmp_path / "old")) as store:
        ids, held = store.vectors()
        assert ids.tolist() == [5, 6]
        np.testing.assert_array_equal(held, vectors[:2])
        assert store.metadata(3) == {**values, "big": 1e30}
        assert store.segment_ids({"whole": {"gt": 2019.5}, "yes": True}).tolist() == [5, 6]
        [(text_id, text)], text_vector = store.texts()
        assert (text_id, text) == (2, "a cat")
        np.testing.assert_array_equal(text_vector, vectors[3:])
        assert store.has_revision(revision) and store.space == 1 and store.problems() == []
        assert store.removed_since(0).tolist() == [7]
        _put(store, "/b")
        store.put_texts(["a dog"], vectors[:1])
        assert store.segment_ids().tolist() == [5, 6, 8]  # 7 is not given out again
        assert [id for id, _ in store.texts()[0]] == [2, 3]
        assert store.remove_videos(["/a"]) == 2
    reopened = Store(tmp_path / "old")
    assert reopened.segment_ids().tolist() == [8] and reopened.problems() == []


def test_a_file_of_format_3_that_is_damaged_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema_module, "MIGRATIONS", schema_module.MIGRATIONS[:3])
        Store.create(tmp_path / "old", {"dim": DIM})
    with closing(sqlite3.connect(tmp_path / "old" / DATABASE)) as old, old:
        old.execute("INSERT INTO videos VALUES (3, '/a', 10, 20, '30', 2.0, 'then')")
        old.execute("INSERT INTO metadata VALUES (3, 'a', 'not JSON')")
    with pytest.raises(ValueError, match="collection 'old' is damaged"):
        Store(tmp_path / "old")
    with closing(sqlite3.connect(tmp_path / "old" / DATABASE)) as old:
        assert old.execute("PRAGMA user_version").fetchone() == (3,)
        assert old.execute("SELECT value FROM metadata").fetchall() == [("not JSON",)]


def test_a_file_of_an_older_format_in_a_read_only_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a process without rights to the folder, whoever runs the tests."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "old"
        with monkeypatch.context() as patch:
            patch.setattr(schema_module, "MIGRATIONS", schema_module.MIGRATIONS[:3])
            Store.create(folder, {"dim": DIM})
        (folder / DATABASE).chmod(0o444)
        folder.chmod(0o555)
        Path(parent).chmod(0o755)
        script = f"""
            import os
            from pathlib import Path
            from retrieval.store import Store
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            try:
                Store(Path({str(folder)!r}))
            except PermissionError as error:
                print(error)
            """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
        )
        folder.chmod(0o755)
    assert "collection 'old' has an older format and cannot be written" in done.stdout, done.stderr


def test_a_revision_is_told_from_another_of_the_same_number(store: Store) -> None:
    _put(store, "/a")
    common = store.revision()
    copy = store.folder.with_name("copy")
    store.close()
    shutil.copytree(store.folder, copy)
    store, other = Store(store.folder), Store(copy)
    _put(store, "/b")
    _put(other, "/c")
    assert store.revision()[0] == other.revision()[0]
    assert store.has_revision(common) and other.has_revision(common)
    assert store.has_revision(store.revision()) and not store.has_revision(other.revision())


def test_what_was_removed_since_a_revision_is_known(store: Store) -> None:
    _put(store, "/a", 3)
    _put(store, "/bb", 2)
    [at_first, *_] = revisions = [store.revision()[0]]
    store.remove_segments([2])
    revisions.append(store.revision()[0])
    store.remove_videos(["/bb"])
    revisions.append(store.revision()[0])
    _put(store, "/a", 1)  # replaced
    assert sorted(store.removed_since(at_first).tolist()) == [1, 2, 3, 4, 5]
    since = [sorted(store.removed_since(revision).tolist()) for revision in revisions[1:]]
    assert since == [[1, 3, 4, 5], [1, 3]]
    assert store.removed_since(store.revision()[0]).tolist() == []
    ids, vectors = store.vectors(after=5)
    assert ids.tolist() == [6]
    np.testing.assert_array_equal(vectors, store.vectors(np.array([6]))[1])


def test_check_removes_what_a_killed_create_left(store: Store) -> None:
    parent = store.folder.parent
    for name in (".cats.123.unfinished", ".cats.b.123.unfinished", ".cats.unfinished"):
        (parent / name).mkdir()
    [said] = store.remove_unfinished()
    assert said.startswith(".cats.123.unfinished was removed")
    left = sorted(path.name for path in parent.iterdir())
    assert left == [".cats.b.123.unfinished", ".cats.unfinished", "cats"]


def test_a_damaged_vector_is_not_searched(store: Store) -> None:
    _put(store, "/a", 2)
    store._db.execute("UPDATE vectors_1 SET vector = x'0102' WHERE segment_id = 2")
    with pytest.raises(ValueError, match="a vector has the wrong size"):
        store.vectors()


def test_reading_all_vectors_is_quick(tmp_path: Path) -> None:
    Store.create(tmp_path / "big", {"dim": 384})
    store = Store(tmp_path / "big")
    vectors = np.random.default_rng(0).normal(size=(3000, 384)).astype(np.float32)
    store.put_video("/a", STATE, 1.0, [(0.0, 1.0)] * 3000, vectors)
    start = time.perf_counter()
    ids, read = store.vectors()
    assert time.perf_counter() - start < 1  # some 20 ms when nothing else runs
    np.testing.assert_array_equal(read, vectors)
    assert len(ids) == 3000


@pytest.mark.parametrize(
    "harm",
    [
        "DELETE FROM settings WHERE key = 'dim'",
        "UPDATE settings SET value = '{' WHERE key = 'dim'",
        "DROP TABLE settings",
        "DROP TABLE segments",
        "ALTER TABLE vectors_1 RENAME COLUMN vector TO v",
        "UPDATE metadata SET value = 7",
        "UPDATE videos SET path = CAST(x'ff' AS TEXT)",
    ],
)
def test_whatever_is_wrong_inside_is_one_line_about_damage(store: Store, harm: str) -> None:
    _put(store, "/a", 2, camera="north")
    store._db.execute(harm)
    store.close()
    with pytest.raises(ValueError, match="collection 'cats' is damaged") as error:
        again = Store(store.folder)
        with again.snapshot():
            again.vectors()
            again.metadata(1)
            again.files()
    assert "\n" not in str(error.value)


def test_a_snapshot_that_sqlite_has_ended_itself(store: Store) -> None:
    """As it does after some errors of the disk."""
    with pytest.raises(OSError, match="the first reason"), store.snapshot():
        store._db.execute("ROLLBACK")
        raise OSError("the first reason")
    assert store.segment_ids().tolist() == []


def test_a_mistake_of_the_program_is_not_called_damage(store: Store) -> None:
    with pytest.raises(sqlite3.ProgrammingError):
        store._rows("SELECT ?", [1, 2])


def _rows(num: int, first: int = 0, num_segments: int = 3) -> list[VideoRow]:
    return [
        VideoRow(
            f"/{first + i}",
            FileState(i, i, f"{first + i:064x}"),
            3.0,
            [(float(at), at + 1.0) for at in range(num_segments)],
            _vectors(num_segments, seed=first + i),
            {"year": 2000 + i, "camera": ["north", "south"][i % 2]},
        )
        for i in range(num)
    ]


def test_many_videos_are_one_transaction(store: Store, tmp_path: Path) -> None:
    """And hold what as many calls of `put_video` would have put there."""
    Store.create(tmp_path / "one by one", {"dim": DIM})
    other = Store(tmp_path / "one by one")
    rows = _rows(5)
    before = store.revision()[0]
    store.put_videos(rows)
    assert store.revision()[0] == before + 1
    for row in rows:
        other.put_video(
            row.path, row.state, row.duration_s, row.segments, row.vectors_ND, row.metadata
        )
    for at, (ours, theirs) in enumerate(zip(store.vectors(), other.vectors(), strict=True)):
        np.testing.assert_array_equal(ours, theirs, err_msg=str(at))
    assert store.files() == other.files()
    assert [store.metadata(id) for id in range(1, 6)] == [other.metadata(id) for id in range(1, 6)]

    wrong = VideoRow("/x", STATE, 1.0, [(0.0, 1.0), (1.0, 2.0)], _vectors(1))
    with pytest.raises(ValueError):
        store.put_videos([*_rows(2, first=7), wrong])
    assert store.counts() == {"videos": 5, "segments": 15, "texts": 0}
    assert store.files(["/1", "/x", "/3"]) == {f"/{i}": rows[i].state for i in (1, 3)}


def test_given_ids_are_kept_if_they_ascend_from_the_last(store: Store) -> None:
    [row] = _rows(1)
    store.put_videos([dataclasses.replace(row, ids=[7, 12, 40])])
    ids, vectors = store.vectors()
    assert ids.tolist() == [7, 12, 40]
    np.testing.assert_array_equal(vectors, row.vectors_ND)
    _put(store, "/b")
    store.remove_segments([41])
    # free ones would be found by no search that has seen higher ones; 41 was given out once
    for wrong in ([1, 2, 3], [41, 42, 43], [42, 44, 43], [42, 42, 43], [39, 42, 43]):
        with pytest.raises(ValueError, match="ids of '/c' do not ascend from 42"):
            store.put_videos([dataclasses.replace(row, path="/c", ids=wrong)])
    assert store.segment_ids().tolist() == [7, 12, 40] and len(store.files()) == 1


def test_what_was_written_is_on_the_disk_at_the_end_beside_a_reader(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def noted(file: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noted)
    reader = Store(store.folder)
    with reader.snapshot():
        assert reader.counts()["videos"] == 0  # now no checkpoint can go on from here
        with store.flushed_at_the_end():
            _put(store, "/a")
            assert flushed == []
    assert flushed == [str(store.folder / f"{DATABASE}-wal")]


def test_blocks_are_all_vectors_of_one_revision(store: Store) -> None:
    store.put_videos(_rows(5))
    whole = store.vectors()
    writer = Store(store.folder)
    blocks = []
    for block in store.vector_blocks(rows=4):
        blocks.append(block)
        writer.remove_segments([14, 15])  # is not waited for, and not seen
    assert [len(ids) for ids, _ in blocks] == [4, 4, 4, 3]
    for at in (0, 1):
        np.testing.assert_array_equal(np.concatenate([block[at] for block in blocks]), whole[at])
    assert list(Store.vector_blocks(Store(store.folder), rows=99))[0][0].tolist() == [*range(1, 14)]


def test_a_moved_video_is_the_same_one(store: Store) -> None:
    store.put_videos(_rows(2))
    before = store.vectors()
    store.move_video("/0", "/new", STATE, {"camera": "east"})
    assert store.files() == {"/1": _rows(2)[1].state, "/new": STATE}
    np.testing.assert_array_equal(store.vectors()[1], before[1])
    assert store.metadata(1) == {"year": 2000, "camera": "east"}
    assert store.segments(np.array([1]))[1].video == "/new"


def test_many_are_removed_in_one_transaction(store: Store) -> None:
    store.put_videos(_rows(6))
    before = store.revision()[0]
    assert store.remove_videos(["/0", "/5", "/nowhere"]) == 6
    assert store.remove_segments([4, 5, 6, 7, 99]) == 4
    assert store.revision()[0] == before + 2
    assert store.segment_ids().tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert list(store.files()) == ["/2", "/3", "/4"]  # "/1" went with its last segment
    assert store.vectors()[0].tolist() == store.segment_ids().tolist()
    assert store._rows("SELECT count(*) FROM metadata") == [(6,)]
    assert sorted(store.removed_since(before).tolist()) == [1, 2, 3, 4, 5, 6, 7, 16, 17, 18]
    assert store.problems() == []


def test_another_space_grows_beside_and_then_serves(store: Store) -> None:
    store.put_videos(_rows(3))
    store.put_texts(["a", "b"], _vectors(2))
    old = store.vectors()
    assert store.staged() is None
    wide = np.random.default_rng(1).normal(size=(12, 3)).astype(np.float32)
    assert store.stage_space({"dim": 3, "fingerprint": "new"}) == 2
    with pytest.raises(ValueError, match="'cats' has another space under way"):
        store.stage_space({"dim": 3})
    assert store.staged() == {"dim": 3, "fingerprint": "new", "space": 2}

    first = store.unstaged_segments(4)
    assert [(row.id, row.video) for row in first] == [(1, "/0"), (2, "/0"), (3, "/0"), (4, "/1")]
    store.put_staged([row.id for row in first], wide[:4])
    assert [row.id for row in store.unstaged_segments(99)] == [5, 6, 7, 8, 9]
    later = store.unstaged_segments(99, after=store.unstaged_segments(2)[1])
    assert [row.id for row in later] == [7, 8, 9]
    with pytest.raises(ValueError, match="the other space is not complete"):
        store.switch_space()
    np.testing.assert_array_equal(store.vectors()[1], old[1])  # serves meanwhile
    store.close()
    store = Store(store.folder)  # after a kill, say

    _put(store, "/late", 1)
    store.remove_segments([2])
    store.put_staged([5, 6, 7, 8, 9, 10], wide[4:10])
    assert store.unstaged_segments(99) == []
    assert store.unstaged_texts(1) == [(1, "a")]
    store.put_staged_texts([1, 2], wide[10:])
    reader = Store(store.folder)
    revision = store.revision()
    with reader.snapshot():
        assert (reader.space, reader.dim) == (1, DIM)
        store.switch_space()
        assert (reader.space, reader.dim) == (1, DIM) and reader.vectors()[1].shape == (9, DIM)
    assert (reader.space, reader.dim, reader.staged()) == (2, 3, None)
    assert reader.settings()["fingerprint"] == "new" and reader.revision() > revision
    reader.close()

    ids, vectors = store.vectors()
    assert ids.tolist() == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    np.testing.assert_array_equal(vectors, wide[[0, *range(2, 10)]])
    np.testing.assert_array_equal(store.texts()[1], wide[10:])
    store.drop_old_spaces()
    tables = {name for (name,) in store._rows("SELECT name FROM sqlite_schema")}
    assert {"vectors_2", "text_vectors_2"} <= tables and "vectors_1" not in tables
    store.put_video("/d", STATE, 1.0, [(0.0, 1.0)], wide[:1])
    assert store.problems() == [] and len(store.vectors()[0]) == 10


def test_a_space_is_given_up(store: Store) -> None:
    _put(store, "/a", 2)
    store.stage_space({"dim": 3})
    store.put_staged([1], np.ones((1, 3), np.float32))
    store.drop_staged()
    assert store.staged() is None and store.vectors()[0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="has no other space under way"):
        store.unstaged_segments(1)
    assert store.stage_space({"dim": 5}) == 2
    assert [row.id for row in store.unstaged_segments(9)] == [1, 2]


def test_videos_that_fail_are_removed_as_the_space_is_switched(store: Store) -> None:
    store.put_videos(_rows(2))
    store.stage_space({"dim": 3})
    store.put_staged([1, 2, 3], np.ones((3, 3), np.float32))
    with pytest.raises(ValueError, match="not complete"):
        store.switch_space(removing=["/0"])
    assert store.counts()["videos"] == 2 and store.space == 1  # all of it, or nothing
    store.switch_space(removing=["/1"])
    assert list(store.files()) == ["/0"] and store.vectors()[0].tolist() == [1, 2, 3]


def test_a_backup_is_of_one_revision_whoever_writes(store: Store) -> None:
    store.put_videos(_rows(4))
    writer = Store(store.folder)
    calls = []

    def beside(folder: Path) -> None:
        calls.append(sorted(path.name for path in folder.iterdir()))
        writer.remove_videos([f"/{len(calls)}"])

    target = store.folder.parent / "kept" / "copy"
    store.backup(target, beside=beside)
    assert calls == [[], [DATABASE]]
    copy = Store(target)
    assert list(copy.files()) == ["/0", "/2", "/3"] and copy.problems() == []
    assert store.has_revision(copy.revision())
    _put(copy, "/b")  # and may be written
    assert list(store.files()) == ["/0", "/3"]
    with pytest.raises(FileExistsError, match="exists already"):
        store.backup(target)
    assert [path.name for path in target.parent.iterdir()] == ["copy"]


def test_one_in_a_hundred_is_found_quickly_among_many(tmp_path: Path) -> None:
    Store.create(tmp_path / "big", {"dim": 1})
    store = Store(tmp_path / "big")
    one = np.ones((10, 1), np.float32)
    times = [(float(at), at + 1.0) for at in range(10)]
    store.put_videos(
        [VideoRow(f"/{i}", STATE, 10.0, times, one, {"part": i % 100}) for i in range(10_000)]
    )
    start = time.perf_counter()
    ids = store.segment_ids({"part": {"in": [3]}})
    assert time.perf_counter() - start < 0.1  # some 1 ms when nothing else runs
    assert len(ids) == 1000 and set(((ids - 1) // 10 % 100).tolist()) == {3}
