"""Vectors of a task's videos and texts: shared by the processes of a job, kept for the next run.

The work is cut into batches of fixed content. A process does every world_size-th of them, and a
batch whose vectors lie in the cache is not computed again, so that a stopped run goes on. However
it was shared and wherever it was stopped, a batch holds the same videos, and so the same vectors
come out. Shape legend: N videos, M texts, D width.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from fluxclip import distributed
from fluxclip.evaluation.ranking import first_not_finite
from fluxclip.video import Clip, read_clip

Vectors = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

_CLIPS_AT_ONCE = 32  # decoded frames held in memory
_TEXTS_AT_ONCE = 1024


class EvaluatedModel(Protocol):
    """The members of an embedder that evaluation uses.

    `fit`, `macs`, `scorer`, `filter`, `clip_costs`, `text_limit` and `are_cut` too where it has
    them.
    """

    name: str
    fingerprint: str
    dim: int

    @property
    def logit_scale(self) -> float: ...
    def num_tokens(self, num_frames: int, side: int) -> int: ...
    def grid(self, token_budget: int | None = None) -> tuple[int, int]: ...
    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> Vectors: ...
    def embed_text(self, texts: Sequence[str]) -> Vectors: ...


@dataclass
class Embedded:
    """Vectors (N, D) of all videos at one budget, and what they took.

    `decode_s` and `embed_s` are added up over processes and over the runs that filled the cache.
    The rows of videos that cannot be read, by their index in `broken` with the reason, are zero.
    costs_N2: tokens and multiply-accumulates of each video, where a filter makes them differ.
    """

    vectors_ND: Vectors
    decode_s: float = 0.0
    embed_s: float = 0.0
    broken: dict[int, str] = field(default_factory=dict)
    costs_N2: npt.NDArray[np.float64] | None = None


@dataclass
class _Batch:
    """Part of a result: the rows from `start` on."""

    start: int
    vectors: Vectors
    decode_s: float
    embed_s: float
    broken: dict[int, str]  # by the row in this batch
    costs: npt.NDArray[np.float64] | None = None


def embed_videos(
    model: EvaluatedModel,
    videos: Sequence[Path],
    budgets: Sequence[int | None],
    *,
    num_views: int = 1,
    cache: Path | None = None,
    on_progress: Progress | None = None,
) -> dict[int | None, Embedded]:
    """Embed every video at every budget; a clip is decoded once per distinct grid.

    num_views: clips per video, each of the grid's frames, interleaved in time; their vectors are
    averaged and made unit length. cache: a folder for the vectors, made as needed; they are found
    again for the same model, budget, grid, views and files (name, size and time of change), made
    by the same fluxclip and decoder on the same kind of device.
    `on_progress(done, total)` counts clips of this process. Raises ValueError that names the video
    whose vector is not finite or not of unit length.
    """
    require_same(
        [model.fingerprint, [str(b) for b in budgets], num_views, [v.name for v in videos]]
    )

    def work() -> dict[int | None, list[_Batch]]:
        return _own_batches(model, videos, budgets, num_views, cache, on_progress)

    shared = distributed.gather_results(work)
    return {
        budget: _joined([own[budget] for own in shared], len(videos), model.dim)
        for budget in budgets
    }


def _own_batches(
    model: EvaluatedModel,
    videos: Sequence[Path],
    budgets: Sequence[int | None],
    num_views: int,
    cache: Path | None,
    on_progress: Progress | None,
) -> dict[int | None, list[_Batch]]:
    """The batches that are this process's share."""
    starts = range(0, len(videos), _CLIPS_AT_ONCE)[distributed.rank() :: distributed.world_size()]
    total = len(budgets) * sum(len(videos[start : start + _CLIPS_AT_ONCE]) for start in starts)
    done = 0
    warm: set[int | None] = set()
    batches: dict[int | None, list[_Batch]] = {budget: [] for budget in budgets}
    for grid in dict.fromkeys(model.grid(budget) for budget in budgets):
        on_grid = [budget for budget in budgets if model.grid(budget) == grid]
        for start in starts:
            paths = videos[start : start + _CLIPS_AT_ONCE]
            states = _file_states(paths)
            files = {
                budget: _cache_file(cache, model, [grid, budget, num_views, states])
                for budget in on_grid
            }
            found = {budget: _load(file, start) for budget, file in files.items()}
            lacking = [budget for budget, batch in found.items() if batch is None]
            clips, decode_s = _read(paths, grid, model, num_views) if lacking else ([], 0.0)
            for budget in on_grid:
                batch = found[budget]
                if batch is None:
                    batch = _embed(model, paths, clips, start, budget, decode_s, budget in warm)
                    warm.add(budget)
                    if not batch.broken:  # what could not be read is tried again
                        _save(files[budget], batch)
                batches[budget].append(batch)
                done += len(paths)
                if on_progress is not None:
                    on_progress(done, total)
    return batches


