"""The FAISS backend: exact against NumPy, and a file that is either right or refused."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import faiss
import numpy as np
import pytest

from retrieval.backends import faiss_index
from retrieval.backends.faiss_index import FaissIndex

DIM = 24


def _unit_vectors(n: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def ids_N() -> np.ndarray:
    return np.sort(np.random.default_rng(1).permutation(5000)[:300]).astype(np.int64) + 2**40


@pytest.fixture
def vectors_ND() -> np.ndarray:
    return _unit_vectors(300)


def _build(ids: np.ndarray, vectors: np.ndarray, **kind: str | bytes) -> FaissIndex:
    """As from a store, in blocks."""
    blocks = ((ids[at : at + 77], vectors[at : at + 77]) for at in range(0, len(ids), 77))
    return FaissIndex.build(blocks, num=len(ids), dim=DIM, **kind)


def _brute_force(ids: np.ndarray, vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return ids[np.argsort(-(queries @ vectors.T), axis=1)[:, :k]]


def test_flat_search_is_brute_force(ids_N: np.ndarray, vectors_ND: np.ndarray) -> None:
    index = _build(ids_N, vectors_ND)
    queries = _unit_vectors(5, seed=2)
    ids, scores = index.search(queries, 7)
    assert index.is_exact
    np.testing.assert_array_equal(ids, _brute_force(ids_N, vectors_ND, queries, 7))
    np.testing.assert_allclose(scores, -np.sort(-(queries @ vectors_ND.T))[:, :7], atol=1e-6)


def test_search_beyond_what_there_is_gives_minus_one(ids_N: np.ndarray) -> None:
    index = _build(ids_N[:3], _unit_vectors(3))
    ids, _ = index.search(_unit_vectors(1), 5)
    assert set(ids[0, :3]) == set(ids_N[:3]) and (ids[0, 3:] == -1).all()
    empty = _build(ids_N[:0], _unit_vectors(0))
    assert (empty.search(_unit_vectors(1), 5)[0] == -1).all()


KINDS = ["Flat", "IVF4,Flat", "HNSW16", "SQ8", "PCA16,IVF4,SQ8", "IVF4,PQ4np", "IVF4_HNSW8,SQ8"]


@pytest.mark.parametrize("factory", KINDS)
def test_every_kind_keeps_ids_and_exact_vectors_through_a_file(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray, factory: str
) -> None:
    index = _build(ids_N, vectors_ND, factory=factory)
    index.save(tmp_path / "index.faiss", {"revision": 7})
    again, header = FaissIndex.load(tmp_path / "index.faiss")
    assert header == {"revision": 7} == FaissIndex.header(tmp_path / "index.faiss")
    assert len(again) == 300 and again.is_exact == (factory == "Flat")
    np.testing.assert_array_equal(again.ids_N, ids_N)
    np.testing.assert_array_equal(again.vectors_ND, vectors_ND)
    queries = _unit_vectors(3, seed=6)
    np.testing.assert_array_equal(again.search(queries, 4)[0], index.search(queries, 4)[0])
    expected = _brute_force(ids_N, vectors_ND, queries, 4)
    np.testing.assert_array_equal(again.search_all(queries, 4)[0], expected)
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]


@pytest.mark.parametrize("factory", KINDS)
def test_scores_are_exact_and_best_first(
    ids_N: np.ndarray, vectors_ND: np.ndarray, factory: str
) -> None:
    queries = _unit_vectors(5, seed=9)
    found_QK, scores_QK = _build(ids_N, vectors_ND, factory=factory).search(queries, 8)
    for query, found_K, scores_K in zip(queries, found_QK, scores_QK, strict=True):
        is_found_K = found_K >= 0
        places_K = np.searchsorted(ids_N, found_K[is_found_K])
        np.testing.assert_allclose(scores_K[is_found_K], vectors_ND[places_K] @ query, atol=1e-6)
        assert (np.diff(scores_K) <= 0).all() and is_found_K.any()


@pytest.mark.parametrize("factory", ["IVF4,SQ8", "HNSW8", "SQ4", "IVF4,PQ4np"])
def test_with_all_effort_it_finds_what_there_is(
    ids_N: np.ndarray, vectors_ND: np.ndarray, factory: str
) -> None:
    index = _build(ids_N, vectors_ND, factory=factory)
    index.set_effort(index.efforts[-1] if index.efforts else None, candidates=300)
    queries = _unit_vectors(5, seed=9)
    expected = _brute_force(ids_N, vectors_ND, queries, 8)
    np.testing.assert_array_equal(index.search(queries, 8)[0], expected)


@pytest.mark.parametrize("factory", ["IVF4,SQ8", "PQ4np", "PCA16,IVF4,PQ4np"])
def test_the_trained_part_serves_again(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray, factory: str
) -> None:
    """Other vectors are put into the same lists and codes."""
    path = tmp_path / "index.faiss"
    _build(ids_N, vectors_ND, factory=factory).save(path, {})
    trained = FaissIndex.load(path)[0].trained
    again = _build(ids_N[:50], vectors_ND[:50], factory=factory, trained=trained)
    assert again.trained == trained and len(again) == 50
    [[found]], _ = again.search(vectors_ND[7:8], 1)
    assert found == ids_N[7]


def test_a_damaged_trained_part_is_not_taken(
    tmp_path: Path,
    ids_N: np.ndarray,
    vectors_ND: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a large file, which is not verified as a whole."""
    path = tmp_path / "index.faiss"
    index = _build(ids_N, vectors_ND, factory="IVF4,SQ8")
    index.save(path, {})
    data = bytearray(path.read_bytes())
    data[data.rindex(index.trained) + len(index.trained) // 2] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(faiss_index, "VERIFIED_BYTES", 0)
    assert FaissIndex.load(path)[0].trained == b""


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8", "HNSW16", "IVF4,PQ4np"])
def test_the_memory_that_is_said_is_about_the_file(tmp_path: Path, factory: str) -> None:
    index = _build(np.arange(20_000), _unit_vectors(20_000), factory=factory)
    index.save(tmp_path / "index.faiss", {})
    size = (tmp_path / "index.faiss").stat().st_size
    needed = FaissIndex.memory_needed(factory, num=20_000, dim=DIM)
    sample = 0 if factory == "Flat" else 4 * DIM * 20_000
    assert 0.9 * size <= needed <= 1.2 * size + sample


def test_a_gpu_that_is_not_there_is_said_in_a_line(
    ids_N: np.ndarray, vectors_ND: np.ndarray
) -> None:
    with pytest.raises(OSError, match="GPUs, gpu=99 is not among them") as error:
        _build(ids_N, vectors_ND).use_gpu(99)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match='number of a GPU, or "all"'):
        _build(ids_N, vectors_ND).use_gpu(-1)


