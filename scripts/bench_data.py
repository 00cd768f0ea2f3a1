"""Time reading clips: our reader, plain decord and plain torchcodec, of whole films and of chunks.

    python scripts/bench_data.py [--repeats 7] [--out benchmarks/data-cpu.json]

Eight frames spread over the whole of the film at 360p and at 720p, whose keyframes are up to ten
seconds apart: the largest square, 224 pixels. One thread. Plain means as most write it: pictures by
number in one call, then cut and scaled by torch (bicubic, antialiased). `pyav`, `torchcodec` and
`decord` are ours. What is compared runs in turn (A B C A B C ...), each time from opening the file;
a ratio is the median of the rounds' ratios.

1. readers: CPU seconds per clip, bytes read, and how near its frames are to those of every frame
   decoded in turn: mean difference in grey levels, and PSNR.
2. chunks: our reader on the same films as `fluxclip chunk` writes them, against whole files; also
   for clips of four frames of four seconds, the mean of some that begin all over the film.
3. crop: a part cut out and scaled by the decoder, against whole pictures first and then cut and
   scaled, eight frames in a row after a keyframe, of 720 and of 288 rows.
4. stages: where our reader's time goes. `fluxclip train --profile` says it of a run, with what
   comes after reading and the share of its time that a step waits for data.

That frames are the right ones is checked: ours are equal to those of every frame decoded in turn,
and those of chunks are on screen at the same times; else it ends with an error.

torchcodec and decord are left out where they are not installed.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fluxclip import plugins, stages
from fluxclip.video import chunk_writer, chunks, evenly_spread, probe, read_clip
from fluxclip.video.framing import Framing, pixel_span

ROOT = Path(__file__).resolve().parent.parent
FILMS = {name: ROOT / "assets/film" / f"film_{name}.mp4" for name in ("360p", "720p")}
FRAMES, SIDE = 8, 224
SHORT_CLIPS, SHORT_FRAMES, SHORT_S = 8, 4, 4.0
BOX = (0.1, 0.2, 0.7, 0.6)
Read = Callable[[Path, np.ndarray], np.ndarray]
Key = TypeVar("Key")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_before = os.getloadavg()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = chunks.Settings()
        chunked = dict(chunk_writer.find(list(FILMS.values()), Path(folder)))
        chunk_writer.write(list(chunked.items()), settings=settings)
        for name, path in FILMS.items():
            film = Film(name, path)
            rows += compare_readers(film, arguments.repeats)
            rows += compare_chunks(film, chunked[path], arguments.repeats)
        small = sorted(chunked[FILMS["720p"]].glob("*.mp4"))[0]
        rows += compare_crops("720 rows", FILMS["720p"], arguments.repeats)
        rows += compare_crops("288 rows", small, arguments.repeats)
    record = {
        "benchmark": "data", "command": shlex.join(["python", *sys.argv]),
        "frames": FRAMES, "side": SIDE, "repeats": arguments.repeats, "threads": 1,
        "chunks": str(settings), "machine": platform.machine(), "cores": os.cpu_count(),
        "load_before": load_before, "load_after": os.getloadavg(),
        "versions": {name: installed(name) for name in ("av", "torchcodec", "decord2", "torch")},
        "date": date.today().isoformat(), "rows": rows,
    }  # fmt: skip
    show(rows)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


class Film:
    """A film, when its frames are wanted, and those frames."""

    def __init__(self, name: str, path: Path) -> None:
        info = probe(path)
        self.name, self.path = name, path
        self.times_s = evenly_spread(0, info.duration_s, FRAMES)
        self.short_clips_s = [
            evenly_spread(start_s, start_s + SHORT_S, SHORT_FRAMES)
            for start_s in evenly_spread(0, info.duration_s - SHORT_S, SHORT_CLIPS)
        ]
        # every frame asked for, so that none is left out and nothing sought
        numbers = np.floor(self.times_s * info.fps + 1e-6).astype(int)
        every_s = (np.arange(numbers[-1] + 1) + 0.5) / info.fps
        self.frames_THWC = read_clip(path, times_s=every_s, side=SIDE).frames_THWC[numbers]


def compare_readers(film: Film, repeats: int) -> list[dict[str, Any]]:
    """Every reader on a whole film, against our reader with its default decoder."""
    readers = usable_readers()
    runs = {key: partial(read, film.path, film.times_s) for key, read in readers.items()}
    if not np.array_equal(runs["pyav"](), film.frames_THWC):
        raise SystemExit(f"{film.path}: pyav's frames are not those of every frame in turn")
    seconds = in_turn(runs, repeats)
    rows: list[dict[str, Any]] = [
        {
            "part": "readers", "what": key, "of": film.name,
            "cpu_seconds": statistics.median(seconds[key]),
            "times": ratio(seconds[key], seconds["pyav"]),
            "bytes_read": bytes_read(run), **likeness(run(), film.frames_THWC),
        }
        for key, run in runs.items()
    ]  # fmt: skip
    rows[0]["stages"] = by_stage(runs["pyav"])
    return rows


def compare_chunks(film: Film, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Our reader on a film and on its chunks: the same frames, of all of it and of short clips."""
    rows: list[dict[str, Any]] = []
    for what, clips_s in (
        (f"{FRAMES} frames of all", [film.times_s]),
        (f"{SHORT_FRAMES} frames of {SHORT_S:g} s", film.short_clips_s),
    ):
        runs = {path: partial(read_all, path, clips_s) for path in (film.path, folder)}
        (of_film, film_s), (of_chunks, chunks_s) = runs[film.path](), runs[folder]()
        if not np.array_equal(film_s, chunks_s):
            raise SystemExit(f"{film.path}: its chunks give frames of other times")
        seconds, count = in_turn(runs, repeats), len(clips_s)
        for path, frames, name in ((film.path, of_film, "film"), (folder, of_chunks, "chunks")):
            spent, read = by_stage(runs[path]), bytes_read(runs[path])
            rows.append(
                {
                    "part": "chunks", "what": what, "of": f"{film.name}, {name}",
                    "cpu_seconds": statistics.median(seconds[path]) / count,
                    "times": ratio(seconds[film.path], seconds[path]),
                    "bytes_read": None if read is None else read / count,
                    **likeness(frames, of_film),
                    "stages": {key: value / count for key, value in spent.items()},
                }
            )  # fmt: skip
    return rows