def embed_texts(
    model: EvaluatedModel, texts: Sequence[str], *, cache: Path | None = None
) -> tuple[Vectors, float]:
    """Unit vectors (M, D) of texts and the seconds they took; `cache` as in `embed_videos`."""
    require_same([model.fingerprint, list(texts)])
    starts = range(0, len(texts), _TEXTS_AT_ONCE)[distributed.rank() :: distributed.world_size()]

    def work() -> list[_Batch]:
        return [
            _text_batch(model, texts[start : start + _TEXTS_AT_ONCE], start, cache)
            for start in starts
        ]

    joined = _joined(distributed.gather_results(work), len(texts), model.dim)
    return joined.vectors_ND, joined.embed_s


def require_same(what: list[Any]) -> None:
    """Raise ValueError if processes of one job are not at the same task."""
    digests = distributed.gather(hashlib.sha256(json.dumps(what).encode()).hexdigest())

    def check() -> None:
        if len(set(digests)) > 1:
            raise ValueError(
                "the processes do not see the same model, videos and texts: give each the same "
                "files, and change nothing while it runs"
            )

    distributed.gather_results(check)


def _text_batch(
    model: EvaluatedModel, texts: Sequence[str], start: int, cache: Path | None
) -> _Batch:
    file = _cache_file(cache, model, list(texts))
    batch = _load(file, start)
    if batch is None:
        begun = time.perf_counter()
        vectors = model.embed_text(texts)
        seconds = time.perf_counter() - begun
        _require_unit(vectors, [f"text {text!r}" for text in texts], model)
        batch = _Batch(start, vectors, 0.0, seconds, {})
        _save(file, batch)
    return batch


def _read(
    paths: Sequence[Path], grid: tuple[int, int], model: EvaluatedModel, num_views: int
) -> tuple[list[list[Clip] | str], float]:
    """Views of each file, or the reason why it cannot be read, and the seconds; a thread a core."""
    num_frames, side = grid
    fit: Literal["crop", "squash"] = getattr(model, "fit", "crop")

    def read(path: Path) -> list[Clip] | str:
        try:
            clip = read_clip(path, num_frames=num_frames * num_views, side=side, fit=fit)
        except (OSError, ValueError) as error:
            return str(error)
        # a still gives one view
        return [
            Clip(clip.frames_THWC[view::num_views], clip.times_s[view::num_views])
            for view in range(min(num_views, len(clip.times_s)))
        ]

    begun = time.perf_counter()
    with ThreadPoolExecutor(distributed.num_cores()) as pool:
        return list(pool.map(read, paths)), time.perf_counter() - begun


def _embed(
    model: EvaluatedModel,
    paths: Sequence[Path],
    clips: Sequence[list[Clip] | str],
    start: int,
    budget: int | None,
    decode_s: float,
    is_warm: bool,
) -> _Batch:
    """Embed the views of each file at a budget, averaged, in the order of the files."""
    vectors = np.zeros((len(paths), model.dim), dtype=np.float32)
    broken = {row: views for row, views in enumerate(clips) if isinstance(views, str)}
    read = [(row, own) for row, own in enumerate(clips) if not isinstance(own, str)]
    views = [(row, clip) for row, own in read for clip in own]
    costs = np.zeros((len(paths), 2)) if getattr(model, "filter", None) else None
    if not views:
        return _Batch(start, vectors, decode_s, 0.0, broken, costs)
    if not is_warm:  # the first call of a kind pays for set-up: not timed
        model.embed_video([views[0][1]], token_budget=budget)
    begun = time.perf_counter()
    of_views = model.embed_video([clip for _, clip in views], token_budget=budget)
    embed_s = time.perf_counter() - begun
    _require_unit(of_views, [str(paths[row]) for row, _ in views], model)
    if len(views) == len(read):
        vectors[[row for row, _ in views]] = of_views
    else:
        np.add.at(vectors, [row for row, _ in views], of_views)
        rows = [row for row, _ in read]
        vectors[rows] /= np.linalg.norm(vectors[rows], axis=1, keepdims=True)
    if costs is not None:
        of_clips = model.clip_costs([clip for _, clip in views], token_budget=budget)  # type: ignore[attr-defined]
        share = [1 / len(clips[row]) for row, _ in views]
        np.add.at(costs, [row for row, _ in views], np.array(of_clips) * np.array(share)[:, None])
    return _Batch(start, vectors, decode_s, embed_s, broken, costs)


