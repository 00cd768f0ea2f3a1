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
from retrieval.backends import faiss_index
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
    query_D = query_D.astype(np.float32)
    query_D = query_D / np.linalg.norm(query_D)
    # to the last bit a unit vector, as a mix of one query is
    query_D = (query_D / np.linalg.norm(query_D.astype(np.float64))).astype(np.float32)
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
                writer._store.remove_videos([videos[how[0] % len(videos)]])
            elif what == "remove segment" and ids:
                writer._store.remove_segments([ids[how[0] % len(ids)]])
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
                with collection._cache.snapshot():
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
                        writer._store.remove_segments([int(rng.choice(ids))])
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
        cats._store.remove_segments([id])
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
    cats._store.remove_segments([7])
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


KINDS = ["Flat", "IVF4,SQ8", "HNSW8", "IVF4,PQ4np"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_among_some_is_exact_whatever_the_index_and_however_many(
    cats: Collection, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the base, beside it, where some are gone; blocks are gathered from or compared whole."""
    monkeypatch.setattr(faiss_index, "_ROWS_AT_ONCE", 64)
    rng = np.random.default_rng(0)
    for number in range(40):
        put(cats, f"/{number}.mp4", 8, rng)
    cats.rebuild(index=kind)
    put(cats, "/newer.mp4", 20, rng)
    cats._store.remove_segments([3, 70, 71, 200])
    ids_N, vectors_ND = cats._store.vectors()
    for num_allowed in (0, 1, 2, 30, 150, 300, len(ids_N)):
        allowed_N = np.sort(rng.choice(ids_N, num_allowed, replace=False))
        query_D = rng.normal(size=DIM).astype(np.float32)
        with cats._cache.snapshot():
            found_N, bound = cats._cache.nearest(query_D, 9, allowed_N=allowed_N)
        scores_N = (vectors_ND @ query_D)[np.isin(ids_N, allowed_N)]
        assert len(found_N) == min(9, num_allowed) and set(found_N) <= set(allowed_N)
        found_scores = vectors_ND[np.searchsorted(ids_N, found_N)] @ query_D
        np.testing.assert_allclose(np.sort(found_scores), np.sort(scores_N)[-9:], atol=1e-5)
        assert bound == (-np.inf if num_allowed <= 9 else pytest.approx(found_scores.min()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_is_exact_in_a_search(cats: Collection, kind: str) -> None:
    rng = np.random.default_rng(1)
    for number in range(40):
        put(cats, f"/{number}.mp4", 8, rng)
    cats.rebuild(index=kind)
    put(cats, "/newer.mp4", 20, rng)
    for _ in range(5):
        query_D = rng.normal(size=DIM)
        hits = cats.search(vector=query_D, k=7, where={"camera": 1})
        expected = search_one_by_one(cats, query_D, 7, 1, False)
        assert [(hit.id, hit.score) for hit in hits] == expected


def fill(collection: Collection, num: int, *, seed: int, path: str = "/a.mp4") -> None:
    """Vectors in clusters, as those that an approximate index is made for."""
    centres = np.random.default_rng(0).normal(size=(30, DIM))
    rng = np.random.default_rng(seed)
    vectors_ND = centres[rng.integers(30, size=num)] + 0.5 * rng.normal(size=(num, DIM))
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    windows = [(float(i), float(i + 1)) for i in range(num)]
    collection._store.put_video(path, STATE, num, windows, vectors_ND.astype(np.float32))


def test_what_an_index_finds_is_measured_and_said(cats: Collection) -> None:
    fill(cats, 3000, seed=1)
    cats.add_texts(["a cat", "a dog", "a bird in the rain"])
    said: list[str] = []
    cats.rebuild("IVF16,SQ8", say=said.append)
    made = cats.info()["index_file"]
    assert (made["kind"], made["segments"]) == ("IVF16,SQ8", 3000)
    assert made["bytes"] == (cats._store.folder / "index.faiss").stat().st_size
    assert set(made["recall"]) == {"text", "video"} and min(made["recall"].values()) >= 0.97
    assert 1 <= made["effort"] <= 16 and made["candidates"] >= 1
    assert "IVF16,SQ8 of 3000 segments takes about" in said[0] and "recall@10" in said[1]
    queries = np.random.default_rng(5).normal(size=(20, DIM))  # from elsewhere: harder
    cats.rebuild(queries=queries)
    assert set(cats.info()["index_file"]["recall"]) == {"given"}
    with pytest.raises(ValueError, match="queries must be of shape"):
        cats.rebuild(queries=queries[:, :3])
    again = Collection.open(cats._store.folder)
    assert again.info()["index_file"] == cats.info()["index_file"]
    cats.rebuild("Flat")
    assert "recall" not in cats.info()["index_file"]


def test_auto_is_the_default_and_its_limits_are_kept(cats: Collection) -> None:
    assert cats.info()["index"] == "auto" and cats.info()["index_file"] is None
    fill(cats, 30_000, seed=1)
    cats._refresh_cache()
    assert cats.info()["index_file"]["kind"] == "Flat"
    cats.rebuild(latency_ms=0.01)
    assert cats.info()["index_file"]["kind"] == "IVF512,SQ8"
    Collection.open(cats._store.folder).rebuild()
    assert cats.info()["index_file"]["kind"] == "IVF512,SQ8"
    cats.rebuild("auto")
    assert cats.info()["index_file"]["kind"] == "Flat"


def test_a_merge_keeps_what_was_trained_until_there_is_twice_as_much(
    cats: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MERGE_SEGMENTS", 100)
    fill(cats, 2000, seed=1)
    cats.rebuild("IVF16,SQ8")
    trained = cats._cache._base.trained
    fill(cats, 500, seed=2, path="/b.mp4")
    cats._refresh_cache()
    assert len(cats._cache._base) == 2500 and cats._cache._base.trained == trained
    again = Collection.open(cats._store.folder)  # in another process too
    fill(again, 500, seed=3, path="/c.mp4")
    again._refresh_cache()
    assert len(again._cache._base) == 3000 and again._cache._base.trained == trained
    query_D = again._store.vectors()[1][2900]
    [hit] = again.search(vector=query_D, k=1)
    assert hit.score == pytest.approx(1, abs=1e-6)
    fill(again, 1500, seed=4, path="/d.mp4")
    again._refresh_cache()
    assert again._cache._base.trained != trained
    trained = again._cache._base.trained
    fill(again, 1500, seed=7, path="/e.mp4")
    again.rebuild()  # because it was asked for
    assert again._cache._base.trained != trained


def test_a_search_does_not_wait_for_a_long_merge(
    cats: Collection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "MERGE_SEGMENTS", 10)
    monkeypatch.setattr(cache, "QUICK_SEGMENTS", 50)
    fill(cats, 60, seed=1)
    query_D = np.random.default_rng(2).normal(size=DIM)
    index = cats._store.folder / "index.faiss"
    for _ in range(3):
        hits = cats.search(vector=query_D, k=5)
    assert [(hit.id, hit.score) for hit in hits] == search_one_by_one(cats, query_D, 5, None, False)
    assert not index.exists() and caplog.text.count("its index is behind") == 1
    cats.remove(id=1)  # a writer does
    assert index.exists() and len(cats._cache._base) == 59


def test_a_gpu_that_is_not_there_is_said_when_it_is_asked_for(cats: Collection) -> None:
    with pytest.raises(OSError, match="FAISS finds .* GPUs, gpu=77 is not among them"):
        Collection.open(cats._store.folder, gpu=77)
    with pytest.raises(ValueError, match="gpu must be the number of a GPU"):
        Collection.open(cats._store.folder, gpu="first")  # type: ignore[arg-type]


def test_a_first_import_is_merged_without_being_held_in_memory(
    cats: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cats, 5000, seed=1)
    monkeypatch.setattr(cats._store, "vectors", None)
    cats._refresh_cache()
    assert len(cats._cache._base) == 5000


def test_an_index_that_does_not_fit_into_memory_is_refused(
    cats: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cats, 300, seed=1)
    cats.rebuild("Flat")
    before = (cats._store.folder / "index.faiss").read_bytes()
    monkeypatch.setattr(cache, "available_memory", lambda: 10_000)
    with pytest.raises(
        OSError, match="'?IVF4,SQ8'? of 300 segments takes about .*, but .* are free"
    ) as error:
        cats.rebuild("IVF4,SQ8")
    assert "\n" not in str(error.value) and cats.info()["index"] == "Flat"
    assert (cats._store.folder / "index.faiss").read_bytes() == before


def test_limits_beside_another_index_are_of_a_kill_and_forgotten(cats: Collection) -> None:
    """Settings were once written one by one."""
    fill(cats, 300, seed=1)
    cats._store.set_settings({"index": "Flat", "latency_ms": 20.0})
    cats.search(vector=np.eye(DIM)[0])
    cats.rebuild()
    assert cats.info()["index_file"]["kind"] == "Flat" and cats.check().problems == ()


def test_a_rebuild_changes_its_settings_in_one_step(
    cats: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cats, 300, seed=1)
    cats.rebuild(latency_ms=20)
    put_setting = cats._store._put_setting

    def killed(key: str, value: object) -> None:
        if key != "index":
            raise KeyboardInterrupt
        put_setting(key, value)

    monkeypatch.setattr(cats._store, "_put_setting", killed)
    with pytest.raises(KeyboardInterrupt):
        cats.rebuild("Flat")
    info = Collection.open(cats._store.folder).info()
    assert (info["index"], info["latency_ms"]) == ("auto", 20)


def test_a_rebuild_that_fails_leaves_the_index_and_the_wish(
    cats: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    fill(cats, 400, seed=1)
    cats.rebuild("Flat")
    index = cats._store.folder / "index.faiss"
    before = index.read_bytes()
    index.with_name("index.faiss.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="cannot write"):
        cats.rebuild("IVF4,SQ8")
    assert index.read_bytes() == before
    again = Collection.open(cats._store.folder)
    with again._cache.snapshot():
        assert len(again._cache._base or ()) == 400 and not len(again._cache._newer_N)
    assert again.info()["index"] == "Flat" and again.check().fixed == ()
    assert not caplog.records


def test_an_index_of_another_kind_than_is_wished_is_used(cats: Collection) -> None:
    """As a kill between the file and the settings leaves it; what comes is merged as wished."""
    fill(cats, 400, seed=1)
    cats.rebuild("SQ8")
    cats._store.set_settings({"index": "Flat"})
    again = Collection.open(cats._store.folder)
    with again._cache.snapshot():
        assert len(again._cache._base or ()) == 400
    assert again.check().fixed == ()


def test_limits_that_are_not_given_are_kept(cats: Collection) -> None:
    fill(cats, 300, seed=1)
    cats.rebuild(latency_ms=20)
    cats.rebuild(memory_limit=10**9)
    info = cats.info()
    assert (info["index"], info["latency_ms"], info["memory_limit"]) == ("auto", 20, 10**9)
    cats.rebuild("SQ8")
    with pytest.raises(ValueError, match="latency_ms is for .* give index=.auto.") as error:
        cats.rebuild(latency_ms=20)
    assert "\n" not in str(error.value) and cats.info()["index"] == "SQ8"
    cats.rebuild("auto", latency_ms=20)
    assert (cats.info()["latency_ms"], cats.info()["memory_limit"]) == (20, None)


@pytest.mark.parametrize("held", [0, 25, 10**6])
def test_what_does_not_fit_beside_the_base_is_read_by_each_search(
    cats: Collection, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_ROWS_AT_ONCE", 16)
    room = held * 4 * DIM / cache.NEWER_SHARE
    monkeypatch.setattr(cache, "physical_memory", lambda: room)
    rng = np.random.default_rng(0)
    for number in range(12):  # at 4 it has a base
        put(cats, f"/{number}.mp4", 8, rng)
        if number == 4:
            cats.rebuild("Flat")
        if number > 6:
            cats._store.remove_segments([int(rng.choice(cats._store.segment_ids()))])
        for camera, group in ((None, False), (1, False), (None, True)):
            query_D = rng.normal(size=DIM)
            hits = cats.search(
                vector=query_D,
                k=7,
                where=None if camera is None else {"camera": camera},
                group_by="video" if group else None,
            )
            expected = search_one_by_one(cats, query_D, 7, camera, group)
            assert [(hit.id, hit.score) for hit in hits] == expected
        assert len(cats._cache._newer_ND) <= held
        with cats._cache.snapshot():
            held_N = cats._cache.segment_ids_N.tolist()
        assert held_N == cats._store.segment_ids().tolist()
    assert (len(cats._cache._newer_ND) == len(cats._cache._newer_N)) == (held == 10**6)
    assert cats.check().fixed == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["a bit", "an end", "all of it"])
def test_a_damaged_index_costs_no_answer_and_is_mended(
    cats: Collection, kind: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(cats, 400, seed=1)
    cats.rebuild(index=kind)
    index = cats._store.folder / "index.faiss"
    data = bytearray(index.read_bytes())
    data[len(data) // 3] ^= 4
    index.unlink()
    index.write_bytes({"a bit": data, "an end": data[:-50], "all of it": b"FLUX"}[damage])
    query_D = np.random.default_rng(2).normal(size=DIM)
    with Collection.open(cats._store.folder) as again:
        with again._store.sole_writer():  # so that the search itself does not mend it
            hits = again.search(vector=query_D, k=5)
        expected = search_one_by_one(again, query_D, 5, None, False)
        assert [(hit.id, hit.score) for hit in hits] == expected
        [line] = [record.getMessage() for record in caplog.records]
        assert "index.faiss of collection 'cats' is not used: it" in line and "\n" not in line
        [fixed] = again.check().fixed
        assert "the index was made anew: " in fixed
        assert again.check().fixed == ()
    assert cats.info()["index_file"]["kind"] == kind


def staged(collection: Collection, *, dim: int) -> tuple[int, np.ndarray]:
    """Another space, whole: of another width, and what is near in one is not in the other."""
    space = collection._store.stage_space({"fingerprint": "f" * 64, "dim": dim})
    ids = collection._store.segment_ids()
    vectors_ND = np.random.default_rng(9).normal(size=(len(ids), dim)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    collection._store.put_staged(ids.tolist(), vectors_ND)
    return space, vectors_ND


@pytest.mark.parametrize("kind", ["Flat", "IVF4,SQ8"])
def test_readers_find_the_index_of_another_model_at_the_switch(
    cats: Collection, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(cats, 400, seed=1)
    cats.rebuild(kind)
    readers = [cache.IndexCache(cats._store) for _ in range(3)]
    for reader in readers:
        with reader.snapshot():
            assert reader._base is not None and reader._base.vectors_ND.shape == (400, DIM)
    space, vectors_ND = staged(cats, dim=7)
    cats._cache.build_beside(space)
    with readers[0].snapshot():
        assert readers[0]._base.vectors_ND.shape == (400, DIM)  # the old one serves
    cats._store.remove_segments([5])
    cats._store.switch_space()
    steps = [lambda: None, cats._cache.adopt, cats._store.drop_old_spaces]
    for reader, step in zip(readers, steps, strict=True):
        step()
        with reader.snapshot():
            assert len(reader._base) == 400 and not len(reader._newer_N)  # nothing was read anew
            found_N, _ = reader.nearest(vectors_ND[7], 1)
            assert found_N.tolist() == [8]
            assert reader.segment_ids_N.tolist() == cats._store.segment_ids().tolist()
    assert sorted(path.name for path in cats._store.folder.glob("*.faiss*")) == ["index.faiss"]
    assert not caplog.records


def test_what_is_added_after_the_index_of_a_staged_space_is_found_too(cats: Collection) -> None:
    fill(cats, 400, seed=1)
    cats.rebuild("Flat")
    space, _ = staged(cats, dim=DIM)
    cats._cache.build_beside(space)
    with pytest.raises(ValueError, match="no space 3 under way"):
        cats._cache.build_beside(space + 1)
    put(cats, "/later.mp4", 3, np.random.default_rng(0))
    query_ND = np.eye(3, DIM, dtype=np.float32)
    cats._store.put_staged([401, 402, 403], query_ND)
    cats._store.switch_space()
    reader = cache.IndexCache(cats._store)
    with reader.snapshot():
        assert [reader.nearest(query_D, 1)[0].tolist() for query_D in query_ND] == [
            [401], [402], [403],
        ]  # fmt: skip
        assert len(reader._base) == 400 and len(reader._newer_N) == 3


def test_what_a_kill_around_the_switch_leaves_is_mended(cats: Collection) -> None:
    fill(cats, 400, seed=1)
    cats.rebuild("Flat")
    space, _ = staged(cats, dim=DIM)
    cats._cache.build_beside(space)
    assert cats.check().fixed == ()  # it is still to come
    cats._store.drop_staged()  # ... and was abandoned
    assert any("index-2.faiss was removed" in line for line in cats.check().fixed)
    space, _ = staged(cats, dim=DIM)
    cats._cache.build_beside(space)
    cats._store.switch_space()  # killed before `adopt`
    cats._store.drop_old_spaces()
    with cache_of(cats).snapshot():
        pass
    assert cats.check().problems == ()
    cats._cache.rebuild()
    assert sorted(path.name for path in cats._store.folder.glob("*.faiss*")) == ["index.faiss"]
    assert cats.check().fixed == ()


def cache_of(collection: Collection) -> cache.IndexCache:
    """As another process sees it."""
    return cache.IndexCache(collection._store)
