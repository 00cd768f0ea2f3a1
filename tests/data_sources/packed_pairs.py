"""Packed pairs as tests see them: a server for them, the steps they give, copies to spoil."""

import json
from collections import Counter
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.sources import Records
from fluxclip.data.workers import steps
from fluxclip.tokens.budget import FluxSampling

SAMPLING = FluxSampling((2, 3, 1), (28, 56, 28), (4, 64), (16, 8))
SHARD_MB = 0.12  # four or five clips


class Site(NamedTuple):
    url: str
    folder: Path
    asked: Counter[str]
    failing: Counter[str]  # how often yet to break off in the middle of a file
    whole: set[str]  # files that are sent whole, whatever part is asked for


class Handler(SimpleHTTPRequestHandler):
    asked: Counter[str]
    failing: Counter[str]
    whole: set[str]

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        path = Path(self.translate_path(self.path))
        span = self.headers.get("Range", "")
        self.asked[name] += span != "bytes=0-0"
        span = "" if name in self.whole else span
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        start, _, stop = span.removeprefix("bytes=").partition("-")
        part = content[int(start or 0) : int(stop) + 1 if stop else None]
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{stop}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.failing[name] > 0 and span != "bytes=0-0":
            self.failing[name] -= 1
            part = part[: len(part) // 2]
            self.close_connection = True
        self.wfile.write(part)

    def log_message(self, *arguments: object) -> None:
        pass


def made(
    records: Records, *, start: int = 0, stop: int = 6, workers: int = 0
) -> list[list[torch.Tensor]]:
    """The frames of steps: all six are more than an epoch."""
    data = Steps([Source(records, 3)], SAMPLING, Augment(), seed=1)
    found = list(steps(data, start=start, stop=stop, workers=workers))
    assert not any(step.unreadable for step in found)
    return [[batch.frames_BTHWC for batch in step.batches] for step in found]


def same(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return all(
        torch.equal(x, y)
        for step, other in zip(a, b, strict=True)
        for x, y in zip(step, other, strict=True)
    )


def same_pairs(a: Records, b: Records) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert (x.captions, x.family, x.is_still) == (y.captions, y.family, y.is_still)
        known, other = a.info(i), b.info(i)
        assert known.path == x.video
        assert (known.duration_s, known.width, known.num_frames, known.fps, known.is_image) == (
            other.duration_s, other.width, other.num_frames, other.fps, other.is_image
        )  # fmt: skip
        frames, others = (records.clip(i, num_frames=2, side=32) for records in (a, b))
        assert np.array_equal(frames.frames_THWC, others.frames_THWC)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copied(packed: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def changed(folder: Path, **values: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **values}))
