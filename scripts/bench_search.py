"""Time and recall of searches among a million vectors, for each kind of index, beside bare FAISS.

    python scripts/bench_search.py [--vectors 1000000] [--out benchmarks/search-cpu.json]

The vectors are made up: 2,000 clusters with spread inside each, 512 numbers, from a fixed seed.
Queries like a video are more of the same; queries like a text are such vectors moved by one
constant vector, the gap that models leave between texts and videos, and made of length 1 again. A
collection is filled with them through its store, ten segments a video; a hundredth of the videos
has the metadata that is filtered for.

For each kind of index: it is built, which chooses its effort by 256 stored vectors and 256 texts;
then other queries are asked, one at a time, of the collection and of FAISS on the same mapped file
(ten candidates, the same effort), in turns, all of it warm. Recall is against exact search of all
vectors. Then another process opens the collection and asks once: that is the cold open, with files
as they are in the system's cache; what memory it takes after 200 searches is what its proportional
set size (PSS) grew by, of which the mapped file is the part that others share. At last 1,000
segments are added, apart from embedding, and 1,000 removed, each up to the next answer.
"""

import argparse
import json
import os
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from retrieval import Collection
from retrieval.index_choice import Wish
from retrieval.store import FileState, VideoRow

DIM, CLUSTERS, SPREAD, GAP = 512, 2000, 0.7, 1.0
SEGMENTS_PER_VIDEO = 10
CAMERAS = 100  # a video is of one of them
WHERE = {"camera": 7}
K = 10
SEED = 0


class NoModel:
    """What a collection remembers of its model. Vectors come from elsewhere."""

    name, fingerprint, dim = "made-up vectors", "0" * 64, DIM

    def grid(self, token_budget: int | None) -> tuple[int, int]:
        return 1, 1

    def embed_video(self, videos: Sequence[Any], *, token_budget: int | None = None) -> np.ndarray:
        raise ValueError("there is no model here")

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        raise ValueError("there is no model here")


