"""Kill processes that change a collection, again and again, and look at what each kill has left.

    python tests/retrieval/kill.py [--kills 50] [--seed 0] [--folder FOLDER] [--clips FOLDER]

Adding, removing, rebuilding and re-embedding take turns on one collection, which has a first commit
before the first kill. The model is the small embedder of the tests, and a second one like it for
re-embedding. The same code runs in test_kill.py.
"""

import argparse
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from layout_embedder import LayoutEmbedder

from retrieval import Collection, cache, reembed
from retrieval.database import DATABASE
from retrieval.ingest import CLIPS_PER_BATCH

CLIPS = Path(__file__).parents[2] / "assets" / "animated-emoji" / "clips"
OPERATIONS = ("add", "remove", "rebuild", "re-embed")
REBUILDS: tuple[dict[str, Any], ...] = (
    {"index": "Flat"},
    {"index": "HNSW8"},
    {"index": "SQ8"},
    {"index": "auto", "latency_ms": 20.0},
)
FILES_PER_CALL = 25  # several calls of `add`, each of which may end with a merge of the index
SEGMENTS = 30  # come together before the index is merged, or new vectors are committed
STEPS = 24  # a process is killed after so many steps at most ...
MOST = {"add": 30, "remove": 8}  # ... and makes no more than these, however late the kill comes
MODELS = {
    model.fingerprint: model
    for model in (LayoutEmbedder("one"), LayoutEmbedder("two", cells=2, contrast=0.5))
}

Segments = dict[int, str]  # id -> path of its video; each clip is one segment here


@dataclass(frozen=True)
class Kill:
    """What one killed process did, and what the collection was like after it.

    num_before, num_after: segments. num_added, num_removed: between these. num_embedded: clips
    that went through the model. wrong: whatever is not as it should be.
    """

    operation: str
    num_before: int
    num_after: int
    num_added: int
    num_removed: int
    num_embedded: int
    wrong: tuple[str, ...]


@dataclass
class Said:
    """What a process printed before it was killed."""

    steps: int = 0
    is_done: bool = False  # with all that it was to do: it waits to be killed
    embedded: int = 0
    asked: set[str] = field(default_factory=set)  # to be removed
    removed: set[str] = field(default_factory=set)
    added: set[str] = field(default_factory=set)

    def hear(self, line: str) -> None:
        word, _, rest = line.rstrip("\n").partition(" ")
        self.steps += word in ("added", "removed", "step")
        self.is_done |= word == "done"
        self.embedded += int(rest) if word == "embedded" else 0
        if word in ("asked", "removed", "added"):
            getattr(self, word).add(rest)


