"""Which kind of index suits a collection, by a rule, and how hard it has to try, by measurement.

The rule "auto", for n vectors of d numbers:

1. "Flat", which compares with every vector, while n x d x 4 bytes fit into the memory limit, and
   reading them at 10 GB/s stays within the latency: up to about 1.2 million vectors of 512 numbers
   by the defaults, half the machine's memory and 250 ms.
2. "IVF<lists>,SQ8", which compares with the vectors of the nearest lists, one byte a number. The
   lists are the power of two that is nearest to 4 times the root of n: 4096 for a million.
3. "IVF<lists>,PQ<m>np" where even these codes are more than the memory limit: m bytes a vector, the
   largest divisor of d that is not above d / 8.

Whatever 2, 3 or any other kind of index brings is ranked anew by exact vectors, which stay in the
file and are read from there as they are needed. The memory limit is about searching: to make any of
these takes n x d x 4 bytes once, beside the codes, and where that is not free none is made.
Shape legend: N vectors, Q queries, K results, D width.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .backends import VectorIndex

AUTO = "auto"
LATENCY_MS = 250.0
SCAN_BYTES_PER_S = 10e9

RECALL = 0.97  # of the ten best, in the mean over the queries of the worst kind
RECALL_AT = 10
QUERIES_PER_KIND = 256
_CANDIDATES = (1, 4, 16, 64)

_V1 = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
_V2 = "/sys/fs/cgroup", "memory.max"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """What kind of index a collection is to have: these are settings of it. Checks itself.

    index: "auto" or a FAISS factory string. memory_limit: bytes, latency_ms: of one search; both
    are for "auto", None for the defaults.
    """

    index: str = AUTO
    memory_limit: int | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("memory_limit", "latency_ms"):
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (is_number and value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be more than 0, as a number; got {value!r}")
            if value is not None and self.index != AUTO:
                raise ValueError(
                    f'{name} is for the index "auto", not for {self.index!r}: leave it out, or '
                    'give index="auto" (--index auto) with it'
                )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Wish":
        """What the settings of a collection say; those of an old one have no limits."""
        if settings["index"] != AUTO:  # a kill once could leave limits beside another index
            return cls(settings["index"])
        return cls(AUTO, settings.get("memory_limit"), settings.get("latency_ms"))

    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def kind(self, num: int, dim: int) -> str:
        """The FAISS factory string for `num` vectors of `dim` numbers."""
        if self.index != AUTO:
            return self.index
        memory = physical_memory() // 2 if self.memory_limit is None else self.memory_limit
        latency_ms = LATENCY_MS if self.latency_ms is None else self.latency_ms
        exact = 4 * num * dim
        if exact <= memory and 1000 * exact / SCAN_BYTES_PER_S <= latency_ms:
            return "Flat"
        lists = 2 ** max(0, round(math.log2(4 * math.sqrt(max(1, num)))))
        if 40 * lists > num:  # it could not be trained
            return "Flat"
        if num * (dim + 8) <= memory:
            return f"IVF{lists},SQ8"
        parts = max(m for m in range(1, max(2, dim // 8 + 1)) if dim % m == 0)
        return f"IVF{lists},PQ{parts}np"


@dataclass(frozen=True)
class Sample:
    """Queries of one kind (Q, D), unit length. own_ids_Q: which of the vectors each one is itself,
    so that this one does not count as found; None for queries from elsewhere."""

    queries_QD: np.ndarray
    own_ids_Q: np.ndarray | None = None


def as_queries(given: np.ndarray, dim: int) -> np.ndarray:
    """Vectors (Q, dim) of any length -> of length 1, float32; ValueError for anything else."""
    queries_QD = np.asarray(given, np.float32)
    if queries_QD.ndim != 2 or queries_QD.shape[1] != dim or not len(queries_QD):
        raise ValueError(f"queries must be of shape (Q, {dim}), Q 1 or more; got {np.shape(given)}")
    length_Q = np.linalg.norm(queries_QD, axis=1, keepdims=True)
    if not (np.isfinite(length_Q).all() and length_Q.all()):
        raise ValueError("a query is zero or not finite: there is no direction in it")
    return queries_QD / length_Q


def tune(index: VectorIndex, samples: Mapping[str, Sample]) -> dict[str, Any]:
    """Let an approximate index try as hard as it takes to find RECALL of the ten best.

    samples: by kind of query. Returns what came out: "effort" (of an inverted file the lists that
    are looked into, nprobe; None where there is no choice), "candidates" (how many times as many as
    asked for are ranked by exact vectors), "recall" by kind. A log line where that is below RECALL.
    """
    samples = {kind: sample for kind, sample in samples.items() if len(sample.queries_QD)}
    if not samples or not len(index):
        return {"effort": None, "candidates": 1, "recall": {}}
    best = {kind: _best(index.search_all, sample) for kind, sample in samples.items()}

    def recall(effort: int | None, candidates: int) -> dict[str, float]:
        index.set_effort(effort, candidates=candidates)
        return {
            kind: round(_recall(_best(index.search, sample), best[kind]), 4)
            for kind, sample in samples.items()
        }

    efforts: Sequence[int | None] = index.efforts or (None,)
    for candidates in _CANDIDATES:
        at_best = recall(efforts[-1], candidates)
        if min(at_best.values()) >= (1 + RECALL) / 2 or candidates * RECALL_AT >= len(index):
            break
    for effort in efforts:
        reached = recall(effort, candidates)
        if min(reached.values()) >= RECALL:
            break
    else:
        _log.warning(
            "an index finds %s of the ten best, less than %g: choose one that is more exact",
            ", ".join(f"{share:.3f} ({kind})" for kind, share in reached.items()),
            RECALL,
        )
    return {"effort": effort, "candidates": candidates, "recall": reached}


def _best(search: Any, sample: Sample) -> list[np.ndarray]:
    """Ids of the ten best of each query, without itself."""
    ids_QK, _ = search(sample.queries_QD, RECALL_AT + 1)
    found = [ids_K[ids_K >= 0] for ids_K in ids_QK]
    if sample.own_ids_Q is not None:
        found = [ids_K[ids_K != own] for ids_K, own in zip(found, sample.own_ids_Q, strict=True)]
    return [ids_K[:RECALL_AT] for ids_K in found]


def _recall(found: Sequence[np.ndarray], best: Sequence[np.ndarray]) -> float:
    pairs = zip(found, best, strict=True)
    shares = [len(np.intersect1d(a, b)) / len(b) for a, b in pairs if len(b)]
    return float(np.mean(shares)) if shares else 1.0


def physical_memory() -> int:
    """Bytes of memory of this machine, or that the containers or jobs we are in may use of it."""
    return min([*_limits(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")])


def available_memory() -> int:
    """Bytes that can be used now without moving others out, about.

    Of the limit of a container or job, what is used of it already is not taken off.
    """
    free = physical_memory()
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = min(free, 1024 * int(line.split()[1]))
    return free


def _limits() -> list[int]:
    """Bytes that the control groups of this process may use, of both versions of these."""
    words = []
    for line in _lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = _V1 if controllers else _V2
        group = PurePosixPath(path)
        for each in (group, *group.parents):  # the limits of those above hold too
            words += _lines(str(PurePosixPath(f"{root}{each}", name)))
    return [int(word) for word in words if word.strip().isdecimal()]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
