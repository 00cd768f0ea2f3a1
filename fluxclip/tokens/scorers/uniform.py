"""Scorer `uniform`: an even spread over time and space, whatever is in the picture."""

import torch
from torch import Tensor

from fluxclip.tokens.draws import Draws

# the golden ratio's relatives for two dimensions: multiples of (1/p, 1/p^2) modulo 1 cover the
# unit square evenly for every prefix, p being the plastic number (Roberts' R2 sequence)
_PLASTIC = 1.32471795724474602596


def score(patches_BNLD: Tensor, *, draws: Draws | None = None) -> Tensor:
    """Scores (B, N, L) in (0, 1) that are equal for all clips and ignore the patch vectors."""
    b, n, length, _ = patches_BNLD.shape
    device = patches_BNLD.device
    step = torch.arange(n, dtype=torch.float64, device=device)[:, None]
    place = torch.arange(length, dtype=torch.float64, device=device)[None]
    value_NL = (step / _PLASTIC**2 + place / _PLASTIC) % 1.0
    return value_NL.float().expand(b, n, length)
