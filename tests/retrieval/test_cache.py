"""The cache: whatever it holds, a search is the exact one over SQLite, and a write costs little."""

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_embedder import LayoutEmbedder

from retrieval import Collection, cache
from retrieval.store import FileState

DIM = LayoutEmbedder().dim
# where there is one, in memory: hundreds of commits, each of which waits for the disk
QUICK_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else None
STATE = FileState(size=1, mtime_ns=1, sha256="1")


def put(collection: Collection, path: str, num: int, rng: np.random.Generator) -> None:
    """A video of windows, some of them equal to others; as `add` commits it."""
    few_ND = np.random.default_rng(0).normal(size=(12, DIM))
    vectors_ND = np.where(rng.random((num, 1)) < 0.5, few_ND[rng.integers(0, 12, num)],
                          rng.normal(size=(num, DIM)))  # fmt: skip
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    windows = [(float(i), float(i + 1)) for i in range(num)]
    camera = {"camera": int(rng.integers(3))}
    collection._store.put_video(path, STATE, num, windows, vectors_ND.astype(np.float32), camera)


def search_one_by_one(
    collection: Collection, query_D: np.ndarray, k: int, camera: int | None, group: bool
) -> list[tuple[int, float]]:
    """The oracle: ids and cosines from SQLite alone."""
    with collection._store.snapshot():
        ids_N, vectors_ND = collection._store.vectors()
        rows = collection._store.segments(ids_N)
    query_D = query_D.astype(np.float32) / np.linalg.norm(query_D.astype(np.float32))
    scores_N = (vectors_ND.astype(np.float64) * query_D).sum(axis=1)
    found, videos = [], set()
    for i in np.lexsort((ids_N, -scores_N)):
        video = rows[int(ids_N[i])].video_id
        if camera is not None and collection._store.metadata(video)["camera"] != camera:
            continue
        if not (group and video in videos):
            found.append((int(ids_N[i]), float(scores_N[i])))
        videos.add(video)
    return found[:k]


OPERATIONS = st.one_of(
    st.tuples(st.just("put"), st.integers(1, 9), st.booleans()),
    st.tuples(st.sampled_from(["remove", "remove segment"]), st.integers(0, 99), st.booleans()),
    st.sampled_from([("rebuild",), ("open",), ("lose the file",), ("damage the file",)]),
)
SEARCHES = st.tuples(
    st.integers(0, 99),
    st.sampled_from([1, 2, 7, 500]),
    st.sampled_from([None, 0, 1]),
    st.booleans(),
)


