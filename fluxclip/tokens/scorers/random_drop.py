"""Scorer `random_drop`: token dropout (Turbo training, arXiv 2210.04889; FLIP, 2212.00794)."""

import torch
from torch import Tensor

from fluxclip.tokens.draws import Draws


def score(patches_BNLD: Tensor, *, draws: Draws | None = None) -> Tensor:
    """Random scores (B, N, L) in [0, 1).

    With draws (training) every clip has its own. Without (evaluation) a fixed draw,
    the same for every clip, so that a clip's vector depends on that clip alone.
    """
    b, n, length, _ = patches_BNLD.shape
    if draws is not None:
        return draws.uniform(n, length)
    fixed = torch.rand(n, length, generator=torch.Generator().manual_seed(0))
    return fixed.to(patches_BNLD.device).expand(b, n, length)
