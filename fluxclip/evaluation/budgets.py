"""Score and cost against token budget: the headline curve, as a record that describes itself."""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from fluxclip.evaluation.protocols import Captions, RetrievalTask
from fluxclip.evaluation.ranking import (
    Floats,
    Ints,
    Ranks,
    RetrievalRanks,
    bootstrap_interval,
    chance,
    first_not_finite,
    paired_bootstrap,
    retrieval_ranks,
)
from fluxclip.video import Clip, read_clip

_CLIPS_AT_ONCE = 32  # decoded frames held in memory
_PACKAGES = ("fluxclip", "torch", "numpy", "av", "transformers", "open_clip_torch")


class EvaluatedModel(Protocol):
    """The members of an embedder that evaluation uses; `fit` and `macs` too where it has them."""

    name: str
    fingerprint: str
    dim: int

    @property
    def logit_scale(self) -> float: ...
    def num_tokens(self, num_frames: int, side: int) -> int: ...
    def grid(self, token_budget: int | None = None) -> tuple[int, int]: ...
    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> npt.NDArray[np.float32]: ...
    def embed_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...


class _Facts(BaseModel):
    """Read-only, and strict about what a file may hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Bounds(_Facts):
    """A 95 % confidence interval."""

    low: float
    high: float


class Means(_Facts):
    """R@k in percent, MRR times 100, ranks from 1; ties as `ranking` has them."""

    r1: float
    r5: float
    r10: float
    mrr: float
    median_rank: float
    mean_rank: float


class Change(Bounds):
    """A mean difference with its 95 % interval."""

    mean: float


class Score(Means):
    """One direction with 95 % intervals and the rank of every query.

    `mrr_change` is MRR minus that of the record's first budget, query by query: a paired bootstrap,
    in which queries that are hard at every budget cancel out. The first budget has none.

    `ranks` is in the order of the task's texts (text-to-video) or videos (video-to-text); where
    the query is tied it is the mean rank, and `num_tied` counts such queries.
    """

    num_queries: int
    num_gallery: int
    r1_interval: Bounds
    r5_interval: Bounds
    r10_interval: Bounds
    mrr_interval: Bounds
    mrr_change: Change | None = None
    num_tied: int
    ranks: list[float]


class Scores(_Facts):
    """Both directions."""

    text_to_video: Score
    video_to_text: Score


class Chance(_Facts):
    """What guessing scores in both directions."""

    text_to_video: Means
    video_to_text: Means


class DualSoftmax(_Facts):
    """Scores after `ranking.dual_softmax`; not comparable with plain cosines."""

    temperature: float
    scores: Scores


class BudgetResult(_Facts):
    """Scores and cost at one token budget; None is all tokens of the model's default grid.

    `num_tokens` enter the tower of the `grid_tokens` that the grid has (a clip with fewer frames
    has fewer). `macs` are multiply-accumulates of the video tower per clip, embedding of dropped
    tokens included, None if the model does not say. `decode_s` (a thread per core) and `embed_s`
    are wall seconds for the whole set; budgets that share a grid share its decoding.
    """

    token_budget: int | None
    num_tokens: int
    grid_tokens: int
    num_frames: int
    side: int
    macs: int | None
    decode_s: float
    embed_s: float
    cosine: Scores
    dual_softmax: DualSoftmax


class ModelFacts(_Facts):
    """Which model was scored."""

    name: str
    fingerprint: str
    dim: int
    logit_scale: float


class DataFacts(_Facts):
    """What it was scored on. `num_repeated_texts` texts are word for word those of another."""

    name: str
    path: str
    sha256: str
    captions: Captions
    num_videos: int
    num_texts: int
    num_repeated_texts: int


class Record(_Facts):
    """One evaluation: model, data, what guessing scores there, a result per budget, versions.

    `seed` is that of the bootstrap intervals, the only random numbers in an evaluation.
    """

    format: Literal["fluxclip-evaluation-1"] = "fluxclip-evaluation-1"
    created: str
    model: ModelFacts
    data: DataFacts
    chance: Chance
    results: list[BudgetResult]
    embed_text_s: float
    seed: int
    environment: dict[str, str]


def evaluate(
    model: EvaluatedModel,
    task: RetrievalTask,
    *,
    budgets: Sequence[int | None] = (None,),
    dual_softmax_temperature: float = 1.0,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Score a model on a retrieval task at several token budgets.

    Texts are embedded once, clips are decoded once per distinct grid and embedded once per
    budget. A video that cannot be read ends the evaluation: left out, it would make the gallery
    smaller and the numbers better. `on_progress(done, total)` is called as clips are embedded.
    Raises ValueError that names the video or text whose vector is not finite or not of unit
    length, the video that cannot be read, or the budget below 1.
    """
    budgets = list(dict.fromkeys(budgets))
    if not budgets:
        raise ValueError("no token budget to evaluate at; give at least one (None is all tokens)")
    for budget in budgets:
        if budget is not None and budget < 1:
            raise ValueError(f"a token budget must be at least 1, got {budget}")
    if dual_softmax_temperature <= 0:
        raise ValueError(f"dual softmax temperature must be > 0, got {dual_softmax_temperature}")

    start = time.perf_counter()
    text_MD = model.embed_text(task.texts)
    embed_text_s = time.perf_counter() - start
    _require_unit(text_MD, [f"text {text!r}" for text in task.texts], model)
    embedded = _embed_videos(model, task, budgets, on_progress or (lambda done, total: None))
    first = retrieval_ranks(embedded[budgets[0]].vectors_ND, text_MD, task.video_of_text_M)

    return Record(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=ModelFacts(
            name=model.name,
            fingerprint=model.fingerprint,
            dim=model.dim,
            logit_scale=float(model.logit_scale),
        ),
        data=_data_facts(task),
        chance=Chance(
            text_to_video=_means(chance(np.ones(len(task.texts)), len(task.videos))),
            video_to_text=_means(chance(np.bincount(task.video_of_text_M), len(task.texts))),
        ),
        results=[
            _result(
                model,
                task,
                budget=budget,
                embedded=embedded[budget],
                text_MD=text_MD,
                first=None if budget == budgets[0] else first,
                temperature=dual_softmax_temperature,
                seed=seed,
            )
            for budget in budgets
        ],
        embed_text_s=embed_text_s,
        seed=seed,
        environment=_environment(),
    )


