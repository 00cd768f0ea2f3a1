"""FAISS: inner-product search with explicit ids, and the file it is cached in.

Every index holds the exact vectors: a flat one is nothing else, and any other is put beside them
(FAISS's IndexRefineFlat), so that whatever an approximation brings is ranked by exact scores, and
a search among chosen ids can be exact too.

The file is what `faiss.write_index` writes, then the trained part alone, without vectors, if the
kind needs training: it serves when the index is made anew from almost the same vectors. Then a
trailer: JSON of the header and a sha256 over all before it and the header, the length of that JSON
as 8 bytes (little-endian), and 8 bytes that mark the end. FAISS reads only its own part, so other
tools open the file too; and index, header and checksum are replaced in one step. FAISS itself loads
many damaged files without complaint, so the checksum is computed at every load, but for large
files: reading all of them would cost more than the search that one is loaded for. These are
verified by `Collection.check`, and read back when they are written. What damage since then can do
to lists, codes and vectors is to hide a segment, as every score that is shown comes from SQLite; in
what FAISS follows blindly, as the links of a graph, it can end or hang a search. That a file is
whole, of this collection and of its history is verified always.

A loaded index is mapped into memory, not read: it takes memory only as it is searched, shared by
all processes that do. FAISS aborts or crashes when such an index is changed; nothing here does.
Shape legend: N vectors, Q queries, K results, D width.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import faiss
import numpy as np

from . import Gpu

VERIFIED_BYTES = 256 << 20  # files up to this size are verified at every load, in 0.3 s or less

# Training sees a random sample: FAISS wants 39 vectors for each list of an inverted file, and more
# change recall by less than what is measured; all of a million would take ten minutes.
TRAINING_VECTORS_PER_LIST = 40
TRAINING_VECTORS = 65536  # at least, where there are as many

_log = logging.getLogger(__name__)

_MARK = b"FLUXIDX3"
_CHUNK_BYTES = 1 << 20
_ROWS_AT_ONCE = 65536
_MAX_GPU_K = 2048
# Where more than this share of the vectors is asked for, all are compared, in blocks: a row alone
# costs twice what it costs among its neighbours.
_IN_PLACE_SHARE = 0.5


class FaissIndex:
    """A FAISS index over unit vectors with int64 ids; see `VectorIndex` for its methods."""

    def __init__(self, index: Any, *, trained: bytes = b"") -> None:
        """index: an IndexIDMap of an IndexFlat, or of a refined index; see `build`."""
        if not isinstance(index, faiss.IndexIDMap):
            raise ValueError("it is not an index with ids")
        inner: Any = faiss.downcast_index(index.index)
        self._index, self._inner = index, inner
        self._approximate: Any = None
        self._flat = inner
        if isinstance(inner, faiss.IndexRefine):
            self._approximate = inner.base_index
            self._flat = faiss.downcast_index(inner.refine_index)
        if not isinstance(self._flat, faiss.IndexFlat):
            raise ValueError("it does not hold the exact vectors")
        self._is_damaged = False
        self._on_gpu: Any = None
        self._gpu_resources: Any = None
        self._trained = trained
        self.ids_N = faiss.vector_to_array(index.id_map)
        if (self.ids_N[1:] <= self.ids_N[:-1]).any():
            raise ValueError("its ids do not ascend")
        if self._flat.ntotal != len(self.ids_N):
            raise ValueError("it has more ids than vectors, or fewer")
        self.vectors_ND = _view(self._flat, len(self.ids_N))
        self.vectors_ND.flags.writeable = False

    @classmethod
    def build(
        cls,
        blocks: Iterable[tuple[np.ndarray, np.ndarray]],
        *,
        num: int,
        dim: int,
        factory: str = "Flat",
        trained: bytes = b"",
    ) -> "FaissIndex":
        """An index over blocks of (ids_N int64, vectors_ND float32), ids ascending through all.

        num: how many vectors these are, at most.
        factory: a FAISS factory string, as "Flat" (exact) or "IVF64,SQ8". It is trained on a
        random sample, always the same, unless `trained` (see there) is given. Raises ValueError for
        a string that FAISS does not know and for one that needs more vectors than there are.
        """
        approximate = _of_factory(factory, dim)
        index, vectors_ND = _flat(blocks, num, dim)
        if approximate is None:
            return cls(index)
        try:
            if trained:
                approximate = faiss.deserialize_index(np.frombuffer(trained, np.uint8))
            elif not approximate.is_trained:
                approximate.train(_sample(vectors_ND, approximate))
                trained = faiss.serialize_index(approximate).tobytes()
            for start in range(0, len(vectors_ND), _ROWS_AT_ONCE):
                approximate.add(vectors_ND[start : start + _ROWS_AT_ONCE])
            refined = faiss.IndexRefine(approximate, index.index)
        except RuntimeError as error:
            raise ValueError(
                f"the index {factory!r} cannot be made from {len(vectors_ND)} vectors "
                f"({_reason(error)}); "
                'add more videos first, or use "Flat"'
            ) from error
        _hold(index, refined)
        built = cls(index, trained=trained)
        if built.efforts:
            built.set_effort(built.efforts[len(built.efforts) // 2])
        return built

    @property
    def trained(self) -> bytes:
        """What training gave, for `build` with the same factory; empty if there is none."""
        return self._trained

    def __len__(self) -> int:
        return len(self.ids_N)

    @property
    def is_exact(self) -> bool:
        return self._approximate is None

    @property
    def efforts(self) -> tuple[int, ...]:
        if self.is_exact:
            return ()
        inverted = faiss.try_extract_index_ivf(self._approximate)
        if inverted is not None:
            # beyond a quarter of the lists, comparing with every vector is the better way
            return _ladder(1, max(inverted.nlist // 4, min(inverted.nlist, 16)))
        return _ladder(16, 512) if _is_graph(self._approximate) else ()

    def set_effort(self, effort: int | None, *, candidates: int = 1) -> None:
        self._inner.k_factor = float(candidates)
        if effort is not None:
            inverted = faiss.try_extract_index_ivf(self._approximate) is not None
            name = "nprobe" if inverted else "efSearch"
            faiss.ParameterSpace().set_index_parameter(self._approximate, name, effort)

    def search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self.is_exact or self._is_damaged:
            return self.search_all(queries_QD, k)
        num = min(max(k * int(self._inner.k_factor), 2 * k + 16), len(self))
        searched = self._approximate
        if self._on_gpu is not None and num <= _MAX_GPU_K:
            searched = self._on_gpu
        ids_QK = np.full((len(queries_QD), k), -1, np.int64)
        scores_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
        _, places_QK = searched.search(queries_QD, num)
        if ((places_QK < -1) | (places_QK >= len(self))).any():
            _log.warning(
                "index.faiss is damaged, all vectors are compared one by one: "
                "`fluxclip index check` mends it"
            )
            self._is_damaged = True
            return self.search_all(queries_QD, k)
        for row, places_K in enumerate(places_QK):
            places_K = places_K[places_K >= 0]
            scores_K = self.vectors_ND[places_K] @ queries_QD[row]
            order_K = np.argsort(-scores_K, kind="stable")[:k]
            ids_QK[row, : len(order_K)] = self.ids_N[places_K[order_K]]
            scores_QK[row, : len(order_K)] = scores_K[order_K]
        return ids_QK, scores_QK

    def search_all(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        searched = self._flat
        if self._on_gpu is not None and self.is_exact and k <= _MAX_GPU_K:
            searched = self._on_gpu
        scores_QK, places_QK = searched.search(queries_QD, k)
        return self._ids(places_QK), scores_QK

    def scores_at(self, query_D: np.ndarray, places_N: np.ndarray) -> np.ndarray:
        scores_N = np.empty(len(places_N), np.float32)
        if len(places_N) > _IN_PLACE_SHARE * len(self):
            starts = range(0, len(self), _ROWS_AT_ONCE)
            ends = np.searchsorted(places_N, [*starts, len(self)])
            for start, at, to in zip(starts, ends, ends[1:], strict=False):
                of_block_N = self.vectors_ND[start : start + _ROWS_AT_ONCE] @ query_D
                scores_N[at:to] = of_block_N[places_N[at:to] - start]
        elif len(places_N):
            query_D = np.ascontiguousarray(query_D, np.float32)
            places_N = np.ascontiguousarray(places_N, np.int64)
            faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]
                faiss.swig_ptr(scores_N),
                faiss.swig_ptr(query_D),
                self._flat.get_xb(),
                faiss.swig_ptr(places_N),
                self._flat.d,
                1,
                len(places_N),
            )
        return scores_N

    def save(self, path: Path, header: Mapping[str, Any]) -> None:
        temporary = path.with_name(path.name + ".tmp")
        try:
            faiss.write_index(self._index, os.fspath(temporary))
            with temporary.open("r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(self._trained)
                file.flush()
                size = file.tell()
                file.seek(0)
                described = {
                    "header": dict(header),
                    "trained": [len(self._trained), hashlib.sha256(self._trained).hexdigest()],
                }
                digest = _digest(file, size, described)
                trailer = json.dumps({**described, "sha256": digest}).encode()
                file.write(trailer + len(trailer).to_bytes(8, "little") + _MARK)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except RuntimeError as error:
            raise OSError(f"cannot write {path}: {_reason(error)}") from error
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)  # is there only after a failure: a full disk

    @classmethod
    def load(
        cls, path: Path, *, verify: Literal["small", "always"] = "small"
    ) -> tuple["FaissIndex", dict[str, Any]]:
        """Map the index in a file; returned with the header that was saved with it.

        verify: compute the checksum of every file, or of those up to VERIFIED_BYTES.
        Raises FileNotFoundError, and ValueError for a file that is cut off or damaged.
        """
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            trailer_size, trailer = _trailer(file, size)
            file.seek(0)
            if (verify == "always" or size <= VERIFIED_BYTES) and (
                _digest(file, size - trailer_size, trailer["described"]) != trailer["sha256"]
            ):
                raise ValueError("its checksum is wrong")
            num_trained, of_trained = trailer["described"]["trained"]
            file.seek(max(0, size - trailer_size - num_trained))
            trained = file.read(num_trained)
            try:
                index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC)
            except RuntimeError as error:
                raise ValueError(f"this FAISS cannot read it: {_reason(error)}") from error
            # FAISS opens it by its name, under which another one may have been put meanwhile
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return cls.load(path, verify=verify)
        if hashlib.sha256(trained).hexdigest() != of_trained:
            trained = b""  # damaged: what needs it trains anew
        return cls(index, trained=trained), trailer["described"]["header"]

    @staticmethod
    def header(path: Path) -> dict[str, Any]:
        """The header of a file, which is not looked into further. Raises OSError, ValueError."""
        with path.open("rb") as file:
            _, trailer = _trailer(file, file.seek(0, os.SEEK_END))
        header: dict[str, Any] = trailer["described"]["header"]
        return header

    @staticmethod
    def memory_needed(factory: str, *, num: int, dim: int) -> int:
        """Bytes that it takes to build an index of `num` vectors, about. ValueError as `build`."""
        exact = num * (4 * dim + 8)
        approximate = _of_factory(factory, dim)
        if approximate is None:
            return exact
        sample = 4 * dim * _sample_size(num, approximate)
        return exact + sample + num * (_code_bytes(approximate) + 8)

    def use_gpu(self, gpu: Gpu) -> None:
        require_gpu(gpu)
        searched = self._flat if self.is_exact else self._approximate
        try:
            if gpu == "all":
                options = faiss.GpuMultipleClonerOptions()
                options.shard = True  # each holds a part: for memory, and for single queries
                self._on_gpu = faiss.index_cpu_to_all_gpus(searched, co=options)
            else:
                self._gpu_resources = faiss.StandardGpuResources()
                self._on_gpu = faiss.index_cpu_to_gpu(self._gpu_resources, gpu, searched)
        except RuntimeError as error:
            raise OSError(f"it cannot be put on the GPU: {_reason(error)}") from error

    def _ids(self, places_QK: np.ndarray) -> np.ndarray:
        if not len(self):
            return places_QK  # all -1
        return np.where(places_QK < 0, -1, self.ids_N[places_QK])


def require_gpu(gpu: Gpu) -> None:
    """Raise OSError unless FAISS can use this GPU; ValueError for what names none."""
    if gpu != "all" and (type(gpu) is not int or gpu < 0):
        raise ValueError(f'gpu must be the number of a GPU, or "all"; got {gpu!r}')
    num = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if not num or (gpu != "all" and gpu >= num):
        raise OSError(
            f"FAISS finds {num} GPUs, gpu={gpu!r} is not among them: install 'fluxclip[gpu]' where "
            "there is one, or search on the CPU without gpu="
        )


def _flat(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], num: int, dim: int
) -> tuple[Any, np.ndarray]:
    """An IndexIDMap of an IndexFlat over the blocks, and the vectors in it, which are held once."""
    flat = faiss.IndexFlatIP(dim)
    flat.codes.resize(num * 4 * dim)  # at once: growing takes twice the memory
    vectors_ND = _view(flat, num)
    ids_N = np.empty(num, np.int64)
    at = 0
    for of_block_N, block_ND in blocks:
        to = at + len(of_block_N)
        ids_N[at:to], vectors_ND[at:to] = of_block_N, block_ND
        at = to
    flat.codes.resize(at * 4 * dim)
    flat.ntotal = at
    index = faiss.IndexIDMap(faiss.IndexFlatIP(dim))  # FAISS takes only an empty one
    _hold(index, flat)
    index.ntotal = at
    faiss.copy_array_to_vector(ids_N[:at], index.id_map)
    return index, _view(flat, at)


def _view(flat: Any, num: int) -> np.ndarray:
    """The vectors (num, D) of an IndexFlat, where they are."""
    if not num:
        return np.empty((0, flat.d), np.float32)
    vectors_ND: np.ndarray = faiss.rev_swig_ptr(flat.get_xb(), num * flat.d).reshape(num, flat.d)
    return vectors_ND


def _hold(index: Any, inner: Any) -> None:
    """Put `inner` into an IndexIDMap, which keeps only its address, and keep it alive."""
    index.index = inner
    index.referenced_objects = [*index.referenced_objects, inner]


def _of_factory(factory: str, dim: int) -> Any:
    """An empty index that approximates; None for exact search. ValueError for an unknown one."""
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS does not know the index {factory!r} for vectors of {dim} numbers; "
            'known are for example "Flat", "IVF64,Flat", "HNSW32"'
        ) from error
    if isinstance(index, faiss.IndexRefine | faiss.IndexIDMap):
        raise ValueError(
            f"the index {factory!r} must be named without ids and refinement: both are always added"
        )
    return None if isinstance(index, faiss.IndexFlat) else index


def _sample_size(num: int, index: Any) -> int:
    inverted = faiss.try_extract_index_ivf(index)
    lists = 0 if inverted is None else inverted.nlist
    return min(num, max(TRAINING_VECTORS, TRAINING_VECTORS_PER_LIST * lists))


def _sample(vectors_ND: np.ndarray, index: Any) -> np.ndarray:
    num = _sample_size(len(vectors_ND), index)
    if num == len(vectors_ND):
        return vectors_ND
    chosen = np.random.default_rng(0).choice(len(vectors_ND), num, replace=False, shuffle=False)
    return vectors_ND[np.sort(chosen)]


def _code_bytes(index: Any) -> int:
    """Bytes a vector takes in it, about."""
    if isinstance(index, faiss.IndexHNSW):
        graph: Any = index.hnsw
        return _code_bytes(faiss.downcast_index(index.storage)) + 4 * graph.nb_neighbors(0)
    try:
        return int(index.sa_code_size())
    except RuntimeError:  # a graph of another kind, over exact vectors
        return 4 * index.d + 256


def _is_graph(index: Any) -> bool:
    """Whether it is searched as far as its `efSearch` says."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return isinstance(index, faiss.IndexHNSW)


