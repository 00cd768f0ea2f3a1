"""Objective `contrastive`: every budget's view against the text, smaller views against the largest.

Shape legend: V views (token budgets, the largest first), B pairs, D shared width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def loss(
    views_BD: Sequence[Tensor], text_BD: Tensor, scale: Tensor, same_BB: Tensor, *, align: float
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a step, and its parts by name for the log.

    views_BD: unit vectors of the same clips, one tensor per budget, the largest budget first.
    text_BD: unit vectors of their captions. scale: 1 / temperature. same_BB: bool, True where
    caption j is right for clip i (the diagonal at least).
    Flux-Multi (arXiv 2503.14237): the mean of the views' InfoNCE plus `align` times the distance
    of the smaller views to the largest, which is not pulled towards them.
    """
    target_BB = same_BB / same_BB.sum(1, keepdim=True)
    losses = [info_nce(view_BD, text_BD, scale, target_BB) for view_BD in views_BD]
    total = torch.stack(losses).mean()
    parts = {f"contrast_{i}": value.item() for i, value in enumerate(losses)}
    if align and len(views_BD) > 1:
        largest_BD = views_BD[0].detach()
        distance = torch.stack([alignment(view, largest_BD) for view in views_BD[1:]]).mean()
        total = total + align * distance
        parts["align"] = distance.item()
    return total, parts


def info_nce(video_BD: Tensor, text_BD: Tensor, scale: Tensor, target_BB: Tensor) -> Tensor:
    """Symmetric InfoNCE: cross-entropy of scaled cosines, over texts and over videos, averaged.

    target_BB: rows of non-negative weights that sum to 1; symmetric positives keep it right for
    both directions (the parent system's soft targets for equal samples, arXiv 2403.15377).
    """
    logits_BB = scale * video_BD @ text_BD.T
    to_text = F.cross_entropy(logits_BB, target_BB)
    to_video = F.cross_entropy(logits_BB.T, target_BB)
    return (to_text + to_video) / 2


def alignment(view_BD: Tensor, largest_BD: Tensor) -> Tensor:
    """Mean of 1 - cosine between unit vectors of a smaller and the largest budget."""
    return (1 - (view_BD * largest_BD).sum(-1)).mean()