@dataclass
class _Embedded:
    """Vectors of all videos at one budget, filled piece by piece, and the seconds it took."""

    vectors_ND: npt.NDArray[np.float32]
    decode_s: float = 0.0
    embed_s: float = 0.0


def _embed_videos(
    model: EvaluatedModel,
    task: RetrievalTask,
    budgets: Sequence[int | None],
    on_progress: Callable[[int, int], None],
) -> dict[int | None, _Embedded]:
    """Embed every video at every budget; a clip is decoded once per distinct grid."""
    num_videos = len(task.videos)
    embedded = {
        budget: _Embedded(np.empty((num_videos, model.dim), dtype=np.float32)) for budget in budgets
    }
    done = 0
    for grid in dict.fromkeys(model.grid(budget) for budget in budgets):
        on_grid = [budget for budget in budgets if model.grid(budget) == grid]
        for first in range(0, num_videos, _CLIPS_AT_ONCE):
            rows = slice(first, first + _CLIPS_AT_ONCE)
            start = time.perf_counter()
            clips = _read(task, task.videos[rows], grid, getattr(model, "fit", "crop"))
            decode_s = time.perf_counter() - start
            for budget in on_grid:
                if first == 0:  # the first call of a kind pays for set-up: not timed
                    model.embed_video(clips[:1], token_budget=budget)
                start = time.perf_counter()
                vectors = model.embed_video(clips, token_budget=budget)
                embedded[budget].embed_s += time.perf_counter() - start
                embedded[budget].decode_s += decode_s
                _require_unit(vectors, [str(path) for path in task.videos[rows]], model)
                embedded[budget].vectors_ND[rows] = vectors
                done += len(clips)
                on_progress(done, len(budgets) * num_videos)
    return embedded


def _read(
    task: RetrievalTask,
    paths: Sequence[Path],
    grid: tuple[int, int],
    fit: Literal["crop", "squash"],
) -> list[Clip]:
    """Decode files at a grid, one thread per core."""
    num_frames, side = grid

    def read(path: Path) -> Clip:
        return read_clip(path, num_frames=num_frames, side=side, fit=fit)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            return list(pool.map(read, paths))
        except (OSError, ValueError) as error:
            pool.shutdown(cancel_futures=True)
            raise ValueError(
                f"cannot score {task.name}: {error}; every video of the set must be readable"
            ) from error


