"""Scorer `random_drop`: token dropout (Turbo training, arXiv 2210.04889; FLIP, 2212.00794)."""

import torch
from torch import Tensor


def score(patches_BNLD: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Random scores (B, N, L) in [0, 1).

    With a generator (training) every clip draws its own. Without one (evaluation) a fixed draw,
    the same for every clip, so that a clip's vector depends on that clip alone.
    """
    b, n, length, _ = patches_BNLD.shape
    if generator is not None:
        drawn = torch.rand(b, n, length, generator=generator, device=generator.device)
        return drawn.to(patches_BNLD.device)
    fixed = torch.rand(n, length, generator=torch.Generator().manual_seed(0))
    return fixed.to(patches_BNLD.device).expand(b, n, length)
