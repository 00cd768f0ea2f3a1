"""Index backends, one file each: which stored vectors are nearest to a query, quickly.

A backend is only ever a cache of the store. Shape legend: N vectors, Q queries, K results, D width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np


class VectorIndex(Protocol):
    """Inner-product search over float32 vectors with explicit int64 ids; it is never changed.

    A backend's class also has `build(ids_N, vectors_ND, factory=...)` and `load(path, verify=...)`,
    which returns the index with the header it was saved with, or raises ValueError or OSError.
    """

    def __len__(self) -> int:
        """Number of vectors held."""

    @property
    def ids_N(self) -> np.ndarray:
        """Ids held, int64, in any order."""

    @property
    def is_exact(self) -> bool:
        """Whether `search` compares the query with every vector held."""

    @property
    def vectors_ND(self) -> np.ndarray:
        """Vectors held, float32, in the order of `ids_N`. Only where `is_exact`."""

    def search(
        self, queries_QD: np.ndarray, k: int, *, allowed_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (Q, K) and scores (Q, K), best first; id -1 where there are fewer than k.

        allowed_N: look only among these ids; only where `is_exact`.
        """

    def save(self, path: Path, header: Mapping[str, str | int]) -> None:
        """Write atomically, with a checksum. Raises OSError."""
