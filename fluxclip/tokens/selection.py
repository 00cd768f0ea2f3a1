"""Keeping a budget of tokens: scores in, positions out.

Shape legend: B clips, N time steps, L patches per time step, K kept tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """Positions kept of each clip, ascending, in the flattened order (time, row, column).

    index: int64 (sum of lengths,), the clips one after the other, each counting from 0.
    lengths: tokens kept per clip.
    """

    index: Tensor
    lengths: tuple[int, ...]

    @property
    def index_BK(self) -> Tensor:
        """The index as (B, K); only where every clip keeps equally many (ValueError otherwise)."""
        if len(set(self.lengths)) > 1:
            raise ValueError(f"clips keep different numbers of tokens: {self.lengths}")
        return self.index.view(len(self.lengths), -1)

    def cells(self, num_cells: int) -> Tensor:
        """The index as int64 (sum of lengths,) among the cells of all clips, `num_cells` each."""
        lengths = torch.tensor(self.lengths)
        first_B = torch.arange(len(self.lengths)) * num_cells
        first_S = first_B.repeat_interleave(lengths).to(self.index.device, non_blocking=True)
        return self.index + first_S

    def __repr__(self) -> str:
        return f"Selection(clips={len(self.lengths)}, lengths={self.lengths})"


def check_budget(budget: int | None) -> None:
    """Raise ValueError unless the budget is None or a positive integer count of tokens."""
    if budget is None:
        return
    if isinstance(budget, bool) or not hasattr(budget, "__index__"):  # NumPy's integers are ones
        raise ValueError(f"a token budget is an integer count of tokens, got {budget!r}")
    if budget < 1:
        raise ValueError(f"a token budget must be 1 or more, got {budget}")


@torch.no_grad()
def take(
    score_BNL: Tensor, mask_BNL: Tensor | None = None, budget: int | None = None, *,
    available: Sequence[int] | None = None,
) -> Selection:  # fmt: skip
    """Keep the min(budget, unmasked) highest-scoring positions of each clip, exactly.

    score_BNL: finite floats, higher is kept first; of equal scores the earlier position.
    mask_BNL: bool, True where a token may be kept (what a filter left); None means everywhere.
    budget: tokens per clip, 1 or more (ValueError otherwise); None keeps all that are unmasked.
    available: unmasked tokens per clip where they are known, which spares waiting for the device.
    """
    check_budget(budget)
    score = score_BNL.flatten(1)
    b, n = score.shape
    if mask_BNL is None:
        available = [n] * b
    elif available is None:
        available = mask_BNL.flatten(1).sum(1).tolist()
    lengths = tuple(have if budget is None else min(budget, have) for have in available)
    if all(length == n for length in lengths):
        everything = torch.arange(n, device=score.device)
        return Selection(everything.repeat(b), lengths)
    if mask_BNL is not None:
        mask = mask_BNL.flatten(1)
        if lengths == tuple(available):  # all that are unmasked, however they score
            return Selection(torch.nonzero_static(mask, size=sum(lengths))[:, 1], lengths)
        score = score.masked_fill(~mask, float("-inf"))
    order_BN = score.argsort(dim=1, descending=True, stable=True)
    if len(set(lengths)) == 1:
        return Selection(order_BN[:, : lengths[0]].sort(dim=1).values.flatten(), lengths)
    kept = [order_BN[i, :length].sort().values for i, length in enumerate(lengths)]
    return Selection(torch.cat(kept), lengths)


def gather(x_BND: Tensor, selection: Selection) -> Tensor:
    """The selected tokens (B, K, D) of x_BND (B, N * L, D), in ascending order of position."""
    b, n, d = x_BND.shape
    index_BK = selection.index_BK
    if index_BK.shape[1] == n:
        return x_BND
    # one flat index_select: its backward is a plain index_add, several times faster on the CPU
    # than that of advanced indexing
    flat = (index_BK + torch.arange(b, device=index_BK.device)[:, None] * n).flatten()
    return x_BND.reshape(b * n, d).index_select(0, flat).view(b, -1, d)