@pytest.fixture
def small_merges(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A base from 7 segments on, made anew when a third of it has changed."""
    monkeypatch.setattr(cache, "MERGE_SEGMENTS", 6)
    monkeypatch.setattr(cache, "MERGE_SHARE", 1 / 3)
    yield


@pytest.mark.usefixtures("small_merges")
@settings(max_examples=100)
@given(steps=st.lists(st.tuples(OPERATIONS, SEARCHES), min_size=1, max_size=14))
def test_a_search_is_exact_whatever_is_in_the_base(
    steps: list[tuple[tuple, tuple[int, int, int | None, bool]]],
) -> None:
    """Through the writer's eyes and those of a reader who was there from the start."""
    with tempfile.TemporaryDirectory(dir=QUICK_DISK) as parent:
        model = LayoutEmbedder()
        writer = Collection.create(Path(parent) / "c", model=model)
        reader = Collection.open(Path(parent) / "c", model=model)
        index = Path(parent) / "c" / "index.faiss"
        for number, ((what, *how), (seed, k, camera, group)) in enumerate(steps):
            rng = np.random.default_rng([seed, number])
            ids, videos = writer._store.segment_ids().tolist(), list(writer._store.files())
            if what == "put":
                put(writer, f"/{rng.integers(8)}.mp4", how[0], rng)
            elif what == "remove" and videos:
                writer._store.remove_video(videos[how[0] % len(videos)])
            elif what == "remove segment" and ids:
                writer._store.remove_segment(ids[how[0] % len(ids)])
            elif what == "rebuild":
                writer.rebuild()
            elif what == "open":
                writer.close()
                writer = Collection.open(Path(parent) / "c", model=model)
            elif what == "lose the file":
                index.unlink(missing_ok=True)
            elif what == "damage the file" and index.exists():
                data = bytearray(index.read_bytes())
                data[rng.integers(len(data))] ^= 0x10
                index.unlink()  # as whoever writes it: one that is mapped is never changed
                index.write_bytes(data)
            if how and how[1]:  # else as if it was killed before
                writer._refresh_cache()
            query_D = rng.normal(size=DIM)
            ids_N, vectors_ND = writer._store.vectors()
            if seed % 2 and len(ids_N):  # what is there, perhaps more than once
                query_D = vectors_ND[seed % len(ids_N)]
            for collection in (writer, reader) if seed % 3 else (reader, writer):
                hits = collection.search(
                    vector=query_D,
                    k=k,
                    where=None if camera is None else {"camera": camera},
                    group_by="video" if group else None,
                )
                expected = search_one_by_one(collection, query_D, k, camera, group)
                assert [(hit.id, hit.score) for hit in hits] == expected
                held_N = collection._cache.segment_ids_N.tolist()
                assert held_N == collection._store.segment_ids().tolist()
        assert writer.check().problems == () and writer.check().fixed == ()
        writer.close()
        reader.close()


@pytest.mark.usefixtures("small_merges")
def test_a_reader_sees_whole_states_while_another_process_writes(embedder: LayoutEmbedder) -> None:
    with tempfile.TemporaryDirectory(dir=QUICK_DISK) as parent:
        read_while_another_process_writes(Collection.create(Path(parent) / "c", model=embedder))


def read_while_another_process_writes(cats: Collection) -> None:
    put(cats, "/first.mp4", 9, np.random.default_rng(0))
    script = f"""
        import itertools, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import numpy as np
        from test_cache import cache, put, Collection
        cache.MERGE_SEGMENTS, cache.MERGE_SHARE = 20, 0.1
        rng = np.random.default_rng(5)
        with Collection.open({str(cats._store.folder)!r}) as writer:
            print("ready", flush=True)
            for number in itertools.count():
                time.sleep(0.01)  # a state lasts long enough to be searched and compared
                with writer._store.sole_writer():
                    put(writer, f"/{{rng.integers(12)}}.mp4", int(rng.integers(1, 9)), rng)
                    if number % 3 == 0:
                        ids = writer._store.segment_ids()
                        writer._store.remove_segment(int(rng.choice(ids)))
                    writer._refresh_cache()
        """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    query_D, revisions, bases = np.random.default_rng(6).normal(size=DIM), set(), set()
    while len(revisions) < 20 or len(bases) < 4:  # until it has seen what the other writes
        assert process.poll() is None
        before = cats._store.revision()
        hits = cats.search(vector=query_D, k=8)
        expected = search_one_by_one(cats, query_D, 8, None, False)
        if cats._store.revision() == before:
            assert [(hit.id, hit.score) for hit in hits] == expected
            revisions.add(before)
            bases.add(cats._cache._read)
    process.kill()
    process.wait()
    process.stdout.close()
    assert cats.check().problems == ()


def test_one_more_video_does_not_write_the_index(
    cats: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    index = cats._store.folder / "index.faiss"
    put(cats, "/large.mp4", 4096, rng)
    cats._refresh_cache()
    assert not index.exists()  # few enough to compare one by one
    put(cats, "/more.mp4", 1, rng)
    cats._refresh_cache()
    written = index.stat()
    put(cats, "/still more.mp4", 4096, rng)
    for id in (5, 50, 500):
        cats._store.remove_segment(id)
    monkeypatch.setattr(cache, "MERGE_SEGMENTS", 5000)
    cats._refresh_cache()
    assert index.stat() == written
    monkeypatch.setattr(cache, "MERGE_SEGMENTS", 4098)
    cats._refresh_cache()
    assert index.stat().st_ino != written.st_ino
    assert len(cats._cache._base or ()) == len(cats) == 8190


def test_a_reader_takes_the_base_that_another_process_has_merged(cats: Collection) -> None:
    rng = np.random.default_rng(0)
    reader = Collection.open(cats._store.folder)
    put(cats, "/large.mp4", 5000, rng)
    with cats._store.sole_writer():  # as while an `add` goes on
        reader.search(vector=rng.normal(size=DIM))
        assert len(reader._cache._newer_N) == 5000
        cats._refresh_cache()
    reader.search(vector=rng.normal(size=DIM))
    assert len(reader._cache._newer_N) == 0 and len(reader._cache._base or ()) == 5000


@pytest.mark.parametrize("kind", ["IVF4,Flat", "HNSW8"])
def test_what_is_beside_an_approximate_index_is_found_and_what_is_gone_is_not(
    cats: Collection, kind: str
) -> None:
    rng = np.random.default_rng(0)
    put(cats, "/a.mp4", 300, rng)
    cats.rebuild(index=kind)
    put(cats, "/b.mp4", 30, rng)
    cats._store.remove_segment(7)
    ids_N, vectors_ND = cats._store.vectors()
    for at in (-1, -30, 3):
        [hit] = cats.search(vector=vectors_ND[at], k=1)
        assert hit.score == pytest.approx(1, abs=1e-6)
    assert [hit.id for hit in cats.search(vector=vectors_ND[0], k=9999)].count(7) == 0
    assert {hit.id for hit in cats.search(vector=vectors_ND[0], k=9999)} == set(ids_N.tolist())
    assert cats.check().fixed == ()


def test_a_full_disk_costs_the_index_and_no_video(
    cats: Collection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    index = cats._store.folder / "index.faiss"
    put(cats, "/a.mp4", 50, rng)
    cats.rebuild()
    before = index.read_bytes()
    monkeypatch.setattr(cache, "MERGE_SEGMENTS", 6)
    put(cats, "/b.mp4", 50, rng)
    index.with_name("index.faiss.tmp").symlink_to("/dev/full")
    cats._refresh_cache()
    assert "cannot write" in caplog.text and "index.faiss: " in caplog.text
    assert index.read_bytes() == before and not list(cats._store.folder.glob("*.tmp"))
    query_D = rng.normal(size=DIM)
    again = Collection.open(cats._store.folder)
    for collection in (cats, again):
        hits = collection.search(vector=query_D, k=5)
        expected = search_one_by_one(cats, query_D, 5, None, False)
        assert [(hit.id, hit.score) for hit in hits] == expected
    assert index.read_bytes() != before  # there was room again
