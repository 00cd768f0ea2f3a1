"""Time the video tower: what each way of keeping fewer tokens costs, and how fast attention is.

    python scripts/bench_encoder.py [--presets small,base] [--out benchmarks/encoder-DEVICE.json]

Fresh random weights, seed 0; decoding is not included. Per preset, from one run:
1. methods: all 2,048 tokens of 8 x 224^2 against budgets and the run-length filter, on clips of
   which a part stands still, and on a real film. The ratio of time stands next to the ratio of
   work; `efficiency` is their quotient.
2. attention: ours against the same tower with softmax(q @ k.mT * scale) @ v written out, which is
   what the official class computes without flash-attn.
What is compared is timed in turn (A B A B ...), and a ratio is the median of the pairs' ratios.
Work is counted by torch's operator counter in fp32, the attention's products included. With a CUDA
GPU everything is timed in fp32 and bf16, with the attention kernel that ran and the share of the
GPU's own matrix products per second.
"""

import argparse
import ctypes
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fluxclip.model import attention
from fluxclip.model.presets import preset
from fluxclip.model.video_tower import VideoTower
from fluxclip.training.flops import matrix_peak

ROOT = Path(__file__).resolve().parent.parent
GRID = (8, 224)
BATCH = {"cpu": {"small": 2, "base": 1}, "cuda": {"small": 64, "base": 32}}
Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="small,base")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, help="clips at once; 0 or none: what fits the preset")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in arguments.presets.split(","):
        for dtype in (torch.float32, torch.bfloat16)[: 2 if device == "cuda" else 1]:
            batch = arguments.batch or BATCH[device].get(name, 2)
            bench = Bench(name, batch, device, dtype, arguments.repeats)
            rows += [*bench.methods(), *bench.attention(), bench.overhead()]
    record = {
        "benchmark": "encoder", "command": shlex.join(["python", *sys.argv]), "seed": 0,
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "date": date.today().isoformat(), "repeats": arguments.repeats, "rows": rows,
    }  # fmt: skip
    show(record)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


