"""The FAISS backend: exact against NumPy, and a file that is either right or refused."""

import os
from pathlib import Path

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
    return np.random.default_rng(1).permutation(5000)[:300].astype(np.int64) + 2**40


@pytest.fixture
def vectors_ND() -> np.ndarray:
    return _unit_vectors(300)


def _brute_force(ids: np.ndarray, vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return ids[np.argsort(-(queries @ vectors.T), axis=1)[:, :k]]


def test_flat_search_is_brute_force(ids_N: np.ndarray, vectors_ND: np.ndarray) -> None:
    index = FaissIndex.build(ids_N, vectors_ND)
    queries = _unit_vectors(5, seed=2)
    ids, scores = index.search(queries, 7)
    assert index.is_exact
    np.testing.assert_array_equal(ids, _brute_force(ids_N, vectors_ND, queries, 7))
    np.testing.assert_allclose(scores, -np.sort(-(queries @ vectors_ND.T))[:, :7], atol=1e-6)


def test_search_beyond_what_there_is_gives_minus_one(ids_N: np.ndarray) -> None:
    index = FaissIndex.build(ids_N[:3], _unit_vectors(3))
    ids, _ = index.search(_unit_vectors(1), 5)
    assert set(ids[0, :3]) == set(ids_N[:3]) and (ids[0, 3:] == -1).all()
    empty = FaissIndex.build(ids_N[:0], _unit_vectors(0))
    assert (empty.search(_unit_vectors(1), 5)[0] == -1).all()


@pytest.mark.parametrize("num_allowed", [1, 10, 150, 299])
def test_search_among_allowed_ids_is_exact(
    ids_N: np.ndarray, vectors_ND: np.ndarray, num_allowed: int
) -> None:
    index = FaissIndex.build(ids_N, vectors_ND)
    chosen = np.random.default_rng(3).permutation(300)[:num_allowed]
    queries, k = _unit_vectors(4, seed=4), min(5, num_allowed)
    ids, _ = index.search(queries, k, allowed_N=ids_N[chosen])
    expected = _brute_force(ids_N[chosen], vectors_ND[chosen], queries, k)
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW16", "SQ8", "PCA16,IVF4,SQ8"])
def test_every_kind_keeps_ids_through_a_file(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray, factory: str
) -> None:
    index = FaissIndex.build(ids_N, vectors_ND, factory=factory)
    index.save(tmp_path / "index.faiss", {"revision": 7})
    again, header = FaissIndex.load(tmp_path / "index.faiss")
    assert header == {"revision": 7} and len(again) == 300
    assert again.is_exact == (factory == "Flat")
    queries = _unit_vectors(3, seed=6)
    np.testing.assert_array_equal(again.search(queries, 4)[0], index.search(queries, 4)[0])
    assert set(again.ids_N) == set(ids_N)
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]


def test_faiss_itself_reads_the_file(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray
) -> None:
    FaissIndex.build(ids_N, vectors_ND).save(tmp_path / "index.faiss", {})
    assert faiss.read_index(str(tmp_path / "index.faiss")).ntotal == 300


def test_no_damaged_file_is_taken(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray
) -> None:
    path = tmp_path / "index.faiss"
    FaissIndex.build(ids_N, vectors_ND).save(path, {"revision": 7})
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
    FaissIndex.build(ids_N, vectors_ND).save(path, {})
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


def test_a_loaded_index_is_mapped_and_outlives_its_file(tmp_path: Path) -> None:
    path, vectors = tmp_path / "index.faiss", _unit_vectors(40_000)
    FaissIndex.build(np.arange(40_000), vectors).save(path, {})
    index, _ = FaissIndex.load(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    FaissIndex.build(np.arange(5), vectors[:5]).save(path, {})
    queries = _unit_vectors(3, seed=8)
    expected = _brute_force(np.arange(40_000), vectors, queries, 4)
    np.testing.assert_array_equal(index.search(queries, 4)[0], expected)


def test_an_unknown_kind_and_too_few_vectors_are_said_in_a_line(
    ids_N: np.ndarray, vectors_ND: np.ndarray
) -> None:
    with pytest.raises(ValueError, match="does not know the index 'Flatt'"):
        FaissIndex.build(ids_N, vectors_ND, factory="Flatt")
    with pytest.raises(ValueError, match=r"'IVF4096,SQ8' cannot be made from 300 vectors") as error:
        FaissIndex.build(ids_N, vectors_ND, factory="IVF4096,SQ8")
    assert "\n" not in str(error.value)


def test_writing_where_one_cannot_is_an_os_error(
    tmp_path: Path, ids_N: np.ndarray, vectors_ND: np.ndarray
) -> None:
    with pytest.raises(OSError, match="cannot write"):
        FaissIndex.build(ids_N, vectors_ND).save(tmp_path / "nowhere" / "index.faiss", {})


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
        FaissIndex.build(ids_N, vectors_ND).save(path, {})
    assert not os.path.lexists(temporary)
