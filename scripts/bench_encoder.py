"""Time the video tower: token budgets against all tokens, fused against plain attention.

    python scripts/bench_encoder.py [--preset small] [--out benchmarks/encoder-DEVICE.json]

Two tables from one run, fresh random weights, seed 0, decoding not included:
1. all tokens against a quarter of them on the same grid;
2. our attention against the same tower with attention written as softmax(q @ k.mT * scale) @ v,
   which is what the official class computes without flash-attn.
The variants of a row are timed in turn (A B A B ...) and the ratio is the median of the pairs'.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fluxclip.model import blocks
from fluxclip.model.attention import attend
from fluxclip.model.presets import preset
from fluxclip.model.video_tower import VideoTower


def plain_attend(q_BKD: Tensor, k_BMD: Tensor, v_BMD: Tensor, *, heads: int) -> Tensor:
    """Attention with the K x M matrix written out."""
    b, k, d = q_BKD.shape

    def split(x: Tensor) -> Tensor:
        return x.view(b, -1, heads, d // heads).transpose(1, 2)

    q, keys, values = split(q_BKD), split(k_BMD), split(v_BMD)
    weights = (q @ keys.mT * (d // heads) ** -0.5).softmax(-1)
    return (weights @ values).transpose(1, 2).reshape(b, k, d)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower = VideoTower(preset(arguments.preset)).to(device).eval()

    def row(name: str, batch: int, grid: tuple[int, int], budget: int | None) -> dict[str, Any]:
        num_frames, side = grid
        tokens = tower.config.num_tokens(num_frames, side)
        kept = min(tokens, budget or tokens)
        return {
            "name": name, "batch": batch, "frames": num_frames, "side": side,
            "tokens_of_grid": tokens, "tokens_into_first_block": kept,
            "gmacs_per_clip": tower.macs(tokens, kept) / 1e9,
        }  # fmt: skip

    def runner(batch: int, grid: tuple[int, int], budget: int | None) -> Callable[[], object]:
        num_frames, side = grid
        frames = torch.randn(batch, num_frames, side, side, 3, device=device)
        return lambda: tower(frames, budget)

    rows = []
    batch, grid = 4, (8, 224)
    tokens = tower.config.num_tokens(*grid)
    every, quarter = runner(batch, grid, None), runner(batch, grid, tokens // 4)
    times = time_in_turn([every, quarter], arguments.repeats, device)
    rows.append(row("all tokens", batch, grid, None) | seconds(times[0], times[0], batch))
    rows.append(row("a quarter", batch, grid, tokens // 4) | seconds(times[1], times[0], batch))
    for grid, budget in (((12, 196), 1024), ((8, 224), 2048)):
        ours = runner(batch, grid, budget)
        times = time_in_turn([with_attention(plain_attend, ours), ours], arguments.repeats, device)
        rows.append(
            row("plain attention", batch, grid, budget) | seconds(times[0], times[0], batch)
        )
        rows.append(row("ours", batch, grid, budget) | seconds(times[1], times[0], batch))
    record = {
        "benchmark": "encoder", "command": shlex.join(["python", *sys.argv]), "seed": 0,
        "preset": arguments.preset, "precision": "fp32", "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "date": date.today().isoformat(), "repeats": arguments.repeats, "rows": rows,
    }  # fmt: skip
    show(record)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def with_attention(
    attention: Callable[..., Tensor], run: Callable[[], object]
) -> Callable[[], None]:
    """`run` with another attention inside the blocks."""

    def changed() -> None:
        blocks.attend = attention  # type: ignore[assignment]
        try:
            run()
        finally:
            blocks.attend = attend

    return changed


@torch.inference_mode()
def time_in_turn(runs: list[Callable[[], object]], repeats: int, device: str) -> list[list[float]]:
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


def seconds(times: list[float], reference: list[float], batch: int) -> dict[str, float]:
    ratios = [b / a for a, b in zip(times, reference, strict=True)]
    return {
        "ms_per_clip": 1e3 * statistics.median(times) / batch,
        "times_faster": statistics.median(ratios),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def show(record: dict[str, Any]) -> None:
    title = "{preset}, {precision}, {device_name}, {threads} threads, torch {torch}"
    table = Table(title=title.format(**record))
    for column in ("", "clips", "grid", "tokens", "into block 1", "GMACs", "ms/clip", "faster"):
        table.add_column(column, justify="left" if not column else "right")
    for r in record["rows"]:
        table.add_row(
            r["name"], str(r["batch"]), f"{r['frames']} x {r['side']}", str(r["tokens_of_grid"]),
            str(r["tokens_into_first_block"]), f"{r['gmacs_per_clip']:.1f}",
            f"{r['ms_per_clip']:.0f}", f"{r['times_faster']:.2f}x",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
