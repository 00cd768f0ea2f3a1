"""Kill a process that adds clips, again and again, and look at what each kill has left.

    python tests/retrieval/kill_add.py FOLDER CLIPS [--model emoji-tiny] [--kills 20] [--seed 0]

FOLDER is where the collection is made. Without --model it is the small embedder of the tests, which
needs no torch. The same code runs in test_kill.py.
"""

import argparse
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from layout_embedder import LayoutEmbedder

from retrieval import Collection, cache
from retrieval.store import DATABASE

FILES_PER_CALL = 25  # several calls of `add`, each of which may end with a merge of the index
MERGE_SEGMENTS = 30
# A process is killed some time after so many commits at most, and makes no more than the second
# number of them, however late the kill comes: so that 20 of them leave something to add.
COMMITS, MOST_COMMITS = 32, 35


@dataclass(frozen=True)
class Kill:
    """What one killed process did, and what the collection was like after it.

    num_before, num_after: clips in the collection. num_embedded: by this process.
    wrong: whatever is not as it should be.
    """

    num_before: int
    num_after: int
    num_embedded: int
    wrong: tuple[str, ...]


def kills(
    folder: Path, clips: Sequence[Path], *, model: str | None, num: int, seed: int
) -> Iterator[Kill]:
    """Kill `num` processes that add `clips`, at random moments, each after a commit or more."""
    rng = random.Random(seed)
    Collection.create(folder, model=model or LayoutEmbedder()).close()
    num_before = 0
    for _ in range(num):
        process = start(folder, clips[0].parent, model, "--most", str(MOST_COMMITS))
        assert process.stdout is not None
        num_commits = rng.randint(1, COMMITS)
        num_seen = num_embedded = 0
        while num_seen < num_commits and (line := process.stdout.readline()):
            num_embedded += int(line.removeprefix("embedded ")) if "embedded" in line else 0
            num_seen += line == "committed\n"
        # and then anywhere: while it commits, which takes milliseconds, embeds, decodes or merges
        time.sleep(rng.random() * rng.choice([0.0, 0.001, 0.01, 0.1]))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")[:-1]  # what it had said before it was killed
        num_embedded += sum(int(line.split()[1]) for line in rest if line.startswith("embedded"))
        process.wait()
        process.stdout.close()
        num_after, wrong = look(folder, model)
        yield Kill(num_before, num_after, num_embedded, tuple(wrong))
        num_before = num_after


def look(folder: Path, model: str | None) -> tuple[int, list[str]]:
    """Number of clips, and what is wrong with a collection."""
    with closing(sqlite3.connect(folder / DATABASE)) as database:
        wrong = [row[0] for row in database.execute("PRAGMA integrity_check") if row[0] != "ok"]
    with Collection.open(folder, model=model or LayoutEmbedder()) as collection:
        ids_N, vectors_ND = collection._store.vectors()
        hits = collection.search(vector=vectors_ND[-1], k=len(ids_N))
        if sorted(hit.id for hit in hits) != ids_N.tolist() or hits[0].score < 0.999:
            wrong.append("the search does not find what is stored")
        if collection._cache.segment_ids_N.tolist() != ids_N.tolist():
            wrong.append("the index does not hold what is stored")
        if len(collection._store.files()) != len(ids_N):
            wrong.append("a video is there without its segment")
        wrong += collection.check().problems
        wrong += [line for line in collection.check().fixed if "killed" not in line]
    return len(ids_N), wrong


def start(folder: Path, clips: Path, model: str | None, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, str(folder), str(clips), "--only-add", *options]
    command += ["--model", model] if model else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def add(folder: Path, clips: Sequence[Path], model: Any, *, most: int) -> None:
    """Add all clips in several calls; says what it embeds and commits, and waits after `most`."""
    num_committed = 0

    def say(done: int, total: int, path: str) -> None:
        nonlocal num_committed
        num_committed += 1
        print("committed", flush=True)
        if num_committed == most:
            time.sleep(3600)

    cache.MERGE_SEGMENTS = MERGE_SEGMENTS
    embed_video = model.embed_video

    def counted(videos: Sequence[Any], *, token_budget: int | None = None) -> np.ndarray:
        print("embedded", len(videos), flush=True)
        vectors_ND: np.ndarray = embed_video(videos, token_budget=token_budget)
        return vectors_ND

    model.embed_video = counted
    with Collection.open(folder, model=model) as collection:
        known = set(collection._store.files())
        new = [path for path in clips if str(path) not in known]
        for at in range(0, len(new), FILES_PER_CALL):
            collection.add(new[at : at + FILES_PER_CALL], progress=say)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=0, help="commits, then wait to be killed")
    parser.add_argument("--only-add", action="store_true", help="what is killed")
    arguments = parser.parse_args()
    clips = sorted(arguments.clips.absolute().glob("*.mp4"))
    if arguments.only_add:
        model: Any = LayoutEmbedder()
        if arguments.model:
            from fluxclip import load_model

            model = load_model(arguments.model)
        add(arguments.folder, clips, model, most=arguments.most)
        return
    killed = kills(
        arguments.folder, clips, model=arguments.model, num=arguments.kills, seed=arguments.seed
    )
    for number, kill in enumerate(killed, 1):
        print(
            f"kill {number}: {kill.num_before} -> {kill.num_after} clips, {kill.num_embedded} "
            f"embedded; {'; '.join(kill.wrong) or 'nothing wrong'}"
        )
    start(arguments.folder, arguments.clips.absolute(), arguments.model).communicate()
    num, wrong = look(arguments.folder, arguments.model)
    print(f"at the end {num} of {len(clips)} clips; {'; '.join(wrong) or 'nothing wrong'}")


if __name__ == "__main__":
    main()
