"""Index backends, one file each: which stored vectors are nearest to a query, quickly.

A backend is only ever a cache of the store. Shape legend: N vectors, Q queries, K results, D width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

Gpu = int | Literal["all"]


class VectorIndex(Protocol):
    """Inner-product search over float32 vectors with explicit int64 ids; what it holds stays.

    A backend's class also has `build`, `load` and `header`, see `faiss_index.FaissIndex`.
    """

    def __len__(self) -> int:
        """Number of vectors held."""

    @property
    def ids_N(self) -> np.ndarray:
        """Ids held, int64, ascending."""

    @property
    def vectors_ND(self) -> np.ndarray:
        """Exact vectors, float32, in the order of `ids_N`; a view, not to be changed."""

    @property
    def is_exact(self) -> bool:
        """Whether `search` compares the query with every vector held."""

    @property
    def trained(self) -> bytes:
        """What training gave, for another build of the same kind; empty if there is none."""

    @property
    def efforts(self) -> tuple[int, ...]:
        """How hard an approximate index can try, ascending; empty where there is no choice."""

    def set_effort(self, effort: int | None, *, candidates: int) -> None:
        """Try so hard (one of `efforts`), and rank `candidates` times as many as are asked for."""

    def search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (Q, K) and exact scores (Q, K), best first; id -1 where fewer than k were found."""

    def search_all(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search` that compares with every vector, whatever the kind of index."""

    def scores_at(self, query_D: np.ndarray, places_N: np.ndarray) -> np.ndarray:
        """Exact scores (N,) of the vectors at these places of `vectors_ND`, which ascend."""

    def save(self, path: Path, header: Mapping[str, Any]) -> None:
        """Write atomically, with a checksum. Raises OSError."""

    def use_gpu(self, gpu: Gpu) -> None:
        """Search on a copy on this GPU, or shared among all. OSError if that is not possible."""
