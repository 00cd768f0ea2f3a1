"""Objective `contrastive`: InfoNCE, a clip against all captions and a caption against all clips.

Shape legend: B pairs of this rank, N pairs of all ranks, R clips that this rank computes (B or N),
C captions of a chunk, K kinds of labels, W ranks, D shared width.
"""

from functools import reduce

import torch
from torch import Tensor, nn

from fluxclip.distributed import exchange_rows
from fluxclip.training.objectives._views import (
    ViewsAgainstText,
    are_right,
    best,
    best_of_chunks,
    by_columns,
)


def make() -> nn.Module:
    """The objective; it has no parameters."""
    return InfoNCE()


class InfoNCE(ViewsAgainstText):
    """Symmetric InfoNCE: cross-entropy of scaled cosines, over texts and over videos, averaged.

    Several right answers share the target equally (the parent system's soft targets for equal
    samples, arXiv 2403.15377).
    """

    def contrast(
        self, view_RD: Tensor, text_ND: Tensor, labels_RK: Tensor, labels_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean over this rank's pairs of both cross-entropies; (R,) whether the best is right.

        A rank computes the rows of its clips only. What they hold of the sum of a caption's
        column goes to the rank whose caption it is, so no logit is computed by two ranks.
        """

        def chunk(text_CD: Tensor, labels_CK: Tensor) -> tuple[Tensor, ...]:
            logits_RC = view_RD @ text_CD.T
            right_RC = are_right(labels_RK, labels_CK)
            inside_RC = logits_RC.masked_fill(~right_RC, 0)
            return (
                logits_RC.logsumexp(1), logits_RC.logsumexp(0),
                inside_RC.sum(1), inside_RC.sum(0), right_RC.sum(1),
                *best(logits_RC, right_RC),
            )  # fmt: skip

        chunks = by_columns(chunk, text_ND, labels_NK, num_rows=len(view_RD))
        rows, columns, inside_rows, inside_columns, right, best_R, best_is_right = zip(
            *chunks, strict=True
        )
        columns_N, inside_columns_N = torch.cat(columns), torch.cat(inside_columns)
        if len(view_RD) < len(text_ND):
            parts_N2 = exchange_rows(torch.stack([columns_N, inside_columns_N], 1))
            columns_WR, inside_columns_WR = parts_N2.unflatten(0, (-1, len(view_RD))).unbind(-1)
            columns_R, inside_columns_R = columns_WR.logsumexp(0), inside_columns_WR.sum(0)
        else:  # all rows are here, so the columns are whole
            columns_R, inside_columns_R = columns_N, inside_columns_N
        inside_R = reduce(torch.add, inside_rows) + inside_columns_R
        # labels are of pairs: clip i has as many right captions as caption i right clips
        right_R = reduce(torch.add, right)
        loss = (reduce(torch.logaddexp, rows) + columns_R - inside_R / right_R).mean() / 2
        return loss, best_of_chunks(best_R, best_is_right)
