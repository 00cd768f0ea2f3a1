"""Distillation: tokens learn a teacher's features where they lie, the pooled vector their mean.

Shape legend: V views (token budgets), B clips, S tokens kept of all of them, L tokens of a clip,
P pooled width, W token width, C teacher channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxclip.model.fluxclip import View


class Distillation(nn.Module):
    """Heads from a tower's tokens and its pooled vector to a teacher's features.

    They are trained with the model and left behind with the run. Aligning every kept token with
    the teacher at its place is the unmasked-token alignment of UMT (arXiv 2303.16058), which
    Flux-UMT (arXiv 2503.14237, 3.3) does at several budgets.
    """

    def __init__(self, *, token_width: int, pooled_width: int, channels: int) -> None:
        super().__init__()
        self.token_head = nn.Sequential(nn.LayerNorm(token_width), nn.Linear(token_width, channels))
        self.pooled_head = nn.Linear(pooled_width, channels)

    def forward(self, views: Sequence[View], teacher_BLC: Tensor) -> Tensor:
        """Mean over views of 1 - cosine to the teacher: of the tokens plus of the pooled vector.

        Shape (B,): per clip, so that batches of several shapes can be averaged.
        """
        teacher_BLC = teacher_BLC.float()
        mean_BC = teacher_BLC.mean(1)
        losses = []
        for view in views:
            cells_S = view.selection.cells(teacher_BLC.shape[1])
            kept_SC = teacher_BLC.flatten(0, 1).index_select(0, cells_S)
            token_S = F.cosine_similarity(self.token_head(view.tokens_SW), kept_SC, dim=-1)
            token_B = _mean_per_clip(token_S, view.selection.lengths)
            pooled_B = F.cosine_similarity(self.pooled_head(view.pooled_BP), mean_BC, dim=-1)
            losses.append(2 - token_B - pooled_B)
        return torch.stack(losses).mean(0)


def _mean_per_clip(x_S: Tensor, lengths: Sequence[int]) -> Tensor:
    if len(set(lengths)) == 1:
        return x_S.view(len(lengths), -1).mean(1)
    return torch.stack([part.mean() for part in x_S.split(list(lengths))])
