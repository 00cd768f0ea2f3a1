"""Time `index add` against decoding and embedding alone, and `search` from a cold shell.

    python scripts/bench_index.py [--model emoji-tiny] [--out benchmarks/index-cpu.json]

Adding finds, hashes, decodes, embeds and commits each clip in a transaction of its own, decoding
while it embeds. Decoding and embedding alone come one after the other, with the same threads and
the same batches: all clips to memory, then all clips to vectors. The two take turns (A B A B ...);
a ratio is the median of the pairs', with the lowest and the highest. Below the sum of decoding and
embedding a program can only come by doing both at once; the longer of the two is what it could
reach if each left the cores that the other needs.

A search is timed from the start of its process to its end, with the files it reads in memory and
the byte code of its modules written, which a first run that does not count sees to. It takes turns
with one on a copy without the exported text tower, which loads the model. Where the time of the
imports goes is told by `python -X importtime`, package by package.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_encoder import cpu_name
from rich.console import Console
from rich.table import Table

from fluxclip import load_model
from fluxclip.embedder import Embedder
from fluxclip.video import Clip
from retrieval import Collection
from retrieval.ingest import CLIPS_PER_BATCH, Reader
from retrieval.store import FileState

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT / "assets" / "animated-emoji" / "clips"
QUERY = "a dancing woman"
PACKAGES_SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-tiny")
    parser.add_argument("--clips", type=Path, default=CLIPS, help="a folder of videos")
    parser.add_argument("--first", type=int, help="only so many of them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    paths = sorted(arguments.clips.iterdir())[: arguments.first]
    model = load_model(arguments.model)
    record = {
        "benchmark": "index", "command": shlex.join(["python", *sys.argv]),
        "model": arguments.model, "clips": len(paths), "cores": os.cpu_count(),
        "device": str(model.device), "device_name": cpu_name(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "date": date.today().isoformat(), "repeats": arguments.repeats,
        "adding": adding(model, paths, arguments.repeats),
        "cold_search": cold_search(model, paths, arguments.repeats),
    }  # fmt: skip
    show(record)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def adding(model: Embedder, paths: Sequence[Path], repeats: int) -> dict[str, Any]:
    """Seconds of adding, of decoding and embedding alone, and of what else adding does."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty"  # made once: it takes seconds to export the text tower
        Collection.create(empty, model=model).close()
        return _adding(model, paths, repeats, empty)


def _adding(model: Embedder, paths: Sequence[Path], repeats: int, empty: Path) -> dict[str, Any]:
    add_into(empty, model, paths[:64])  # warm: kernels, decoders, the files of the first clips
    times: dict[str, list[float]] = {"add": [], "decode": [], "embed": []}
    for _ in range(repeats):
        times["add"].append(add_into(empty, model, paths))
        decode_s, clips = timed(lambda: decode(model, paths))
        times["decode"].append(decode_s)
        times["embed"].append(timed(lambda clips=clips: embed(model, clips))[0])
    sums = [d + e for d, e in zip(times["decode"], times["embed"], strict=True)]
    longer = [max(pair) for pair in zip(times["decode"], times["embed"], strict=True)]
    return {
        "clips_per_s": len(paths) / statistics.median(times["add"]),
        **{f"{name}_s": spread(seconds) for name, seconds in times.items()},
        "decode_then_embed_s": spread(sums),
        "longer_of_the_two_s": spread(longer),
        "add_to_decode_then_embed": ratios(times["add"], sums),
        "add_to_longer_of_the_two": ratios(times["add"], longer),
        "hash_s": timed(lambda: [hashlib.sha256(path.read_bytes()) for path in paths])[0],
        "commit_s": commit(empty, model, paths),
    }