def test_faiss_itself_reads_the_file(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray
) -> None:
    _build(ids_N, vectors_ND).save(tmp_path / "index.faiss", {})
    assert faiss.read_index(str(tmp_path / "index.faiss")).ntotal == 300


def test_no_damaged_file_is_taken(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray
) -> None:
    path = tmp_path / "index.faiss"
    _build(ids_N, vectors_ND).save(path, {"revision": 7})
    data = path.read_bytes()
    rng = np.random.default_rng(7)
    # everywhere, and each byte of the trailer, where a damage is a damage to the checking itself
    places = [*rng.integers(0, len(data), 100).tolist(), *range(len(data) - 130, len(data))]
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        with pytest.raises(ValueError):
            FaissIndex.load(path)
    for length in [0, 1, 15, 16, 17, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError):
            FaissIndex.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError):
        FaissIndex.load(path)


def test_a_large_file_is_read_whole_only_to_verify_it(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index.faiss"
    _build(ids_N, vectors_ND).save(path, {})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in a vector
    path.write_bytes(data)
    monkeypatch.setattr(faiss_index, "VERIFIED_BYTES", len(data) - 1)
    assert len(FaissIndex.load(path)[0]) == 300
    with pytest.raises(ValueError, match="its checksum is wrong"):
        FaissIndex.load(path, verify="always")
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="it is cut off"):
        FaissIndex.load(path)