def read_all(path: Path, clips_s: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Frames and times of clips, one behind the other."""
    clips = [read_clip(path, times_s=times_s, side=SIDE) for times_s in clips_s]
    frames_THWC = np.concatenate([clip.frames_THWC for clip in clips])
    return frames_THWC, np.concatenate([clip.times_s for clip in clips])


def by_stage(run: Callable[[], object]) -> dict[str, float]:
    """Seconds by the clock on the wall, of the shortest of three runs."""

    def measured() -> dict[str, float]:
        with stages.measured() as seconds, stages.stage("other"):
            run()
        return dict(seconds)

    return min((measured() for _ in range(3)), key=lambda seconds: sum(seconds.values()))


def compare_crops(name: str, path: Path, repeats: int) -> list[dict[str, Any]]:
    """Cutting and scaling in the decoder, against doing it on whole pictures."""
    times_s = (np.arange(FRAMES) + 0.5) / probe(path).fps

    def fused() -> np.ndarray:
        return read_clip(path, times_s=times_s, side=SIDE, crop=BOX).frames_THWC

    def afterwards() -> np.ndarray:
        whole = read_clip(path, times_s=times_s).frames_THWC
        return scaled(torch.from_numpy(whole).permute(0, 3, 1, 2), BOX)

    seconds = in_turn({"fused": fused, "afterwards": afterwards}, repeats)
    return [
        {
            "part": "crop", "what": "cut and scaled by the decoder", "of": name,
            "cpu_seconds": statistics.median(seconds["fused"]),
            "times": ratio(seconds["afterwards"], seconds["fused"]),
            **likeness(fused(), afterwards()),
        }
    ]  # fmt: skip


def usable_readers() -> dict[str, Read]:
    """Our reader by decoder, and the libraries as most use them, where they are installed."""
    readers: dict[str, Read] = {"pyav": ours("pyav")}
    for name, plain in (("torchcodec", plain_torchcodec), ("decord", plain_decord)):
        try:
            plugins.load("fluxclip.video.decoders", name)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            readers |= {name: ours(name), f"plain {name}": plain}
    return readers


def ours(decoder: str) -> Read:
    def read(path: Path, times_s: np.ndarray) -> np.ndarray:
        return read_clip(path, times_s=times_s, side=SIDE, decoder=decoder).frames_THWC

    return read


def plain_decord(path: Path, times_s: np.ndarray) -> np.ndarray:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    numbers = (times_s * reader.get_avg_fps() + 1e-6).astype(int)
    pictures = torch.from_numpy(reader.get_batch(numbers).asnumpy())
    return scaled(pictures.permute(0, 3, 1, 2))


def plain_torchcodec(path: Path, times_s: np.ndarray) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1)
    return scaled(decoder.get_frames_played_at(times_s.tolist()).data)


def scaled(
    pictures_TCHW: torch.Tensor, crop: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """The part that `crop` or else the largest square is, SIDE pixels square: (T, H, W, 3)."""
    height, width = pictures_TCHW.shape[2:]
    top, left, bottom, right = Framing(SIDE, "crop", crop).box(width, height)
    (y0, y1), (x0, x1) = pixel_span(top, bottom, height), pixel_span(left, right, width)
    part_TCHW = torch.nn.functional.interpolate(
        pictures_TCHW[:, :, y0:y1, x0:x1], (SIDE, SIDE), mode="bicubic", antialias=True
    )
    return part_TCHW.permute(0, 2, 3, 1).contiguous().numpy()


def in_turn(runs: Mapping[Key, Callable[[], object]], repeats: int) -> dict[Key, list[float]]:
    """CPU seconds of each run in each round, after one round that is not counted."""
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for number in range(repeats + 1):
        for key, run in runs.items():
            start = time.process_time()
            run()
            if number:
                seconds[key].append(time.process_time() - start)
    return seconds


def ratio(these: list[float], those: list[float]) -> float:
    """How many times longer these took than those: the median of the rounds."""
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def likeness(frames_THWC: np.ndarray, truth_THWC: np.ndarray) -> dict[str, float]:
    """How near frames are to the true ones, in grey levels (0-255) and decibels."""
    difference = frames_THWC.astype(float) - truth_THWC
    squared = float((difference**2).mean())
    return {
        "mean_difference": float(np.abs(difference).mean()),
        "psnr_db": 10 * float(np.log10(255**2 / squared)) if squared else 99.0,
    }


def bytes_read(run: Callable[[], object]) -> int | None:
    """What a run asks the system to read, from its cache or not; None where Linux does not tell."""
    counter = Path("/proc/self/io")
    if not counter.exists():
        return None

    def counted() -> int:
        return int(counter.read_text().split("rchar:")[1].split()[0])

    before, own = counted(), 0
    own = counted() - before  # reading the counter counts as well
    before = counted()
    run()
    return max(0, counted() - before - own)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def show(rows: list[dict[str, Any]]) -> None:
    console = Console(width=120)
    for part, title in (
        ("readers", "readers (how many times pyav's time)"),
        ("chunks", "chunks (how many times faster than the film)"),
        ("crop", "crop (how many times faster than on whole pictures)"),
    ):
        table = Table(
            "what", "of", "CPU s", "times", "MB read", "difference", "PSNR dB", title=title
        )
        for row in rows:
            if row["part"] == part:
                table.add_row(
                    row["what"], row["of"], f"{row['cpu_seconds']:.3f}", f"{row['times']:.2f}",
                    "" if row.get("bytes_read") is None else f"{row['bytes_read'] / 1e6:.2f}",
                    f"{row['mean_difference']:.2f}", f"{row['psnr_db']:.1f}",
                )  # fmt: skip
        console.print(table)
    for row in rows:
        if "stages" in row:
            spent = ", ".join(f"{key} {1000 * s:.1f}" for key, s in row["stages"].items())
            console.print(f"{row['what']} of {row['of']}, ms by stage: {spent}")


if __name__ == "__main__":
    main()
