"""Objective `sigmoid`: SigLIP, each clip and caption on its own: do they belong together?

Shape legend: N pairs of all ranks, R clips that this rank computes, C captions of a chunk, K kinds
of labels, D shared width.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxclip.training.objectives._views import (
    ViewsAgainstText,
    are_right,
    best,
    best_of_chunks,
    by_columns,
)


def make() -> nn.Module:
    """The objective with its bias, one number that is trained."""
    return Sigmoid()


class Sigmoid(ViewsAgainstText):
    """SigLIP (arXiv 2303.15343, equation 1): -log sigmoid(z (scale * cosine + bias)) of all pairs.

    Summed over captions, averaged over clips; z is 1 for all that belong together, else -1.
    """

    def __init__(self) -> None:
        super().__init__()
        # the paper's start: nearly all pairs are wrong, and the first steps need not learn that
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def contrast(
        self, view_RD: Tensor, text_ND: Tensor, labels_RK: Tensor, labels_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean over the clips of their sums over all captions; (R,) whether the best is right."""

        def chunk(text_CD: Tensor, labels_CK: Tensor) -> tuple[Tensor, ...]:
            logits_RC = view_RD @ text_CD.T + self.bias
            right_RC = are_right(labels_RK, labels_CK)
            sums_R = F.softplus(torch.where(right_RC, -logits_RC, logits_RC)).sum(1)
            return sums_R, *best(logits_RC, right_RC)

        chunks = by_columns(chunk, text_ND, labels_NK, num_rows=len(view_RD))
        sums_R, best_R, best_is_right = zip(*chunks, strict=True)
        return reduce(torch.add, sums_R).mean(), best_of_chunks(best_R, best_is_right)
