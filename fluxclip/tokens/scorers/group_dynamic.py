"""Scorer `group_dynamic`: what changes most within each group of neighbouring frames.

FluxViT (arXiv 2503.14237, section on token selection): contiguous groups of frames, within a
group the L2 distance between a patch vector and the one before it at the same place; the first
frame of a group takes the distance of the second. Every group keeps equally many tokens.

Shape legend: B clips, N time steps, L patches per time step, D width.
"""

import torch
from torch import Tensor

from fluxclip.tokens.draws import Draws
from fluxclip.tokens.scorers import uniform


def group_sizes(num_steps: int) -> list[int]:
    """Time steps per group: 4 groups if divisible by 4, else 2, as in the paper.

    Where that would leave a group with a single step, which has no neighbour to differ from,
    fewer groups are made: 4 steps are 2 groups of 2; 1, 2 and 3 steps are one group. Odd numbers,
    which the official code refuses, give groups that differ by one step.
    """
    num_groups = 4 if num_steps % 4 == 0 else 2
    while num_groups > 1 and num_steps // num_groups < 2:
        num_groups //= 2
    small, larger = divmod(num_steps, num_groups)
    return [small + (i < larger) for i in range(num_groups)]


def official_budget(budget: int, num_steps: int, patches_per_step: int) -> int:
    """Tokens the official code really keeps of `budget`: its float ratio truncates per group.

    Only needed to compare with official outputs; our selection keeps the budget exactly.
    """
    sizes = group_sizes(num_steps)
    ratio = 1 - budget / (num_steps * patches_per_step)
    return len(sizes) * int((1 - ratio) * (num_steps // len(sizes)) * patches_per_step)


def score(patches_BNLD: Tensor, *, draws: Draws | None = None) -> Tensor:
    """Scores (B, N, L) in (-1, 0]: minus the share of its group that changes more.

    Scoring by rank within the group makes one `take` over the clip keep the same share of every
    group. Ties between groups go to the earlier group; equal distances within one, the guaranteed
    ones of its first two frames included, to the earlier position. A single time step changes
    nothing: its patches score as `uniform`.
    """
    b, n, length, _ = patches_BNLD.shape
    if n == 1:
        return uniform.score(patches_BNLD) - 1.0
    x = patches_BNLD.detach().float()
    moved_BNL = (x[:, 1:] - x[:, :-1]).square().sum(-1)
    scores, start = [], 0
    for size in group_sizes(n):
        change = moved_BNL[:, start : start + size - 1]
        change = torch.cat([change[:, :1], change], dim=1).flatten(1)
        order = change.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank.scatter_(1, order, places)
        scores.append(-(rank.double() / order.shape[1]).view(b, size, length))
        start += size
    return torch.cat(scores, dim=1)