def _ladder(lowest: int, highest: int) -> tuple[int, ...]:
    """Powers of two and, between, 1.5 times these, from the lowest to the highest."""
    steps = {highest}
    value = lowest
    while value < highest:
        steps |= {value, min(highest, value * 3 // 2)}
        value *= 2
    return tuple(sorted(steps))


def _trailer(file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    """Size and content of what follows the index and its trained part."""
    fixed = 8 + len(_MARK)
    file.seek(max(size - fixed, 0))
    end = file.read(fixed)
    length = int.from_bytes(end[:8], "little")
    if end[8:] != _MARK or length + fixed > size:
        raise ValueError("it is cut off, or not of this version of fluxclip")
    file.seek(size - fixed - length)
    try:
        trailer = json.loads(file.read(length))
        num_trained, of_trained = trailer["trained"]
        described = {
            "header": dict(trailer["header"]),
            "trained": [int(num_trained), str(of_trained)],
        }
        return length + fixed, {"described": described, "sha256": trailer["sha256"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("its header is damaged") from error


def _digest(file: BinaryIO, size: int, described: Mapping[str, Any]) -> str:
    """sha256 over the next `size` bytes and what the trailer says of them."""
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(size, _CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()


def _reason(error: RuntimeError) -> str:
    """What FAISS says, on one line and without the place in its source."""
    return " ".join(str(error).rpartition("Error: ")[2].split())