def test_damaged_lists_of_a_large_file_cost_no_answer(
    tmp_path: Path,
    ids_N: np.ndarray,
    vectors_ND: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The places that its lists hold, every one of them at some time, lead outside."""
    path = tmp_path / "index.faiss"
    whole = _build(ids_N, vectors_ND, factory="IVF4,SQ8")
    whole.save(path, {})
    data = path.read_bytes()
    lists = faiss.extract_index_ivf(whole._approximate).invlists
    monkeypatch.setattr(faiss_index, "VERIFIED_BYTES", 0)
    num_damaged = 0
    for number in range(4):
        size = lists.list_size(number)
        of_list = faiss.rev_swig_ptr(lists.get_ids(number), size).tobytes()
        assert data.count(of_list) == 1
        for byte in (1, 3, 7):  # of each place; the last makes it negative
            damaged = bytearray(data)
            for at in range(data.index(of_list), data.index(of_list) + 8 * size, 8):
                damaged[at + byte] ^= 0xF0
            path.unlink()
            path.write_bytes(damaged)
            index, _ = FaissIndex.load(path)
            caplog.clear()
            for query_D in vectors_ND[:20]:
                ids_QK, scores_QK = index.search(query_D[None], 7)
                assert set(ids_QK[0]) <= {*ids_N, -1} and (np.diff(scores_QK[0]) <= 0).all()
                if index._is_damaged:
                    expected = _brute_force(ids_N, vectors_ND, query_D[None], 7)
                    np.testing.assert_array_equal(ids_QK, expected)
            num_damaged += index._is_damaged
            said = [record.getMessage() for record in caplog.records]
            assert len(said) == index._is_damaged
            assert all("`fluxclip index check` mends it" in line for line in said)
    assert num_damaged >= 8


def test_a_loaded_index_is_mapped_and_outlives_its_file(tmp_path: Path) -> None:
    path, vectors = tmp_path / "index.faiss", _unit_vectors(40_000)
    _build(np.arange(40_000), vectors).save(path, {})
    index, _ = FaissIndex.load(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    _build(np.arange(5), vectors[:5]).save(path, {})
    queries = _unit_vectors(3, seed=8)
    expected = _brute_force(np.arange(40_000), vectors, queries, 4)
    np.testing.assert_array_equal(index.search(queries, 4)[0], expected)


def test_an_unknown_kind_and_too_few_vectors_are_said_in_a_line(
    ids_N: np.ndarray, vectors_ND: np.ndarray
) -> None:
    with pytest.raises(ValueError, match="does not know the index 'Flatt'"):
        _build(ids_N, vectors_ND, factory="Flatt")
    with pytest.raises(ValueError, match=r"'IVF4096,SQ8' cannot be made from 300 vectors") as error:
        _build(ids_N, vectors_ND, factory="IVF4096,SQ8")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,SQ8"])
@pytest.mark.parametrize("gpu", [1, "all"])
def test_a_copy_on_a_gpu_is_searched_and_ranked_by_the_exact_vectors(
    tmp_path: Path,
    ids_N: np.ndarray,
    vectors_ND: np.ndarray,
    factory: str,
    gpu: int | Literal["all"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With copies in memory in place of those on GPUs, of which FAISS makes none here."""
    put: list[object] = []

    def copy(*arguments: object, **_: object) -> object:
        put.append(arguments)
        return faiss.clone_index(arguments[-1])

    for name in ("StandardGpuResources", "GpuMultipleClonerOptions"):
        monkeypatch.setattr(faiss, name, SimpleNamespace, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", copy, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", copy, raising=False)
    _build(ids_N, vectors_ND, factory=factory).save(tmp_path / "index.faiss", {})
    index, _ = FaissIndex.load(tmp_path / "index.faiss")
    queries = _unit_vectors(4, seed=3)
    expected_ids, expected_scores = index.search(queries, 6)
    index.use_gpu(gpu)
    [arguments] = put
    assert len(arguments) == (1 if gpu == "all" else 3)  # type: ignore[arg-type]
    found_ids, found_scores = index.search(queries, 6)
    np.testing.assert_array_equal(found_ids, expected_ids)
    np.testing.assert_allclose(found_scores, expected_scores, atol=1e-6)


def test_what_is_always_added_must_not_be_named() -> None:
    for factory in ("IVF4,Flat,RFlat", "IDMap,Flat"):
        with pytest.raises(ValueError, match="both are always added"):
            _build(np.arange(300), _unit_vectors(300), factory=factory)


def test_writing_where_one_cannot_is_an_os_error(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray
) -> None:
    with pytest.raises(OSError, match="cannot write"):
        _build(ids_N, vectors_ND).save(tmp_path / "nowhere" / "index.faiss", {})


@pytest.mark.parametrize("trouble", ["full disk", "a folder of its name"])
def test_a_failed_save_leaves_nothing(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray, trouble: str
) -> None:
    path, temporary = tmp_path / "index.faiss", tmp_path / "index.faiss.tmp"
    if trouble == "full disk":
        temporary.symlink_to("/dev/full")
    else:
        path.mkdir()
    with pytest.raises(OSError):
        _build(ids_N, vectors_ND).save(path, {})
    assert not os.path.lexists(temporary)
