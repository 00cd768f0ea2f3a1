"""One process that changes a collection, several that search it, every answer compared.

    python tests/retrieval/readers_beside_writer.py [--seconds 60] [--readers 8] [--clips FOLDER]

The writer adds and removes videos, rebuilds the index and replaces the model, at random. A reader
searches, and compares with every row that it holds: in the same snapshot, or, every other time, in
those before and after, if at most one commit lies between. The same code runs in
test_readers_beside_writer.py.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from kill import CLIPS, MODELS

from retrieval import Collection, Hit, cache
from retrieval.store import SegmentRow

KINDS = ("Flat", "HNSW8", "SQ8")
MERGE_SEGMENTS = 30
# one in so many of a reader's searches goes through a collection that it has just opened
NEWLY_OPENED = 20


def run(folder: Path, *, seconds: float, num_readers: int, clips: Path) -> dict[str, Any]:
    """What the processes counted, in all, see `read` and `write`; "wrong": what was."""
    with Collection.create(folder, model=next(iter(MODELS.values()))) as collection:
        collection.add(sorted(clips.glob("*.mp4"))[:40], metadata={"part": 0})
    command = [sys.executable, __file__, "--folder", str(folder), "--seconds", str(seconds)]
    command += ["--clips", str(clips)]
    processes = [
        subprocess.Popen([*command, "--do", name, "--seed", str(seed)], stdout=-1, text=True)
        for seed, name in enumerate(["write", *["read"] * num_readers])
    ]
    total: dict[str, Any] = {"searches": 0, "revisions": 0, "writes": 0, "wrong": []}
    total["compared_without_snapshot"] = 0
    for process in processes:
        said, _ = process.communicate()
        if process.returncode:
            total["wrong"].append(f"a process ended with {process.returncode}")
            continue
        for key, value in json.loads(said.splitlines()[-1]).items():
            total[key] += value
    return total


def write(folder: Path, clips: Sequence[Path], *, seconds: float, seed: int) -> dict[str, Any]:
    """Change the collection until the time is over."""
    rng = random.Random(seed)
    end_s = time.monotonic() + seconds
    writes = 0
    while time.monotonic() < end_s:
        with Collection.open(folder) as collection:
            serving = collection._store.settings()["fingerprint"]
        with Collection.open(folder, model=MODELS[serving]) as collection:
            for _ in range(8):
                held = list(collection._store.files())
                if rng.random() < 0.5 or len(held) < 20:
                    chosen = rng.sample(list(clips), 8)
                    collection.add(chosen, metadata={"part": rng.randrange(4)})
                elif rng.random() < 0.9:
                    collection.remove(video=rng.sample(held, rng.randint(1, 6)))
                else:
                    collection.rebuild(index=rng.choice(KINDS))
                writes += 1
                if time.monotonic() > end_s:
                    break
            else:
                [other] = set(MODELS) - {serving}
                collection.re_embed(MODELS[other])
                writes += 1
    return {"writes": writes}


def read(folder: Path, *, seconds: float, seed: int) -> dict[str, Any]:
    """Search until the time is over, and compare."""
    rng = np.random.default_rng(seed)
    end_s = time.monotonic() + seconds
    wrong: list[str] = []
    revisions: set[int] = set()
    searches = compared = 0
    collection = Collection.open(folder)
    while time.monotonic() < end_s:
        if rng.random() < 1 / NEWLY_OPENED:
            collection.close()
            collection = Collection.open(folder)
        where = None if rng.random() < 0.5 else {"part": int(rng.integers(4))}
        k = int(rng.integers(1, 30))
        store = collection._store
        if searches % 2:
            with collection._cache.snapshot():  # what is searched inside is of the same one
                revisions.add(store.revision()[0])
                query_D = rng.normal(size=store.dim).astype(np.float32)
                hits = collection.search(vector=query_D, k=k, where=where)
                wrong += compare(hits, query_D, k, State.of(collection, where))
        else:
            before = State.of(collection, where)
            query_D = rng.normal(size=before.vectors_ND.shape[1]).astype(np.float32)
            try:
                hits = collection.search(vector=query_D, k=k, where=where)
            except ValueError:
                if State.of(collection, where).space == before.space:
                    raise
                continue  # the vector is of the model of before
            after = State.of(collection, where)
            if after.revision <= before.revision + 1 and after.space == before.space:
                compared += 1
                found = [compare(hits, query_D, k, state) for state in (before, after)]
                wrong += min(found, key=len)
        searches += 1
    collection.close()
    return {
        "searches": searches,
        "compared_without_snapshot": compared,
        "revisions": len(revisions),
        "wrong": wrong[:10],
    }


@dataclass(frozen=True)
class State:
    """What a reader can find at one revision; is_exact: it finds the best ones."""

    revision: int
    space: int
    ids_N: np.ndarray
    vectors_ND: np.ndarray
    rows: dict[int, SegmentRow]
    is_exact: bool

    @classmethod
    def of(cls, collection: Collection, where: Any) -> "State":
        store, base = collection._store, collection._cache._base
        with store.snapshot():
            ids_N, vectors_ND = store.vectors(store.segment_ids(where))
            rows = store.segments(ids_N)
            # the base in use may be of the kind that was wished before
            is_flat = store.settings()["index"] == "Flat" and (base is None or base.is_exact)
            is_exact = where is not None or is_flat
            return cls(store.revision()[0], store.space, ids_N, vectors_ND, rows, is_exact)


def compare(hits: Sequence[Hit], query_D: np.ndarray, k: int, state: State) -> list[str]:
    """How hits differ from a search through every row of a state."""
    ids_N, vectors_ND, rows = state.ids_N, state.vectors_ND, state.rows
    scores_N = vectors_ND.astype(np.float64) @ (query_D / np.linalg.norm(query_D))
    if len(rows) != len(ids_N):
        return ["a segment lacks its vector"]
    if len(hits) != min(k, len(ids_N)):
        return [f"{len(hits)} hits instead of {min(k, len(ids_N))}"]
    of_id = dict(zip(ids_N.tolist(), scores_N.tolist(), strict=True))
    if any(hit.id not in of_id or abs(hit.score - of_id[hit.id]) > 1e-5 for hit in hits):
        return ["a hit is not stored, or has another score"]
    if any(rows[hit.id].video != hit.video for hit in hits):
        return ["a hit names another video"]
    best = np.sort(scores_N)[::-1][: len(hits)]
    if state.is_exact and not np.allclose([hit.score for hit in hits], best, atol=1e-5):
        return ["better ones than the hits are stored"]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--clips", type=Path, default=CLIPS)
    parser.add_argument("--folder", type=Path, help="used by itself")
    parser.add_argument("--seed", type=int, default=0, help="used by itself")
    parser.add_argument("--do", choices=["write", "read"], help="used by itself")
    arguments = parser.parse_args()
    cache.MERGE_SEGMENTS = MERGE_SEGMENTS
    clips = sorted(arguments.clips.absolute().glob("*.mp4"))
    if arguments.do == "write":
        seconds, seed = arguments.seconds, arguments.seed
        print(json.dumps(write(arguments.folder, clips, seconds=seconds, seed=seed)))
        return
    if arguments.do == "read":
        print(json.dumps(read(arguments.folder, seconds=arguments.seconds, seed=arguments.seed)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        total = run(
            Path(temporary) / "watched",
            seconds=arguments.seconds,
            num_readers=arguments.readers,
            clips=arguments.clips.absolute(),
        )
    print(json.dumps(total))
    sys.exit(bool(total["wrong"]))


if __name__ == "__main__":
    main()
