"""The SQLite file: whole transactions, ids that never come back, errors in a line."""

import errno
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from retrieval import store as store_module
from retrieval.store import DATABASE, FileState, Store, encode_metadata

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
    assert settings == {"dim": DIM, "window_s": 2.5}
    with pytest.raises(FileExistsError, match="exists already"):
        Store.create(tmp_path / "a" / "cats", {"dim": DIM})
    with pytest.raises(TypeError):  # what JSON cannot hold
        Store.create(tmp_path / "a" / "dogs", {"dim": object()})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["cats"]


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
    assert store.segments(np.array([4, 99])) == {4: store_module.SegmentRow(4, 2, "/bb", 0.0, 1.0)}


def test_ids_are_never_used_again(store: Store) -> None:
    _put(store, "/a", 3)
    assert store.remove_video("/a") == 3
    _put(store, "/a", 2)
    assert store.segment_ids().tolist() == [4, 5]
    _put(store, "/a", 2)  # replaced
    assert store.segment_ids().tolist() == [6, 7]
    assert store.remove_segment(7) == 1 and store.remove_segment(7) == 0
    assert list(store.files()) == ["/a"]
    store.remove_segment(6)
    assert store.counts() == {"videos": 0, "segments": 0, "texts": 0}
    store.put_texts(["x"], _vectors(1))
    assert store.remove_text("x") == 1 and store.remove_text("x") == 0
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
    store.remove_video("/a")
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


@pytest.mark.parametrize("metadata", [{"a": None}, {"a": [1]}, {"a": float("nan")}, {"": 1}])
def test_metadata_that_cannot_be_compared_is_refused(metadata: dict) -> None:
    with pytest.raises(ValueError, match="metadata"):
        encode_metadata(metadata)


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
    assert (waited_s < store_module.BUSY_TIMEOUT_S) == (wait_s == 0)
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
    with pytest.raises(ValueError, match="'cats' has format 99, this program reads up to 3"):
        Store(store.folder)

    database.write_bytes(b"not a database at all, not even nearly" * 100)
    with pytest.raises(ValueError, match="collection 'cats' is damaged"):
        Store(store.folder)


def test_a_file_of_an_older_format_is_brought_up_to_date(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(store, "/a", 2)
    later = ("ALTER TABLE videos ADD COLUMN title TEXT", "CREATE TABLE extra (x)")
    monkeypatch.setattr(store_module, "_MIGRATIONS", (*store_module._MIGRATIONS, later))
    again = Store(store.folder)
    assert again._db.execute("SELECT path, title FROM videos").fetchall() == [("/a", None)]
    assert again._db.execute("PRAGMA user_version").fetchone() == (4,)
    assert again.segment_ids().tolist() == [1, 2]
    assert again.has_revision(store.revision())


def test_a_file_of_the_first_format_goes_on_with_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_MIGRATIONS", store_module._MIGRATIONS[:1])
        Store.create(tmp_path / "old", {"dim": DIM, "revision": 41})
    store = Store(tmp_path / "old")
    number, _ = store.revision()
    assert number >= 41 and store.settings() == {"dim": DIM}
    _put(store, "/a")
    assert store.revision()[0] > number


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
    store.remove_segment(2)
    revisions.append(store.revision()[0])
    store.remove_video("/bb")
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
    store._db.execute("UPDATE segments SET vector = x'0102' WHERE id = 2")
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
        "ALTER TABLE segments RENAME COLUMN vector TO v",
        "UPDATE metadata SET value = 'north'",
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
