"""FAISS: inner-product search with explicit ids, and the file it is cached in.

The file is what `faiss.write_index` writes, then a trailer: JSON of the header and a sha256 over
index and header, the length of that JSON as 8 bytes (little-endian), and 8 bytes that mark the
end. FAISS reads only its own part, so other tools open the file too; and index, header and
checksum are replaced in one step. FAISS itself loads many damaged files without complaint.
Shape legend: N vectors, Q queries, K results, D width.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np

_MARK = b"FLUXIDX1"
_CHUNK_BYTES = 1 << 20


class FaissIndex:
    """A FAISS index over unit vectors with int64 ids; see `VectorIndex` for its methods."""

    def __init__(self, index: Any) -> None:
        self._index = index  # always an IndexIDMap2

    @classmethod
    def build(
        cls, ids_N: np.ndarray, vectors_ND: np.ndarray, *, factory: str = "Flat"
    ) -> "FaissIndex":
        """An index over float32 vectors_ND with int64 ids_N, trained on them where it must be.

        factory: a FAISS factory string, as "Flat" (exact) or "IVF64,SQ8". Raises ValueError for a
        string that FAISS does not know and for one that needs more vectors than there are.
        """
        n, dim = vectors_ND.shape
        try:
            inner = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(
                f"FAISS does not know the index {factory!r} for vectors of {dim} numbers; "
                'known are for example "Flat", "IVF64,Flat", "HNSW32"'
            ) from error
        try:
            if not inner.is_trained:
                inner.train(vectors_ND)
            _probe_one_list_in_16(inner)
            # not IVF's own ids: one kind of index to save, load and search
            index = faiss.IndexIDMap2(inner)
            if n:
                index.add_with_ids(vectors_ND, ids_N)
        except RuntimeError as error:
            raise ValueError(
                f"the index {factory!r} cannot be made from {n} vectors ({_reason(error)}); "
                'add more videos first, or use "Flat"'
            ) from error
        return cls(index)

    @property
    def ids_N(self) -> np.ndarray:
        return faiss.vector_to_array(self._index.id_map)

    @property
    def is_exact(self) -> bool:
        return isinstance(faiss.downcast_index(self._index.index), faiss.IndexFlat)

    @property
    def vectors_ND(self) -> np.ndarray:
        assert self.is_exact
        return self._index.index.reconstruct_n(0, self._index.ntotal)

    def add(self, ids_N: np.ndarray, vectors_ND: np.ndarray) -> None:
        self._index.add_with_ids(vectors_ND, ids_N)

    def remove(self, ids_N: np.ndarray) -> None:
        # IndexIDMap2 closes the gap in its ids as a flat index does in its vectors; others keep
        # their numbering, and ids would then point at the wrong vectors.
        assert self.is_exact
        self._index.remove_ids(ids_N)

    def search(
        self, queries_QD: np.ndarray, k: int, *, allowed_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        parameters = None
        if allowed_N is not None:
            assert self.is_exact
            # a hashed set: IDSelectorArray takes seconds for 10,000 ids
            selector = faiss.IDSelectorBatch(allowed_N)
            parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        scores_QK, ids_QK = self._index.search(queries_QD, k, params=parameters)
        return ids_QK, scores_QK

    def save(self, path: Path, header: Mapping[str, str | int]) -> None:
        temporary = path.with_name(path.name + ".tmp")
        try:
            faiss.write_index(self._index, os.fspath(temporary))
            with temporary.open("r+b") as file:
                digest = _digest(file, temporary.stat().st_size, header)
                trailer = json.dumps({"header": dict(header), "sha256": digest}).encode()
                file.write(trailer + len(trailer).to_bytes(8, "little") + _MARK)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except RuntimeError as error:
            raise OSError(f"cannot write {temporary}: {_reason(error)}") from error
        finally:
            temporary.unlink(missing_ok=True)  # is there only after a failure: a full disk

    @classmethod
    def load(cls, path: Path) -> tuple["FaissIndex", dict[str, Any]]:
        """The index in a file, and the header saved with it.

        Raises FileNotFoundError, and ValueError for a file that is cut off or damaged.
        """
        with path.open("rb") as file:  # one handle: the file may be replaced at any time
            size = file.seek(0, os.SEEK_END)
            trailer_size, trailer = _trailer(file, size)
            index_size = size - trailer_size
            file.seek(0)
            if _digest(file, index_size, trailer["header"]) != trailer["sha256"]:
                raise ValueError("its checksum is wrong")
            file.seek(0)
            try:
                reader = faiss.PyCallbackIOReader(file.read, _CHUNK_BYTES)  # type: ignore[attr-defined]
                index = faiss.read_index(reader)
            except RuntimeError as error:
                raise ValueError(f"this FAISS cannot read it: {_reason(error)}") from error
        if not isinstance(index, faiss.IndexIDMap2):
            raise ValueError("it is not an index with ids")
        return cls(index), trailer["header"]


def _trailer(file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    """Size and content of what follows the index."""
    fixed = 8 + len(_MARK)
    file.seek(max(size - fixed, 0))
    end = file.read(fixed)
    length = int.from_bytes(end[:8], "little")
    if end[8:] != _MARK or length + fixed > size:
        raise ValueError("it is cut off")
    file.seek(size - fixed - length)
    try:
        trailer = json.loads(file.read(length))
        return length + fixed, {"header": dict(trailer["header"]), "sha256": trailer["sha256"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("its header is damaged") from error


def _digest(file: BinaryIO, size: int, header: Mapping[str, str | int]) -> str:
    """sha256 over the next `size` bytes and the header."""
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(size, _CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    digest.update(json.dumps(header, sort_keys=True).encode())
    return digest.hexdigest()


def _probe_one_list_in_16(index: Any) -> None:
    """Let an inverted file look into 1/16 of its lists; in one, the default, it finds little."""
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.nprobe = max(1, inverted.nlist // 16)


def _reason(error: RuntimeError) -> str:
    """What FAISS says, on one line and without the place in its source."""
    return " ".join(str(error).rpartition("Error: ")[2].split())
