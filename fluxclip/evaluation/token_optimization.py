"""Token Optimization: for each token budget the grid with the lowest validation loss.

FluxViT (arXiv 2503.14237, 3.3) lets the grid (frames, side) grow beyond the budget and selects
tokens from it, but publishes no way to find the grid. Here every candidate is tried on validation
data, never on the data of a test. Shape legend: N videos, M texts, Q queries, G gallery items,
D width.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fluxclip.evaluation import facts
from fluxclip.evaluation.embeddings import (
    EvaluatedModel,
    Progress,
    Vectors,
    embed_texts,
    embed_videos,
)
from fluxclip.evaluation.protocols import RetrievalTask
from fluxclip.evaluation.ranking import retrieval_ranks
from fluxclip.video import Clip

FILE = "token_optimization.json"  # beside a model's config.json

Grid = tuple[int, int]  # (num_frames, side in pixels)
_LOSS_DECIMALS = 6  # losses equal to so many are ties: float32 vectors carry no more
_BLOCK = 2**22  # logits made at once


class GridModel(EvaluatedModel, Protocol):
    """An embedder that can be given the grid, and counts its work."""

    def macs(self, num_frames: int, side: int, token_budget: int | None = None) -> int: ...
    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None,
        grid: Grid | None = None,
    ) -> Vectors: ...  # fmt: skip


class Trial(BaseModel):
    """A budget at a grid: its validation loss, and the mean MRR (0-100) of both directions.

    grid_tokens: before selection. macs: multiply-accumulates per clip, none of whose tokens a
    filter drops.
    """

    token_budget: int
    num_frames: int
    side: int
    grid_tokens: int
    loss: float
    mrr: float
    macs: int
    chosen: bool = False


class TokenOptimization(BaseModel):
    """A search: the model before it, the data it was done on, every trial.

    files: name and SHA-256 of the annotations.
    """

    format: Literal["fluxclip-token-optimization-1"] = "fluxclip-token-optimization-1"
    created: str
    model: str
    fingerprint: str
    logit_scale: float
    files: dict[str, str]
    num_videos: int
    num_texts: int
    captions: str
    trials: list[Trial]
    environment: dict[str, str]

    @property
    def rows(self) -> list[tuple[int, int, int]]:
        """(token_budget, num_frames, side) of the chosen grids, as a grid table holds them."""
        return [(t.token_budget, t.num_frames, t.side) for t in self.trials if t.chosen]


def optimize(
    model: GridModel,
    task: RetrievalTask,
    candidates: Mapping[int, Sequence[Grid]],
    *,
    on_progress: Progress | None = None,
) -> TokenOptimization:
    """Try every candidate grid of every budget on a validation set and choose one per budget.

    candidates: (num_frames, side) by token budget. The lowest `validation_loss` wins; among equals
    (to six decimals) the grid of the least work, then of the fewest pixels. Clips are decoded once
    per grid; the processes of one job share the work. `on_progress(done, total)` counts clips.
    Raises ValueError for a budget below 1 or without candidates, a grid that is none of the model's
    or a video that cannot be read, FileNotFoundError for one that is missing.
    """
    facts.check_budgets(list(candidates))
    for budget, grids in candidates.items():
        if not grids:
            raise ValueError(f"no grid to try for a budget of {budget} tokens")
    if task.missing:
        raise FileNotFoundError(
            f"{task.sources[0]}: {len(task.missing)} of {task.num_expected} video files not found, "
            f"the first: {task.missing[0]}"
        )
    text_MD, _ = embed_texts(model, task.texts)
    right_NM = _right(task)
    num_trials = sum(len(set(grids)) for grids in candidates.values())
    trials: list[Trial] = []
    for grid in dict.fromkeys(grid for grids in candidates.values() for grid in grids):
        budgets = [budget for budget, grids in candidates.items() if grid in grids]
        grid_tokens = model.num_tokens(*grid)
        embedded = embed_videos(
            cast(EvaluatedModel, _AtGrid(model, grid)), task.videos, budgets,
            on_progress=on_progress and _within(on_progress, len(trials), len(budgets), num_trials),
        )  # fmt: skip
        for budget in budgets:
            if broken := embedded[budget].broken:
                raise ValueError(
                    f"{len(broken)} of {len(task.videos)} videos cannot be read, and the grids "
                    f"must be compared on the same ones; the first: {next(iter(broken.values()))}"
                )
            video_ND = embedded[budget].vectors_ND
            ranks = retrieval_ranks(video_ND, text_MD, task.video_of_text_M)
            trials.append(
                Trial(
                    token_budget=budget, num_frames=grid[0], side=grid[1], grid_tokens=grid_tokens,
                    loss=validation_loss(video_ND, text_MD, right_NM, model.logit_scale),
                    mrr=(ranks.text_to_video.mrr + ranks.video_to_text.mrr) / 2,
                    macs=model.macs(*grid, budget),
                )
            )  # fmt: skip
    # budgets in the order given, the cheapest grids first
    order = list(candidates)
    trials.sort(key=lambda trial: (order.index(trial.token_budget), *_cost(trial)))
    for budget in order:
        of_budget = [trial for trial in trials if trial.token_budget == budget]
        min(of_budget, key=lambda t: (round(t.loss, _LOSS_DECIMALS), *_cost(t))).chosen = True
    return TokenOptimization(
        created=facts.now(),
        model=model.name,
        fingerprint=model.fingerprint,
        logit_scale=model.logit_scale,
        files={
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in task.sources
        },
        num_videos=len(task.videos),
        num_texts=len(task.texts),
        captions=task.captions,
        trials=trials,
        environment=facts.environment(model),
    )  # fmt: skip


def validation_loss(
    video_ND: Vectors, text_MD: Vectors, right_NM: npt.NDArray[np.bool_], logit_scale: float
) -> float:
    """Symmetric InfoNCE of a whole set at the model's logit scale, in nats.

    The mean of two cross-entropies of scaled cosines: of each text's video among all videos, and of
    each video's texts among all texts. right_NM: which text is right for which video, at least one
    in each row and column; where several are right, the mean of their log probabilities counts.
    """
    texts = _cross_entropy(text_MD, video_ND, right_NM.T, logit_scale)
    videos = _cross_entropy(video_ND, text_MD, right_NM, logit_scale)
    return (texts + videos) / 2


def save(found: TokenOptimization, folder: Path) -> None:
    """Write a search into a model folder as token_optimization.json; an old one is replaced."""
    unfinished = folder / f"{FILE}.{os.getpid()}.tmp"
    unfinished.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / FILE)


def print_trials(found: TokenOptimization, console: Console) -> None:
    """Print every trial, a budget after the other; the chosen ones are marked."""
    title = f"validation loss on {', '.join(found.files)}, {found.num_videos} videos"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for head in ("budget", "grid", "tokens", "loss", "MRR", "GMAC", "chosen"):
        table.add_column(head, justify="left" if head in ("grid", "chosen") else "right")
    before = None
    for trial in found.trials:
        if before not in (None, trial.token_budget):
            table.add_section()
        before = trial.token_budget
        table.add_row(
            str(trial.token_budget), f"{trial.num_frames} x {trial.side} px",
            str(trial.grid_tokens), f"{trial.loss:.4f}", f"{trial.mrr:.1f}",
            f"{trial.macs / 1e9:.3g}", "*" if trial.chosen else "",
        )  # fmt: skip
    console.print(table)


class _AtGrid:
    """A model that uses one grid, whatever the budget; else as it is."""

    filter = None  # no costs clip by clip: they would be those of the model's own grid

    def __init__(self, model: GridModel, grid: Grid) -> None:
        self._model, self._grid = model, grid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def grid(self, token_budget: int | None = None) -> Grid:
        return self._grid

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> Vectors:
        return self._model.embed_video(videos, token_budget=token_budget, grid=self._grid)


def _within(on_progress: Progress, before: int, here: int, total: int) -> Progress:
    """The progress of `here` trials as that of all, `before` of which are done."""

    def advance(done: int, of: int) -> None:
        num_clips = of // here
        on_progress(before * num_clips + done, total * num_clips)

    return advance


def _cost(trial: Trial) -> tuple[int, int, int]:
    """What orders grids of equal loss: work of the model, then of decoding and resizing."""
    return trial.macs, trial.num_frames * trial.side**2, trial.num_frames


def _right(task: RetrievalTask) -> npt.NDArray[np.bool_]:
    """bool (N, M): which text is right for which video; one that several videos have, for all."""
    numbers: dict[str, int] = {}
    text_M = np.array([numbers.setdefault(text, len(numbers)) for text in task.texts])
    has_NU = np.zeros((len(task.videos), len(numbers)), dtype=bool)
    has_NU[task.video_of_text_M, text_M] = True
    return has_NU[:, text_M]


def _cross_entropy(
    query_QD: Vectors, gallery_GD: Vectors, right_QG: npt.NDArray[np.bool_], scale: float
) -> float:
    """Mean over the queries of minus the log probability of what is right, in double precision."""
    query_QD, gallery_GD = query_QD.astype(np.float64), gallery_GD.astype(np.float64)
    at_once = max(1, _BLOCK // len(gallery_GD))
    total = 0.0
    for start in range(0, len(query_QD), at_once):
        logits = scale * query_QD[start : start + at_once] @ gallery_GD.T
        right = right_QG[start : start + at_once]
        top = logits.max(axis=1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        total -= float(((log_p * right).sum(axis=1) / right.sum(axis=1)).sum())
    return total / len(query_QD)
