"""Retrieval score and cost against token budget: the headline curve."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fluxclip.evaluation import facts
from fluxclip.evaluation.captions import clean_up
from fluxclip.evaluation.embeddings import EvaluatedModel, Progress, embed_texts, embed_videos
from fluxclip.evaluation.protocols import RetrievalTask
from fluxclip.evaluation.ranking import (
    CaptionGallery,
    Ints,
    Ranks,
    RetrievalRanks,
    chance,
    paired_bootstrap,
    retrieval_ranks,
)
from fluxclip.evaluation.record import (
    Bounds,
    BudgetResult,
    Chance,
    Change,
    DualSoftmax,
    Means,
    Record,
    Score,
    Scores,
)


def evaluate(
    model: EvaluatedModel,
    task: RetrievalTask,
    *,
    budgets: Sequence[int | None] = (None,),
    caption_gallery: CaptionGallery = "all",
    clean_captions: bool = False,
    dual_softmax_temperature: float = 1.0,
    cache: Path | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Record:
    """Score a model on a retrieval task at several token budgets.

    Texts are embedded once, clips are decoded once per distinct grid and embedded once per
    budget; the processes of one job share the work. Videos that cannot be read at some budget are
    left out at all of them, with their texts: the record lists them and is not called by the
    protocol's name alone. clean_captions: read as `captions.clean_up` makes them. cache: a folder
    of vectors, with which a stopped evaluation goes on. `on_progress(done, total)` is called as
    clips are embedded. Raises ValueError that names the video or text whose vector is not finite
    or not of unit length, if no video can be read, or for a budget below 1.
    """
    budgets = facts.check_budgets(budgets)
    if dual_softmax_temperature <= 0:
        raise ValueError(f"dual softmax temperature must be > 0, got {dual_softmax_temperature}")
    if clean_captions:
        task = replace(task, texts=[clean_up(text) for text in task.texts])
    text_MD, embed_text_s = embed_texts(model, task.texts, cache=cache)
    embedded = embed_videos(model, task.videos, budgets, cache=cache, on_progress=on_progress)

    broken = facts.broken_videos(task, embedded)
    keep_N = np.array([video not in broken for video in task.ids])
    keep_M = keep_N[task.video_of_text_M]
    new_index_N = np.cumsum(keep_N) - 1
    video_of_text_M = new_index_N[task.video_of_text_M[keep_M]]
    texts = [text for text, is_kept in zip(task.texts, keep_M, strict=True) if is_kept]
    num_videos = int(keep_N.sum())
    # what is searched with a video, and how many of it are right
    num_gallery, num_right_N = len(texts), np.bincount(video_of_text_M)
    if caption_gallery == "best":
        num_gallery, num_right_N = num_videos, np.ones_like(num_right_N)

    def ranks(budget: int | None, *, temperature: float | None = None) -> RetrievalRanks:
        return retrieval_ranks(
            embedded[budget].vectors_ND[keep_N], text_MD[keep_M], video_of_text_M,
            caption_gallery=caption_gallery, dual_softmax_temperature=temperature,
        )  # fmt: skip

    def scores(found: RetrievalRanks, *, than: RetrievalRanks | None = None) -> Scores:
        return Scores(
            text_to_video=_score(
                found.text_to_video, num_videos, group_Q=video_of_text_M, seed=seed,
                than=None if than is None else than.text_to_video,
            ),
            video_to_text=_score(
                found.video_to_text, num_gallery, group_Q=np.arange(num_videos), seed=seed,
                than=None if than is None else than.video_to_text,
            ),
        )  # fmt: skip

    first = ranks(budgets[0])
    results = []
    for budget in budgets:
        is_first = budget == budgets[0]
        plain = first if is_first else ranks(budget)
        dual = DualSoftmax(
            temperature=dual_softmax_temperature,
            scores=scores(ranks(budget, temperature=dual_softmax_temperature)),
        )
        results.append(
            BudgetResult(
                **facts.cost(model, budget, embedded[budget]),
                cosine=scores(plain, than=None if is_first else first),
                dual_softmax=dual,
            )
        )
    return Record(
        created=facts.now(),
        model=facts.model_facts(model),
        data=facts.data_facts(task, broken, model, texts, clean_up=clean_captions),
        captions=task.captions,
        caption_gallery=caption_gallery,
        chance=Chance(
            text_to_video=Means.of(chance(np.ones(len(texts)), num_videos)),
            video_to_text=Means.of(chance(num_right_N, num_gallery)),
        ),
        results=results,
        embed_text_s=embed_text_s,
        seed=seed,
        environment=facts.environment(model),
    )


def _score(
    ranks: Ranks, num_gallery: int, *, group_Q: Ints, seed: int, than: Ranks | None
) -> Score:
    """Numbers of one direction; captions of one video are drawn together in the intervals."""
    change = None
    if than is not None:
        paired = paired_bootstrap(
            100 * ranks.reciprocal_Q(), 100 * than.reciprocal_Q(), group_Q=group_Q, seed=seed
        )
        change = Change(mean=paired.mean, low=paired.low, high=paired.high)
    return Score(
        **Means.of(ranks).model_dump(),
        num_queries=len(ranks),
        num_gallery=num_gallery,
        r1_interval=Bounds.of(ranks.recall_Q(1), group_Q=group_Q, seed=seed),
        r5_interval=Bounds.of(ranks.recall_Q(5), group_Q=group_Q, seed=seed),
        r10_interval=Bounds.of(ranks.recall_Q(10), group_Q=group_Q, seed=seed),
        mrr_interval=Bounds.of(ranks.reciprocal_Q(), group_Q=group_Q, seed=seed),
        mrr_change=change,
        ranks=ranks.mean_Q().tolist(),
        ties=ranks.ties(),
    )