class Vectors:
    """Draws of the same distribution, each from its own seed."""

    def __init__(self) -> None:
        rng = np.random.default_rng([SEED, 0])
        self._centres_CD = unit(rng.standard_normal((CLUSTERS, DIM), np.float32))
        self._gap_D = unit(rng.standard_normal((1, DIM), np.float32))

    def like_videos(self, num: int, *, seed: int) -> np.ndarray:
        """Unit vectors (num, DIM) float32."""
        rng = np.random.default_rng([SEED, seed])
        vectors_ND = rng.standard_normal((num, DIM), np.float32)
        vectors_ND *= SPREAD / DIM**0.5
        vectors_ND += self._centres_CD[rng.integers(CLUSTERS, size=num)]
        return unit(vectors_ND)

    def like_texts(self, num: int, *, seed: int) -> np.ndarray:
        """Unit vectors (num, DIM) float32, all of them moved by the gap."""
        return unit(self.like_videos(num, seed=seed) + GAP * self._gap_D)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200, help="of each kind, to time")
    parser.add_argument("--kinds", nargs="+", help="FAISS factory strings, instead of the rule's")
    parser.add_argument("--folder", type=Path, help="where the collection is made, and removed")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--cold", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cold:
        print(json.dumps(cold(*arguments.cold)))
        return
    import faiss

    kinds = arguments.kinds or [
        "Flat",
        Wish(latency_ms=1e-9).kind(arguments.vectors, DIM),
        Wish(memory_limit=1).kind(arguments.vectors, DIM),
    ]
    record = {
        "benchmark": "search", "command": shlex.join(["python", *sys.argv]),
        "vectors": arguments.vectors, "dim": DIM, "clusters": CLUSTERS, "spread": SPREAD,
        "gap": GAP, "seed": SEED, "k": K, "queries_per_kind": arguments.queries,
        "cores": os.cpu_count(), "device": "cpu",
        "threads": faiss.omp_get_max_threads(), "load_average": os.getloadavg()[0],
        "faiss": faiss.__version__, "numpy": np.__version__, "sqlite": sqlite3.sqlite_version,
        "fluxclip": version("fluxclip"), "date": date.today().isoformat(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        record |= measure(Path(folder), arguments.vectors, arguments.queries, kinds)
    from bench_encoder import cpu_name  # imports torch, which would take its share of the memory

    record["device_name"] = cpu_name()
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def measure(folder: Path, num: int, num_queries: int, kinds: Sequence[str]) -> dict[str, Any]:
    drawn = Vectors()
    vectors_ND = drawn.like_videos(num, seed=1)
    queries = {
        "video": drawn.like_videos(num_queries, seed=2),
        "text": drawn.like_texts(num_queries, seed=3),
    }
    path = folder / "collection"
    with Collection.create(path, model=NoModel()) as collection:
        start_s = time.perf_counter()
        fill(collection, vectors_ND)
        filled_s = time.perf_counter() - start_s
        texts = [f"text {i}" for i in range(256)]
        collection._store.put_texts(texts, drawn.like_texts(len(texts), seed=4))
        ids_N = collection._store.segment_ids()
    of_camera_N = (np.arange(num) // SEGMENTS_PER_VIDEO) % CAMERAS == WHERE["camera"]
    best = {name: exact(vectors_ND, ids_N, q) for name, q in queries.items()}
    filtered = exact(vectors_ND[of_camera_N], ids_N[of_camera_N], queries["text"])
    del vectors_ND
    database = path / "collection.sqlite"
    print(
        f"filled in {filled_s:.0f} s, {database.stat().st_size / 1e9:.2f} GB in SQLite", flush=True
    )
    rows = {}
    for kind in kinds:
        rows[kind] = of_kind(path, kind, queries, best, filtered)
        print(kind, json.dumps(rows[kind]), flush=True)
    changes = of_changes(path, drawn)
    print(json.dumps(changes), flush=True)
    return {
        "fill_s": filled_s,
        "sqlite_bytes_per_vector": database.stat().st_size / num,
        "kinds": rows,
        "last_kind_changes": changes,
    }


def fill(collection: Collection, vectors_ND: np.ndarray, *, first: int = 0) -> None:
    """Store videos of ten segments, some hundred in a transaction."""
    starts = range(0, len(vectors_ND), SEGMENTS_PER_VIDEO)
    videos = [
        video(first + number, vectors_ND[start : start + SEGMENTS_PER_VIDEO])
        for number, start in enumerate(starts)
    ]
    for at in range(0, len(videos), 500):
        collection._store.put_videos(videos[at : at + 500])


def video(number: int, vectors_ND: np.ndarray) -> VideoRow:
    times = [(10.0 * i, 10.0 * (i + 1)) for i in range(len(vectors_ND))]
    state = FileState(1, number, f"{number:064x}")
    metadata = {"camera": number % CAMERAS}
    return VideoRow(f"/videos/{number}.mp4", state, times[-1][1], times, vectors_ND, metadata)


def of_kind(
    path: Path,
    kind: str,
    queries: dict[str, np.ndarray],
    best: dict[str, list[set[int]]],
    filtered: list[set[int]],
) -> dict[str, Any]:
    """Build an index of this kind and measure it."""
    import faiss

    with Collection.open(path, model=NoModel()) as collection:
        build_s, _ = timed(
            lambda: collection.rebuild(kind, say=lambda line: print(line, flush=True))
        )
        made = collection.info()["index_file"]
    row: dict[str, Any] = {
        "build_s": build_s,
        "index_bytes_per_vector": made["bytes"] / made["segments"],
        **{key: made.get(key) for key in ("effort", "candidates", "recall")},
    }
    bare = faiss.read_index(str(path / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
    with Collection.open(path, model=NoModel()) as collection:
        for name, of_name in queries.items():
            row[name] = in_turns(collection, bare, of_name, best[name])
        row["filtered"] = ask(collection, queries["text"], filtered, where=WHERE)
    np.save(path.with_name("queries.npy"), queries["text"])
    command = [sys.executable, __file__, "--cold", str(path), str(path.with_name("queries.npy"))]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row["fresh_process"] = json.loads(answer)
    return row


def in_turns(
    collection: Collection, bare: Any, queries_QD: np.ndarray, best: list[set[int]]
) -> dict[str, Any]:
    """Ours and bare FAISS, query by query, after a round that warms both."""
    ours, bare_s, found = [], [], []
    for is_counted in (False, True):
        for number, query_D in enumerate(queries_QD):

            def search(query_D: np.ndarray = query_D) -> list[Any]:
                return collection.search(vector=query_D, k=K)

            def search_bare(query_D: np.ndarray = query_D) -> Any:
                return bare.search(query_D[None], K)

            if number % 2:
                bare_time_s, _ = timed(search_bare)
            our_time_s, hits = timed(search)
            if not number % 2:
                bare_time_s, _ = timed(search_bare)
            if is_counted:
                ours.append(our_time_s)
                bare_s.append(bare_time_s)
                found.append({hit.id for hit in hits})
    more_ms = 1000 * (np.median(ours) - np.median(bare_s))
    return {
        "ours_ms": percentiles(ours),
        "bare_ms": percentiles(bare_s),
        "ours_over_bare_p50_ms": float(more_ms),
        "recall_at_10": recall(found, best),
    }


def ask(
    collection: Collection, queries_QD: np.ndarray, best: list[set[int]], **how: Any
) -> dict[str, Any]:
    times, found = [], []
    for is_counted in (False, True):
        for query_D in queries_QD:
            seconds, hits = timed(lambda q=query_D: collection.search(vector=q, k=K, **how))
            if is_counted:
                times.append(seconds)
                found.append({hit.id for hit in hits})
    exact_share = float(np.mean([a == b for a, b in zip(found, best, strict=True)]))
    return {"ours_ms": percentiles(times), "share_exact": exact_share}


def of_changes(path: Path, drawn: Vectors) -> dict[str, float]:
    """Seconds of adding and of removing 1,000 segments, until the next answer is there."""
    query_D = drawn.like_texts(1, seed=6)[0]
    with Collection.open(path, model=NoModel()) as collection:
        collection.search(vector=query_D)

        def add() -> None:
            with collection._store.sole_writer():
                fill(collection, drawn.like_videos(1000, seed=5), first=10**9)
                collection._refresh_cache()
            collection.search(vector=query_D)

        def remove() -> None:
            collection.remove(id=chosen.tolist())
            collection.search(vector=query_D)

        add_s, _ = timed(add)
        chosen = np.random.default_rng(SEED).choice(collection._store.segment_ids(), 1000, False)
        remove_s, _ = timed(remove)
    return {"add_1000_s": add_s, "remove_1000_s": remove_s}


def cold(path: Path, queries: Path) -> dict[str, float]:
    """In a fresh process: seconds until the first answer, and the memory after many."""
    queries_QD = np.load(queries)
    before = memory()
    start_s = time.perf_counter()
    with Collection.open(path, model=NoModel()) as collection:
        collection.search(vector=queries_QD[0], k=K)
        first_s = time.perf_counter() - start_s
        for query_D in queries_QD:
            collection.search(vector=query_D, k=K)
        after = memory()
        num = len(collection)
    return {
        "open_to_first_answer_s": first_s,
        **{f"{name}_bytes_per_vector": (after[name] - before[name]) / num for name in after},
    }


def memory() -> dict[str, int]:
    """Bytes of this process: its share of what it maps, and what is its own alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split()[0]: 1024 * int(line.split()[1]) for line in lines}
    return {"pss": values["Pss:"], "anonymous": values["Anonymous:"]}


def exact(vectors_ND: np.ndarray, ids_N: np.ndarray, queries_QD: np.ndarray) -> list[set[int]]:
    """Ids of the ten best, by comparing with every vector."""
    scores_QN = queries_QD @ vectors_ND.T
    return [set(ids_N[np.argpartition(-scores_N, K)[:K]].tolist()) for scores_N in scores_QN]


def recall(found: Sequence[set[int]], best: Sequence[set[int]]) -> float:
    return float(np.mean([len(a & b) / K for a, b in zip(found, best, strict=True)]))


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(seconds, p) * 1000) for p in (50, 99)}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start_s = time.perf_counter()
    result = run()
    return time.perf_counter() - start_s, result


if __name__ == "__main__":
    main()
