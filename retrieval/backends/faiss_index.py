"""FAISS: inner-product search with explicit ids, and the file it is cached in.

The file is what `faiss.write_index` writes, then a trailer: JSON of the header and a sha256 over
index and header, the length of that JSON as 8 bytes (little-endian), and 8 bytes that mark the
end. FAISS reads only its own part, so other tools open the file too; and index, header and
checksum are replaced in one step. FAISS itself loads many damaged files without complaint, so the
checksum is computed at every load, but for large files: reading all of them would cost more than
the search that one is loaded for. These are verified by `Collection.check`, and read back when they
are written; what damage since then can do is to hide a segment, as every score that is shown comes
from SQLite. That a file is whole, of this collection and of its history is verified always.

A loaded index is mapped into memory, not read: it takes memory only as it is searched, shared by
all processes that do. FAISS aborts or crashes when such an index is changed; nothing here does.
Shape legend: N vectors, Q queries, K results, D width.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import faiss
import numpy as np

VERIFIED_BYTES = 256 << 20  # files up to this size are verified at every load, in 0.3 s or less

_MARK = b"FLUXIDX2"
_CHUNK_BYTES = 1 << 20


class FaissIndex:
    """A FAISS index over unit vectors with int64 ids; see `VectorIndex` for its methods."""

    def __init__(self, index: Any) -> None:
        self._index = index  # always an IndexIDMap

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
            index = faiss.IndexIDMap(inner)
            if n:
                index.add_with_ids(vectors_ND, ids_N)
        except RuntimeError as error:
            raise ValueError(
                f"the index {factory!r} cannot be made from {n} vectors ({_reason(error)}); "
                'add more videos first, or use "Flat"'
            ) from error
        return cls(index)

    def __len__(self) -> int:
        return int(self._index.ntotal)

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
                _digest(file, size - trailer_size, trailer["header"]) != trailer["sha256"]
            ):
                raise ValueError("its checksum is wrong")
            try:
                index = faiss.read_index(os.fspath(path), faiss.IO_FLAG_MMAP_IFC)
            except RuntimeError as error:
                raise ValueError(f"this FAISS cannot read it: {_reason(error)}") from error
            # FAISS opens it by its name, under which another one may have been put meanwhile
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return cls.load(path, verify=verify)
        if not isinstance(index, faiss.IndexIDMap):
            raise ValueError("it is not an index with ids")
        return cls(index), trailer["header"]


def _trailer(file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    """Size and content of what follows the index."""
    fixed = 8 + len(_MARK)
    file.seek(max(size - fixed, 0))
    end = file.read(fixed)
    length = int.from_bytes(end[:8], "little")
    if end[8:] != _MARK or length + fixed > size:
        raise ValueError("it is cut off, or not of this version of fluxclip")
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