def _require_unit(vectors: Vectors, names: Sequence[str], model: EvaluatedModel) -> None:
    """Raise ValueError that names the first vector that is not finite or not of unit length."""
    bad = first_not_finite(vectors)
    if bad is not None:
        raise ValueError(f"model {model.name} gives a vector with NaN or infinity for {names[bad]}")
    off = np.abs(np.linalg.norm(vectors, axis=1) - 1)
    if (off > 1e-3).any():
        raise ValueError(
            f"model {model.name} gives a vector that is not of unit length for "
            f"{names[int(np.argmax(off > 1e-3))]}"
        )


def _joined(of_ranks: Sequence[Sequence[_Batch]], num_rows: int, dim: int) -> Embedded:
    """The batches of all processes as one; every row must have come once."""
    seen = np.zeros(num_rows, dtype=np.int64)
    whole = Embedded(np.zeros((num_rows, dim), dtype=np.float32))
    for batch in itertools.chain.from_iterable(of_ranks):
        rows = slice(batch.start, batch.start + len(batch.vectors))
        seen[rows] += 1
        whole.vectors_ND[rows] = batch.vectors
        whole.decode_s += batch.decode_s
        whole.embed_s += batch.embed_s
        if batch.costs is not None:
            if whole.costs_N2 is None:
                whole.costs_N2 = np.zeros((num_rows, 2))
            whole.costs_N2[rows] = batch.costs
        whole.broken |= {batch.start + row: reason for row, reason in batch.broken.items()}
    if (seen != 1).any():
        row = int(np.argmax(seen != 1))
        raise RuntimeError(f"row {row} came {seen[row]} times from {len(of_ranks)} processes")
    return whole


def _file_states(paths: Sequence[Path]) -> list[str]:
    """What tells whether files are still those that were read; a lost one is read, and fails."""
    states = []
    for path in paths:
        try:
            stat = path.stat()
            states.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
        except OSError:
            states.append(f"{path} is not there")
    return states


def _cache_file(cache: Path | None, model: EvaluatedModel, content: list[Any]) -> Path | None:
    """Where the vectors of a batch with this content lie."""
    if cache is None:
        return None
    made_by = [version("fluxclip"), version("av"), str(getattr(model, "device", "cpu"))]
    key = json.dumps([model.fingerprint, made_by, content])
    return cache / model.fingerprint[:12] / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"


def _load(file: Path | None, start: int) -> _Batch | None:
    """A batch from the cache, None if it is not there or damaged."""
    if file is None or not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as held:
            broken = {int(row): reason for row, reason in json.loads(str(held["broken"])).items()}
            decode_s, embed_s = held["seconds"].tolist()
            costs = held["costs"]  # empty without a filter
            return _Batch(
                start, held["vectors"], decode_s, embed_s, broken, costs if len(costs) else None
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _save(file: Path | None, batch: _Batch) -> None:
    """Write a batch into the cache, in one step."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.stem}.{os.getpid()}.tmp")
    with unfinished.open("wb") as stream:
        np.savez(
            stream,
            vectors=batch.vectors,
            costs=np.empty((0, 2)) if batch.costs is None else batch.costs,
            seconds=np.array([batch.decode_s, batch.embed_s]),
            broken=np.array(json.dumps(batch.broken)),
        )
    unfinished.replace(file)
