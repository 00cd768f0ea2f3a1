"""Zero-shot classification: a video belongs to the class whose name fits it best."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fluxclip.evaluation import facts
from fluxclip.evaluation.captions import clean_up
from fluxclip.evaluation.embeddings import EvaluatedModel, Progress, embed_texts, embed_videos
from fluxclip.evaluation.protocols import ClassificationTask
from fluxclip.evaluation.ranking import COSINE_DECIMALS, Ranks, ranks
from fluxclip.evaluation.record import (
    Accuracy,
    Bounds,
    ClassBudgetResult,
    ClassificationRecord,
)

# The sixteen of InternVideo2's evaluation, which FluxViT's continues.
TEMPLATES = (
    "a photo of action {}",
    "a picture of action {}",
    "Human action of {}",
    "{}, an action",
    "{} this is an action",
    "{}, a video of action",
    "Playing action of {}",
    "{}",
    "Playing a kind of action, {}",
    "Doing a kind of action, {}",
    "Look, the human is {}",
    "Can you recognize the action of {}?",
    "Video classification of {}",
    "A video of {}",
    "The man is {}",
    "The woman is {}",
)


def classify(
    model: EvaluatedModel,
    task: ClassificationTask,
    *,
    budgets: Sequence[int | None] = (None,),
    templates: Sequence[str] = TEMPLATES,
    num_views: int = 1,
    clean_captions: bool = False,
    cache: Path | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> ClassificationRecord:
    """Score a model on naming the class of videos at several token budgets.

    A class scores the mean cosine of the video with each template filled with the class's name (as
    InternVideo2 has it: texts are of unit length one by one, not their mean). num_views: clips per
    video, interleaved in time, whose vectors are averaged. Everything else as `budgets.evaluate`.
    Raises ValueError for templates without exactly one `{}` and for num_views below 1.
    """
    budgets = facts.check_budgets(budgets)
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"a template needs {{}} once, where the class goes: {template!r}")
    if not templates or num_views < 1:
        raise ValueError("classification needs at least one template and one view")
    texts = [template.replace("{}", name) for name in task.classes for template in templates]
    if clean_captions:
        texts = [clean_up(text) for text in texts]
    text_MD, embed_text_s = embed_texts(model, texts, cache=cache)
    class_CD = text_MD.astype(np.float64).reshape(len(task.classes), len(templates), -1).mean(1)
    embedded = embed_videos(
        model, task.videos, budgets, num_views=num_views, cache=cache, on_progress=on_progress
    )
    broken = facts.broken_videos(task, embedded)
    keep_N = np.array([video not in broken for video in task.ids])
    is_right_NC = task.class_of_video_N[keep_N][:, None] == np.arange(len(task.classes))
    results = []
    for budget in budgets:
        cosine_NC = embedded[budget].vectors_ND[keep_N].astype(np.float64) @ class_CD.T
        found = ranks(np.round(cosine_NC, COSINE_DECIMALS), is_right_NC)
        results.append(
            ClassBudgetResult(
                **facts.cost(model, budget, embedded[budget]),
                accuracy=_accuracy(found, seed=seed),
                ranks=found.mean_Q().tolist(),
                ties=found.ties(),
            )
        )
    return ClassificationRecord(
        created=facts.now(),
        model=facts.model_facts(model),
        data=facts.data_facts(task, broken, model, texts, clean_up=clean_captions),
        num_classes=len(task.classes),
        templates=list(templates),
        num_views=num_views,
        results=results,
        embed_text_s=embed_text_s,
        seed=seed,
        environment=facts.environment(model),
    )


def _accuracy(found: Ranks, *, seed: int) -> Accuracy:
    """Top-1 and top-5 with intervals over videos."""
    videos_Q = np.arange(len(found))
    return Accuracy(
        top1=found.recall(1),
        top5=found.recall(5),
        top1_interval=Bounds.of(found.recall_Q(1), group_Q=videos_Q, seed=seed),
        top5_interval=Bounds.of(found.recall_Q(5), group_Q=videos_Q, seed=seed),
    )