def _result(
    model: EvaluatedModel,
    task: RetrievalTask,
    *,
    budget: int | None,
    embedded: _Embedded,
    text_MD: npt.NDArray[np.float32],
    first: RetrievalRanks | None,
    temperature: float,
    seed: int,
) -> BudgetResult:
    """Scores and cost at one budget."""
    num_frames, side = model.grid(budget)
    grid_tokens = model.num_tokens(num_frames, side)
    macs = getattr(model, "macs", None)
    vectors = (embedded.vectors_ND, text_MD, task.video_of_text_M)
    plain = retrieval_ranks(*vectors)
    dual = retrieval_ranks(*vectors, dual_softmax_temperature=temperature)
    return BudgetResult(
        token_budget=budget,
        num_tokens=grid_tokens if budget is None else min(budget, grid_tokens),
        grid_tokens=grid_tokens,
        num_frames=num_frames,
        side=side,
        macs=None if macs is None else macs(num_frames, side, budget),
        decode_s=embedded.decode_s,
        embed_s=embedded.embed_s,
        cosine=_scores(task, plain, seed, first=first),
        dual_softmax=DualSoftmax(temperature=temperature, scores=_scores(task, dual, seed)),
    )


def _data_facts(task: RetrievalTask) -> DataFacts:
    """What a task is, with the checksum of its file."""
    return DataFacts(
        name=task.name,
        path=str(task.source),
        sha256=hashlib.sha256(task.source.read_bytes()).hexdigest(),
        captions=task.captions,
        num_videos=len(task.videos),
        num_texts=len(task.texts),
        num_repeated_texts=len(task.texts) - len(set(task.texts)),
    )


def _require_unit(
    vectors: npt.NDArray[np.float32], names: Sequence[str], model: EvaluatedModel
) -> None:
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


def _scores(
    task: RetrievalTask, found: RetrievalRanks, seed: int, *, first: RetrievalRanks | None = None
) -> Scores:
    """Numbers of both directions, with intervals over videos; `first` is what to compare with."""
    return Scores(
        text_to_video=_score(
            found.text_to_video, len(task.videos), group_Q=task.video_of_text_M, seed=seed,
            first=None if first is None else first.text_to_video,
        ),
        video_to_text=_score(
            found.video_to_text, len(task.texts), group_Q=np.arange(len(task.videos)), seed=seed,
            first=None if first is None else first.video_to_text,
        ),
    )  # fmt: skip


def _score(
    ranks: Ranks, num_gallery: int, *, group_Q: Ints, seed: int, first: Ranks | None
) -> Score:
    """Numbers of one direction; captions of one video are drawn together in the intervals."""

    def bounds(values_Q: Floats) -> Bounds:
        interval = bootstrap_interval(100 * values_Q, group_Q=group_Q, seed=seed)
        return Bounds(low=interval.low, high=interval.high)

    change = None
    if first is not None:
        paired = paired_bootstrap(
            100 * ranks.reciprocal_Q(), 100 * first.reciprocal_Q(), group_Q=group_Q, seed=seed
        )
        change = Change(mean=paired.mean, low=paired.low, high=paired.high)
    return Score(
        **_means(ranks).model_dump(),
        num_queries=len(ranks),
        num_gallery=num_gallery,
        r1_interval=bounds(ranks.recall_Q(1)),
        r5_interval=bounds(ranks.recall_Q(5)),
        r10_interval=bounds(ranks.recall_Q(10)),
        mrr_interval=bounds(ranks.reciprocal_Q()),
        mrr_change=change,
        num_tied=int(np.count_nonzero(ranks.tied_Q)),
        ranks=ranks.mean_Q().tolist(),
    )


def _means(ranks: Ranks) -> Means:
    """The numbers that need no drawing."""
    return Means(
        r1=ranks.recall(1),
        r5=ranks.recall(5),
        r10=ranks.recall(10),
        mrr=ranks.mrr,
        median_rank=ranks.median_rank,
        mean_rank=ranks.mean_rank,
    )


def _environment() -> dict[str, str]:
    """Versions and machine; nothing is imported to find them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    found["machine"] = f"{platform.system()} {platform.machine()}"
    found["cpus"] = str(os.cpu_count())
    return found