class Bench:
    """The towers of one preset, one with the run-length filter, and the clips they see."""

    def __init__(
        self, name: str, batch: int, device: str, dtype: torch.dtype, repeats: int
    ) -> None:
        self.name, self.batch, self.device, self.repeats = name, batch, device, repeats
        self.dtype = dtype
        self.plain, self.filtered = (self._tower(filter=kind) for kind in ("", "run_length"))
        self.filtered.load_state_dict(self.plain.state_dict())
        # multiply-accumulates per second
        bf16 = dtype == torch.bfloat16
        self.peak = matrix_peak(device, bf16=bf16) / 2 if device == "cuda" else None

    def _tower(self, **changes: Any) -> VideoTower:
        torch.manual_seed(0)
        return VideoTower(preset(self.name, **changes)).to(self.device).eval()

    def methods(self) -> list[dict[str, Any]]:
        """Ways to keep fewer tokens, each in turn with all tokens of the same clips."""
        moving = self.clips(still=0.0)
        cases: list[tuple[str, VideoTower, Tensor, int | None]] = [
            ("all tokens", self.plain, moving, None),
            *((f"budget {k}", self.plain, moving, k) for k in (1024, 512, 256)),
            ("run-length, 3/4 kept", self.filtered, self.clips(still=0.29), None),
            ("run-length, 1/2 kept", self.filtered, self.clips(still=0.57), None),
            ("run-length, then budget 512", self.filtered, self.clips(still=0.57), 512),
            ("run-length on a film", self.filtered, self.film(), None),
        ]
        rows = []
        for name, tower, frames, budget in cases:
            run = self.runner(tower, frames, budget)
            every = self.runner(self.plain, frames, None)
            times = time_in_turn([every, run], self.repeats, self.device)
            rows.append(self.row(name, tower, frames, budget, times))
        return rows

    def attention(self) -> list[dict[str, Any]]:
        """Our attention against the written-out one, on the grids of the paper's comparisons."""
        rows = []
        for (num_frames, side), budget in (((12, 196), 1024), ((8, 224), 2048)):
            torch.manual_seed(0)
            shape = (self.batch, num_frames, side, side, 3)
            frames = torch.randn(shape, device=self.device)
            ours = self.runner(self.plain, frames, budget)
            times = time_in_turn([written_out(ours), ours], self.repeats, self.device)
            name = f"attention, {num_frames} x {side}^2 at {budget}"
            rows.append(self.row(name, self.plain, frames, budget, times))
        return rows

    def overhead(self) -> dict[str, Any]:
        """The run-length filter and its gathering alone, as a share of a pass with all tokens."""
        frames = self.clips(still=0.57)

        def choose() -> None:
            assert self.filtered.filter is not None
            self.filtered.filter(frames)

        times = time_in_turn(
            [self.runner(self.plain, frames, None), choose], self.repeats, self.device
        )
        share = statistics.median(b / a for a, b in zip(*times, strict=True))
        return {**self.facts("run-length filter alone"), "share_of_all_tokens": share}

    def clips(self, *, still: float) -> Tensor:
        """Noise, of which a part of the picture, different in every clip, stands still."""
        torch.manual_seed(0)
        num_frames, side = GRID
        x = torch.randn(self.batch, num_frames, side, side, 3, device=self.device)
        for i in range(self.batch if still else 0):
            # a little more in one clip and less in the next, so that they differ in length
            share = still + 0.1 * (i % 3 - 1)
            rows = round(side * share / 14) * 14
            x[i, :, :rows] = x[i, :1, :rows]
        return x

    def film(self) -> Tensor:
        """Clips of the film that ships for tests, two seconds each, normalised."""
        from fluxclip.video import read_clip
        from fluxclip.video.transforms import to_float

        num_frames, side = GRID
        frames = []
        for i in range(self.batch):
            times_s = [2.0 * i + 0.25 * step for step in range(num_frames)]
            clip = read_clip(ROOT / "assets/film/film_360p.mp4", times_s=times_s, side=side)
            frames.append(torch.from_numpy(clip.frames_THWC))
        x = torch.stack(frames).to(self.device)
        return to_float(x, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    def runner(self, tower: VideoTower, frames: Tensor, budget: int | None) -> Run:
        def run() -> Tensor:
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                return tower(frames, budget)

        return run

    def row(
        self, name: str, tower: VideoTower, frames: Tensor, budget: int | None,
        times: list[list[float]],
    ) -> dict[str, Any]:  # fmt: skip
        """A variant against its reference: times[1] against times[0]."""
        counts = tower.count(frames, budget)
        tokens = frames.shape[1] * (frames.shape[2] // 14) ** 2
        macs = sum(tower.macs(*count) for count in counts) / self.batch
        counted = self.counted(tower, frames, budget)
        work = self.plain.macs(tokens, tokens) / macs if not name.startswith("attention") else 1.0
        faster = statistics.median(a / b for a, b in zip(*times, strict=True))
        second = statistics.median(times[1]) / self.batch
        return {
            **self.facts(name), "frames": frames.shape[1], "side": frames.shape[2],
            "tokens_of_grid": tokens,
            "tokens_into_first_block": sum(kept for _, kept in counts) / self.batch,
            "gmacs_per_clip": macs / 1e9, "gmacs_counted": counted / 1e9,
            "ms_per_clip": 1e3 * second, "clips_per_s": 1 / second,
            "times_faster": faster, "times_less_work": work, "efficiency": faster / work,
            "peak_mib": peak_mib(self.runner(tower, frames, budget), self.device),
            "kernel": self.kernel(counts),
            "share_of_matrix_peak": macs / second / self.peak if self.peak else None,
        }  # fmt: skip

    def facts(self, name: str) -> dict[str, Any]:
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return {"preset": self.name, "precision": precision, "name": name, "batch": self.batch}

    def kernel(self, counts: Sequence[tuple[int, int]]) -> str:
        if len({kept for _, kept in counts}) == 1:
            return "scaled_dot_product"
        packed = self.device == "cuda" and self.dtype == torch.bfloat16
        return "varlen" if packed else "scaled_dot_product per length"

    @torch.inference_mode()
    def counted(self, tower: VideoTower, frames: Tensor, budget: int | None) -> float:
        with FlopCounterMode(display=False) as counter:
            tower(frames, budget)
        return counter.get_total_flops() / 2 / self.batch


def written_out(run: Run) -> Run:
    """`run` with the matrix of all pairs of tokens made and kept."""

    def attend(q_BKD: Tensor, k_BMD: Tensor, v_BMD: Tensor, heads: int) -> Tensor:
        b, k, d = q_BKD.shape
        q, keys, values = (
            x.view(b, -1, heads, d // heads).transpose(1, 2) for x in (q_BKD, k_BMD, v_BMD)
        )
        weights = (q @ keys.mT * (d // heads) ** -0.5).softmax(-1)
        return (weights @ values).transpose(1, 2).reshape(b, k, d)

    def changed() -> None:
        ours = attention._dense
        attention._dense = attend
        try:
            run()
        finally:
            attention._dense = ours

    return changed


@torch.inference_mode()
def time_in_turn(runs: Sequence[Run], repeats: int, device: str) -> list[list[float]]:
    """Seconds of each run, the runs taking turns, after one warm-up each."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, kept in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                kept.append(time.perf_counter() - start)
    return times


@torch.inference_mode()
def peak_mib(run: Run, device: str) -> float | None:
    """Most memory that a pass takes beyond what is there before it, in MiB; None if unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what earlier passes freed
        reset.write_text("5")  # Linux: the peak starts again from here
        before = _status_kib(status, "VmRSS")
        run()
        return (_status_kib(status, "VmHWM") - before) / 2**10
    except (OSError, AttributeError):  # no Linux, or no glibc
        return None


def _status_kib(status: Path, key: str) -> int:
    [line] = [line for line in status.read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1])


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(record: dict[str, Any]) -> None:
    title = "{device_name}, {threads} threads, torch {torch}, median of {repeats}"
    table = Table(title=title.format(**record))
    columns = ("", "", "tokens", "GMAC", "ms/clip", "MiB", "less work", "faster", "share")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for r in record["rows"]:
        if "share_of_all_tokens" in r:
            cells = ["", "", "", "", "", "", f"{r['share_of_all_tokens']:.3f}"]
        else:
            peak = "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"
            cells = [
                f"{r['tokens_into_first_block']:.0f}", f"{r['gmacs_per_clip']:.1f}",
                f"{r['ms_per_clip']:.1f}", peak, f"{r['times_less_work']:.2f}x",
                f"{r['times_faster']:.2f}x", f"{r['efficiency']:.2f}",
            ]  # fmt: skip
        table.add_row(f"{r['preset']} {r['precision']}", r["name"], *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
