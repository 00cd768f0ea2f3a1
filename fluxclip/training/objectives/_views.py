"""What the objectives share: every view of the clips against the captions of all ranks.

Shape legend: V views (token budgets, the largest first), B pairs of this rank, N pairs of all
ranks, R clips that this rank computes (B or N), C captions of a chunk, K kinds of labels, D shared
width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluxclip.distributed import gather_rows, rank

LOGITS_AT_ONCE = 2**24  # 64 MiB in fp32; columns of a larger matrix go through in chunks

Chunk = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class ViewsAgainstText(nn.Module, ABC):
    """Mean of the views' contrast with the captions, and smaller views drawn to the largest.

    Flux-Multi (arXiv 2503.14237): the total adds `align` times the distance of the smaller views
    to the largest, which is not pulled towards them. Every rank has equally many pairs; the mean
    over ranks of the loss and of its gradients is that of one process with all pairs.
    """

    def forward(
        self, views_BD: Sequence[Tensor], text_BD: Tensor, scale: Tensor, labels_BK: Tensor, *,
        align: float, negatives: Literal["local", "full"],
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The loss of a step, and its parts by name for the log, scalars without a graph.

        views_BD: unit vectors of this rank's clips, one tensor per budget, the largest budget
        first; text_BD: of their captions; both fp32 or fp64, outside autocast. scale:
        1 / temperature. labels_BK: int64; the caption of pair i is right for the clip of pair j,
        and the other way round, if they are equal in any column.
        negatives: what a rank computes, "local" its own clips against all captions, "full" the
        same whole matrix on every rank. Parts: contrast_0 to contrast_V-1, align where it counts,
        and recall, the share (0-1) of this rank's clips, in the largest view, whose best caption
        is a right one.
        """
        text_ND, labels_NK = gather_rows(text_BD), gather_rows(labels_BK)
        full = negatives == "full"
        losses, hits = [], []
        for view_BD in views_BD:
            loss, hit_R = self.contrast(
                scale * (gather_rows(view_BD) if full else view_BD), text_ND,
                labels_NK if full else labels_BK, labels_NK,
            )  # fmt: skip
            losses.append(loss)
            hits.append(hit_R)
        total = torch.stack(losses).mean()
        parts = {f"contrast_{i}": value for i, value in enumerate(losses)}
        if align and len(views_BD) > 1:
            largest_BD = views_BD[0].detach()
            distance = torch.stack([alignment(view, largest_BD) for view in views_BD[1:]]).mean()
            total = total + align * distance
            parts["align"] = distance
        first = rank() * len(text_BD) if full else 0
        parts["recall"] = hits[0][first : first + len(text_BD)].to(total.dtype).mean()
        return total, {name: part.detach() for name, part in parts.items()}

    @abstractmethod
    def contrast(
        self, view_RD: Tensor, text_ND: Tensor, labels_RK: Tensor, labels_NK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """This rank's loss of a view times the scale, and bool (R,): is the best caption right?"""


def alignment(view_BD: Tensor, largest_BD: Tensor) -> Tensor:
    """Mean of 1 - cosine between unit vectors of a smaller and the largest budget."""
    return (1 - (view_BD * largest_BD).sum(-1)).mean()


def by_columns(
    chunk: Chunk, text_ND: Tensor, labels_NK: Tensor, *, num_rows: int
) -> list[tuple[Tensor, ...]]:
    """What `chunk(text_CD, labels_CK)` gives for all captions, LOGITS_AT_ONCE logits at a time.

    Each of several chunks is computed again in the backward pass, so that none of them is kept.
    """
    size = max(1, LOGITS_AT_ONCE // num_rows)
    if size >= len(text_ND):
        return [chunk(text_ND, labels_NK)]
    return [
        checkpoint(chunk, *columns, use_reentrant=False, preserve_rng_state=False)
        for columns in zip(text_ND.split(size), labels_NK.split(size), strict=True)
    ]


def are_right(labels_RK: Tensor, labels_CK: Tensor) -> Tensor:
    """bool (R, C): which clips and captions belong together, by any of their labels."""
    right_RC = labels_RK[:, None, 0] == labels_CK[None, :, 0]
    for k in range(1, labels_RK.shape[1]):
        right_RC |= labels_RK[:, None, k] == labels_CK[None, :, k]
    return right_RC


def best(logits_RC: Tensor, right_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the largest logit, and whether it is a right one."""
    best_R1, column_R1 = logits_RC.detach().max(1, keepdim=True)
    return best_R1[:, 0], right_RC.gather(1, column_R1)[:, 0]


def best_of_chunks(best_R: Sequence[Tensor], right_R: Sequence[Tensor]) -> Tensor:
    """bool (R,): whether the largest of the chunks' best logits, the first of equals, is right."""
    largest_R, is_right_R = best_R[0], right_R[0]
    for next_R, next_is_right_R in zip(best_R[1:], right_R[1:], strict=True):
        is_right_R = torch.where(next_R > largest_R, next_is_right_R, is_right_R)
        largest_R = torch.maximum(largest_R, next_R)
    return is_right_R
