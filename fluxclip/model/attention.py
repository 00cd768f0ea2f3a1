"""The one place where an attention kernel is chosen, and where packed batches are described.

Shape legend: B clips, K queries, M keys, S tokens of all clips one after the other, H heads,
D width.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


class Segments:
    """Where each clip of a packed batch (S, D) begins and ends.

    lengths: tokens per clip, 1 or more. Made once per batch, so that what the kernels need
    of it is copied to the device once and not per block.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every clip of a packed batch needs a token, got {list(lengths)}")
        self.lengths = tuple(lengths)
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> Tensor:
        """int32 (B + 1,): where the clips begin, and where the last one ends."""
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32).to(
            self.device, non_blocking=True
        )

    @cached_property
    def clip_S(self) -> Tensor:
        """int64 (S,): which clip each token belongs to."""
        lengths_B = self.offsets.diff().long()
        clips_B = torch.arange(len(self), device=self.device)
        return clips_B.repeat_interleave(lengths_B, output_size=self.num_tokens)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(first token, number of clips, tokens of each) of neighbouring clips of equal length."""
        start = 0
        for length, clips in itertools.groupby(self.lengths):
            number = len(list(clips))
            yield start, number, length
            start += number * length


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, heads: int, segments: Segments | None = None
) -> Tensor:
    """Multi-head softmax(q k^T / sqrt(d)) v within each clip; no matrix of tokens x tokens is made.

    Dense: (B, K, D), (B, M, D), (B, M, D) -> (B, K, D). Packed, with `segments`: three times
    (S, D) -> (S, D), clips of different lengths one after the other and no padding. D is split
    into heads of d = D / heads channels. Packed batches take `torch.nn.attention.varlen` where it
    runs (CUDA, half precision), else one fused kernel per run of equally long clips.
    """
    if segments is None:
        return _dense(q, k, v, heads)
    if q.is_cuda and torch.is_autocast_enabled("cuda"):
        # autocast does so for torch's own attention only, and q/k norm gives fp32
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if q.is_cuda and q.dtype in _HALF:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(segments.lengths)
        q_SHd, k_SHd, v_SHd = (x.reshape(len(x), heads, -1) for x in (q, k, v))
        out = varlen_attn(q_SHd, k_SHd, v_SHd, segments.offsets, segments.offsets, longest, longest)
        assert isinstance(out, Tensor)
        return out.reshape(q.shape)
    outs = []
    for start, number, length in segments.runs():
        own = slice(start, start + number * length)
        q_BKD, k_BKD, v_BKD = (x[own].view(number, length, -1) for x in (q, k, v))
        outs.append(_dense(q_BKD, k_BKD, v_BKD, heads).flatten(0, 1))
    return torch.cat(outs)


def _dense(q_BKD: Tensor, k_BMD: Tensor, v_BMD: Tensor, heads: int) -> Tensor:
    b, k, d = q_BKD.shape

    def split(x_BND: Tensor) -> Tensor:
        return x_BND.view(b, -1, heads, d // heads).transpose(1, 2)

    out = F.scaled_dot_product_attention(split(q_BKD), split(k_BMD), split(v_BMD))
    return out.transpose(1, 2).reshape(b, k, d)


def attend_once(
    q_BD: Tensor, k_SD: Tensor, v_SD: Tensor, *, heads: int, segments: Segments,
    count_S: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One query per clip over that clip's tokens of a packed batch: (B, D).

    count_S: how many equal tokens each token stands for; it then weighs so much in the softmax,
    as if it were there so often. As cheap as one more channel mix: written out per token.
    """
    b, d = q_BD.shape
    clip_S = segments.clip_S
    # fp32 throughout: index_add, here and in the gradients, adds token after token, and a sum in
    # half precision stops growing after some hundred of them
    query_SD = (q_BD.float() * (d // heads) ** -0.5).index_select(0, clip_S)
    logits_SH = (query_SD * k_SD).view(-1, heads, d // heads).sum(-1)
    if count_S is not None:
        logits_SH = logits_SH + count_S.float().log()[:, None]
    at_SH = clip_S[:, None].expand(-1, heads)
    # the largest logit of a clip is taken away, as every softmax does; no gradient goes through it
    most_BH = logits_SH.new_full((b, heads), -torch.inf)
    most_BH = most_BH.scatter_reduce(0, at_SH, logits_SH.detach(), "amax")
    weight_SH = (logits_SH - most_BH.index_select(0, clip_S)).exp()
    total_BH = weight_SH.new_zeros(b, heads).index_add(0, clip_S, weight_SH)
    share_SH = weight_SH / total_BH.index_select(0, clip_S)
    mixed_SHd = share_SH[..., None] * v_SD.view(-1, heads, d // heads)
    return share_SH.new_zeros(b, d).index_add(0, clip_S, mixed_SHd.flatten(1)).to(v_SD.dtype)