def add_into(empty: Path, model: Embedder, paths: Sequence[Path]) -> float:
    """Seconds that adding to a copy of an empty collection takes."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Collection.open(shutil.copytree(empty, Path(folder) / "c"), model=model) as collection,
    ):
        seconds, report = timed(lambda: collection.add(list(paths)))
    assert report.added == len(paths), report
    return seconds


def decode(model: Embedder, paths: Sequence[Path]) -> list[Clip]:
    with ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 1))) as pool:
        return list(pool.map(Reader.of(model, None).read, paths))


def embed(model: Embedder, clips: Sequence[Clip]) -> None:
    for at in range(0, len(clips), CLIPS_PER_BATCH):
        model.embed_video(clips[at : at + CLIPS_PER_BATCH])


def commit(empty: Path, model: Embedder, paths: Sequence[Path]) -> float:
    """Seconds of the transactions alone, which adding spends while it decodes."""
    vectors_ND = model.embed_video([decode(model, paths[:1])[0]])
    with (
        tempfile.TemporaryDirectory() as folder,
        Collection.open(shutil.copytree(empty, Path(folder) / "c"), model=model) as collection,
    ):
        store, state = collection._store, FileState(0, 0, "0" * 64)
        with store.flushed_at_the_end():  # as `add` does
            return timed(
                lambda: [
                    store.put_video(str(p), state, 1.0, [(0.0, 1.0)], vectors_ND) for p in paths
                ]
            )[0]


def cold_search(model: Embedder, paths: Sequence[Path], repeats: int) -> dict[str, Any]:
    """Seconds of `fluxclip search` with and without the exported text tower, and their imports."""
    with tempfile.TemporaryDirectory() as folder:
        exported, plain = Path(folder) / "exported", Path(folder) / "plain"
        with Collection.create(exported, model=model) as collection:
            assert collection.info()["text_encoder"], "the model's text tower cannot be exported"
            collection.add(list(paths))
        shutil.copytree(exported, plain, ignore=shutil.ignore_patterns("text_encoder"))
        # byte code is kept between runs, as it is for whoever did not switch that off
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(Path(folder) / "bytecode")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        commands = {
            name: [sys.executable, "-m", "fluxclip.cli", "search", str(path), QUERY]
            for name, path in (("exported", exported), ("model", plain))
        }
        answers = {name: run(command, environment).stdout for name, command in commands.items()}
        assert all(answers.values()), answers
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, command in commands.items():
                times[name].append(timed(lambda command=command: run(command, environment))[0])
        imports = {
            name: import_ms(
                run([*command[:1], "-X", "importtime", *command[1:]], environment).stderr
            )
            for name, command in commands.items()
        }
    return {
        **{f"{name}_s": spread(seconds) for name, seconds in times.items()},
        "imports_ms": imports,
    }


def run(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


def import_ms(report: str) -> dict[str, float]:
    """Milliseconds that a program's imports took: in all, and by package, the longest first.

    report: lines of `-X importtime`, "import time: SELF_us | CUMULATIVE_us | MODULE".
    """
    by_package: Counter[str] = Counter()
    for line in report.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdecimal():
            by_package[parts[2].strip().partition(".")[0]] += int(parts[0])
    longest = {name: us / 1000 for name, us in by_package.most_common(PACKAGES_SHOWN)}
    return {"all": by_package.total() / 1000, **longest}


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def ratios(times: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(times, references, strict=True)])


def show(record: dict[str, Any]) -> None:
    title = "{model}, {clips} clips, {device_name}, {threads} threads, torch {torch}"
    table = Table("", "median", "lowest", "highest", title=title.format(**record))
    for name, value in record["adding"].items():
        cells = value.values() if isinstance(value, dict) else [value]
        table.add_row(name, *(f"{cell:.2f}" for cell in cells))
    search = record["cold_search"]
    for name in ("exported", "model"):
        cells = search[f"{name}_s"].values()
        table.add_row(f"cold search, {name}_s", *(f"{cell:.2f}" for cell in cells))
    Console().print(table)
    for name, imports in search["imports_ms"].items():
        parts = ", ".join(f"{package} {ms:.0f}" for package, ms in imports.items())
        Console().print(f"imports of a search, {name}, ms: {parts}")


if __name__ == "__main__":
    main()
