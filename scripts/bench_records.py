"""Seconds to open millions of captions, and what each worker that reads them takes of memory.

    python scripts/bench_records.py [--records 10000000] [--workers 8] [--out records.json]

Captions are generated into a Parquet file of a temporary folder (--folder to choose where: 3 GB for
ten million). Then, in new processes: prepare (the first start), open (every other start), and so
many workers as a training run starts, which draw the order of steps and read the records, against
the same workers on a thousand records. Linux, as memory is read from /proc.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
from datetime import date
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import mean
from typing import Any

from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.sources.annotations import read
from fluxclip.tokens.budget import FluxSampling

STEPS, BATCH = 200, 256  # read by each worker
WORDS = ("a dog", "two people", "a red car", "the sea", "an old man", "a child", "someone")
DOES = ("runs", "talks to the camera", "turns around slowly", "is seen from above", "sings")
PLACES = ("in a park on a sunny day", "at night", "in front of a house", "in the kitchen")


def generate(path: Path, *, records: int) -> None:
    """A Parquet file with as many videos, a caption each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, pa.schema({"video": pa.string(), "caption": pa.string()})) as file:
        for start in range(0, records, 100_000):
            numbers = range(start, min(start + 100_000, records))
            file.write_table(
                pa.table(
                    {
                        "video": [f"clips/{n % 1000:03d}/{n:08d}.mp4" for n in numbers],
                        "caption": [
                            f"{WORDS[n % 7]} {DOES[n % 5]} {PLACES[n % 4]}, take {n}"
                            for n in numbers
                        ],
                    }
                )
            )


def opened(path: Path, sender: Connection) -> None:
    """In a process of its own: seconds until the first record is there, and peak memory."""
    import pyarrow  # noqa: F401  # a library's import is not what is measured

    start = time.perf_counter()
    records = read(path, check_files=False)
    last = records[len(records) - 1]
    sender.send(
        {
            "records": len(records), "last": last.captions[0],
            "seconds": time.perf_counter() - start,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        }
    )  # fmt: skip


def worker(data: Steps, number: int, sender: Connection, measure: Any) -> None:
    """What a worker does to know its samples, without their frames; then its memory."""
    characters = 0
    for step in range(number, number + STEPS):
        for index in data.order(0, step):
            characters += sum(map(len, data.sources[0].records[index].captions))
    measure.wait()  # until all have read
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    sender.send(
        {
            "private_mb": (kb["Private_Clean"] + kb["Private_Dirty"]) / 1e3,
            "proportional_mb": kb["Pss"] / 1e3,
            "characters": characters,
        }
    )
    measure.wait()  # pages are shared as long as all are there


def memory(path: Path, *, workers: int) -> dict[str, float]:
    """Mean memory of workers that have read records of a file."""
    spawn = multiprocessing.get_context("spawn")
    sampling = FluxSampling((4, 8, 4), (112, 112, 14), (64, 512), (128,))
    data = Steps([Source(read(path, check_files=False), BATCH)], sampling, Augment(), seed=0)
    barrier, found = spawn.Barrier(workers), []
    processes, receivers = [], []
    for number in range(workers):
        receiver, sender = spawn.Pipe(duplex=False)
        arguments = (data, number * STEPS, sender, barrier)
        # those that wait for one that has died end with this process
        process = spawn.Process(target=worker, args=arguments, daemon=True)
        process.start()
        sender.close()  # then a worker that dies ends the wait for it
        receivers.append(receiver)
        processes.append(process)
    while receivers:
        wait(receivers)
        for receiver in [one for one in receivers if one.poll()]:
            found.append(receiver.recv())
            receivers.remove(receiver)
    for process in processes:
        process.join()
    return {key: mean(one[key] for one in found) for key in ("private_mb", "proportional_mb")}


def in_a_process(path: Path) -> Any:
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=opened, args=(path, sender))
    process.start()
    sender.close()  # then a process that dies ends the wait for it
    found = receiver.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where the captions are generated")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        os.environ["FLUXCLIP_CACHE"] = f"{folder}/cache"
        many, few = Path(folder, "many.parquet"), Path(folder, "few.parquet")
        generate(many, records=arguments.records)
        generate(few, records=1000)
        prepare, again = in_a_process(many), in_a_process(many)
        print("prepare", prepare)
        print("open", again)
        small = memory(few, workers=arguments.workers)
        large = memory(many, workers=arguments.workers)
        added = {key: large[key] - small[key] for key in large}
        print(f"a worker, of {arguments.workers}:", large, "more than with 1000 records:", added)
        record = {
            "benchmark": "records", "command": shlex.join(["python", *sys.argv]),
            "parquet_mb": many.stat().st_size / 1e6,
            "arrow_mb": sum(f.stat().st_size for f in Path(folder).rglob("many*.arrow")) / 1e6,
            "prepare": prepare, "open": again, "workers": arguments.workers,
            "read_by_each": STEPS * BATCH, "worker": large, "added": added,
            "machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
            "date": date.today().isoformat(),
        }  # fmt: skip
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