class Watch:
    """Compares a collection with what it was before, and with what its models say of the clips."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before: Segments = {}
        self._highest_id = 0
        self._vectors: dict[tuple[str, str], np.ndarray] = {}

    def look(self, said: Said) -> tuple[Segments, list[str]]:
        """The segments that are there now, and what is wrong."""
        with closing(sqlite3.connect(self.folder / DATABASE)) as database:
            wrong = [row[0] for row in database.execute("PRAGMA integrity_check") if row[0] != "ok"]
        with Collection.open(self.folder) as collection:
            store = collection._store
            model = MODELS[store.settings()["fingerprint"]]
            ids_N, vectors_ND = store.vectors()
            rows = store.segments(store.segment_ids())
            now = {id: row.video for id, row in sorted(rows.items())}
            if ids_N.tolist() != list(now):
                wrong.append("not every segment has its vector")
            expected = np.stack([self._expected(model, now[int(id)]) for id in ids_N])
            if not np.allclose(vectors_ND, expected, atol=1e-6):
                wrong.append("a vector is not that of its clip by the model that serves")
            hits = collection.search(vector=vectors_ND[-1], k=len(ids_N))
            if sorted(hit.id for hit in hits) != ids_N.tolist() or hits[0].score < 0.999:
                wrong.append("the search does not find what is stored")
            if collection._cache.segment_ids_N.tolist() != ids_N.tolist():
                wrong.append("the index does not hold what is stored")
            if sorted(store.files()) != sorted(now.values()):
                wrong.append("a video is there without its segment, or twice")
            checked = collection.check()
            wrong += checked.problems
            wrong += [line for line in checked.fixed if not line.endswith("process left it")]
        lost = {id: path for id, path in self.before.items() if id not in now}
        if not set(lost.values()) <= said.asked:
            wrong.append("something is gone that nobody asked to remove")
        if any(now.get(id, path) != path for id, path in self.before.items()):
            wrong.append("an id stands for another clip")
        if said.removed & set(now.values()) or not said.added <= set(now.values()):
            wrong.append("something committed is not as it was committed")
        if any(id <= self._highest_id for id in now.keys() - self.before.keys()):
            wrong.append("an id was given out again")
        self.before, self._highest_id = now, max(self._highest_id, *now)
        return now, wrong

    def _expected(self, model: LayoutEmbedder, path: str) -> np.ndarray:
        key = model.fingerprint, path
        if key not in self._vectors:
            self._vectors[key] = model.embed_video([path])[0]
        return self._vectors[key]


def kills(
    folder: Path, clips: Sequence[Path], *, num: int, seed: int, operations: Sequence[str]
) -> Iterator[Kill]:
    """Kill `num` processes at random moments of the operations, which take turns."""
    rng = random.Random(seed)
    with Collection.create(folder, model=next(iter(MODELS.values()))) as collection:
        collection.add(clips[: len(clips) // 4])
    watch = Watch(folder)
    _, wrong = watch.look(Said())
    assert not wrong, wrong
    for number in range(num):
        operation = operations[number % len(operations)]
        before = watch.before
        process = start(folder, clips[0].parent, operation, seed=rng.randrange(1000), clips=clips)
        # re-embedding has to come to its end at times, and to begin once more
        most = 2 * len(before) if operation == "re-embed" else STEPS
        said = kill(process, rng.randint(0, most), rng)
        now, wrong = watch.look(said)
        num_added, num_removed = len(now.keys() - before.keys()), len(before.keys() - now.keys())
        if operation == "add" and said.embedded > num_added + CLIPS_PER_BATCH:
            wrong.append("clips were embedded in vain")
        if process.returncode != -signal.SIGKILL:
            wrong.append(f"the process ended by itself: {process.returncode}")
        yield Kill(
            operation, len(before), len(now), num_added, num_removed, said.embedded, tuple(wrong)
        )


def kill(process: "subprocess.Popen[str]", num_steps: int, rng: random.Random) -> Said:
    """Kill a process some time after so many steps; what it said until then."""
    said = Said()
    assert process.stdout is not None
    for line in process.stdout:
        said.hear(line)
        if said.steps >= num_steps or said.is_done:
            break
    # and then anywhere: while it commits, which takes milliseconds, embeds, decodes or merges
    time.sleep(rng.random() * rng.choice([0.0, 0.001, 0.01, 0.1]))
    process.send_signal(signal.SIGKILL)
    # what is behind the last line that is whole may have been cut off by the kill
    for line in process.stdout.read().split("\n")[:-1]:
        said.hear(line)
    process.wait()
    process.stdout.close()
    return said


def start(
    folder: Path, parent: Path, operation: str, *, seed: int, clips: Sequence[Path]
) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--folder", str(folder), "--clips", str(parent)]
    command += ["--do", operation, "--seed", str(seed), "--first", str(len(clips))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def do(operation: str, folder: Path, clips: Sequence[Path], seed: int) -> None:
    """What is killed: says what it is about to do and what it has done, and never ends."""
    rng = random.Random(seed)
    cache.MERGE_SEGMENTS = reembed.SEGMENTS_PER_COMMIT = SEGMENTS
    with Collection.open(folder) as collection:
        serving = collection._store.settings()["fingerprint"]
        staged = collection._store.staged()
        known = list(collection._store.files())
    with Collection.open(folder, model=MODELS[serving]) as collection:
        print("open", flush=True)
        if operation == "add":
            model = collection.model
            embed_video = model.embed_video

            def counted(videos: Sequence, *, token_budget: int | None = None) -> np.ndarray:
                print("embedded", len(videos), flush=True)
                return embed_video(videos, token_budget=token_budget)

            model.embed_video = counted  # type: ignore[method-assign]
            new = [path for path in clips if str(path) not in known][: MOST["add"]]
            for at in range(0, len(new), FILES_PER_CALL):
                collection.add(
                    new[at : at + FILES_PER_CALL],
                    progress=lambda done, total, path: print("added", path, flush=True),
                )
        elif operation == "remove":
            rng.shuffle(known)
            for _ in range(min(MOST["remove"], len(known) // 4)):
                chosen = [known.pop() for _ in range(rng.randint(1, 3))]
                for path in chosen:
                    print("asked", path, flush=True)
                collection.remove(video=chosen)
                for path in chosen:
                    print("removed", path, flush=True)
        elif operation == "rebuild":
            while True:
                collection.rebuild(**rng.choice(REBUILDS))
                print("step", flush=True)
        else:
            while True:
                wanted = staged["fingerprint"] if staged else next(iter(set(MODELS) - {serving}))
                collection.re_embed(
                    MODELS[wanted], progress=lambda done, total, path: print("step", flush=True)
                )
                serving, staged = wanted, None
    print("done", flush=True)
    while True:
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of the collection; a temporary one otherwise")
    parser.add_argument("--clips", type=Path, default=CLIPS)
    parser.add_argument("--first", type=int, help="only so many of the clips")
    parser.add_argument("--only", choices=OPERATIONS, help="kill only this")
    parser.add_argument("--do", choices=OPERATIONS, help="what is killed; used by itself")
    arguments = parser.parse_args()
    clips = sorted(arguments.clips.absolute().glob("*.mp4"))[: arguments.first]
    if arguments.do:
        do(arguments.do, arguments.folder, clips, arguments.seed)
    operations = [arguments.only] if arguments.only else OPERATIONS
    num_wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        killed = kills(
            arguments.folder or Path(temporary) / "killed",
            clips,
            num=arguments.kills,
            seed=arguments.seed,
            operations=operations,
        )
        for number, kill in enumerate(killed, 1):
            num_wrong += bool(kill.wrong)
            print(
                f"kill {number}, {kill.operation}: {kill.num_before} -> {kill.num_after} segments "
                f"(+{kill.num_added} -{kill.num_removed}); "
                f"{'; '.join(kill.wrong) or 'nothing wrong'}",
                flush=True,
            )
    print(f"{arguments.kills} kills, after {num_wrong} of them something was wrong")
    sys.exit(bool(num_wrong))


if __name__ == "__main__":
    main()
