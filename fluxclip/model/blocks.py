"""Transformer block and poolings: FluxViT's (arXiv 2503.14237), and those of other anatomies.

Tokens come dense, (B, K, D), or packed, (S, D) with the clips' `Segments`.
Shape legend: B clips, K tokens of each, S tokens of all, D width.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxclip.model.attention import Segments, attend, attend_once
from fluxclip.model.presets import ANATOMIES, Anatomy, Gelu
from fluxclip.tokens.draws import Draws
from fluxclip.tokens.tubelets import RMSNorm

_FLUXVIT = ANATOMIES["fluxvit"]


def norm(width: int, anatomy: Anatomy) -> nn.Module:
    """The norm of an anatomy's blocks."""
    if anatomy.norm == "rms":
        return RMSNorm(width, anatomy.norm_eps)
    return nn.LayerNorm(width, anatomy.norm_eps)


class Mlp(nn.Module):
    """Linear, GELU, linear: (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int, gelu: Gelu) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.gelu == "quick":
            return self.fc2(x * torch.sigmoid(1.702 * x))
        return self.fc2(F.gelu(x, approximate="tanh" if self.gelu == "tanh" else "none"))


class Attention(nn.Module):
    """What is around self-attention: FluxViT's full-width q/k norm and local position term LPE.

    q and k are normalised over all D channels, all heads together. LPE adds an affine map per
    channel of the values to the attended values: (softmax(q k^T / sqrt(d)) + diag) v.
    """

    def __init__(self, width: int, heads: int, anatomy: Anatomy = _FLUXVIT) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=anatomy.qkv_bias)
        self.q_norm = RMSNorm(width) if anatomy.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width) if anatomy.qk_norm else nn.Identity()
        self.has_lpe = anatomy.local_positions
        if self.has_lpe:
            self.lpe_scale = nn.Parameter(torch.ones(width))
            self.lpe_shift = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def ahead(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys, and the values: what attention is over."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        # under autocast the norms give fp32, which attention would only have to make half again
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def behind(self, attended: Tensor, v: Tensor) -> Tensor:
        """The branch's output from attended values and the values themselves."""
        if self.has_lpe:
            attended = attended + torch.addcmul(self.lpe_shift, v, self.lpe_scale)
        return self.proj(attended)


class Block(nn.Module):
    """Pre-norm block with drop path drawn once per clip; the shape stays.

    layer_scale: initial value of LayerScale, where the anatomy has it. is_compiled: in training,
    what comes before and after attention runs as kernels that torch.compile makes. Attention has
    its own, and the lengths of packed clips, which differ from step to step, stay out of them: one
    compilation serves every grid and budget, and all blocks.
    """

    def __init__(
        self, width: int, heads: int, *, mlp_ratio: float, gelu: Gelu, layer_scale: float,
        drop_path: float, anatomy: Anatomy = _FLUXVIT,
    ) -> None:  # fmt: skip
        super().__init__()

        def scale() -> nn.Parameter | None:
            has = anatomy.layer_scale
            return nn.Parameter(torch.full((width,), layer_scale)) if has else None

        self.norm1 = norm(width, anatomy)
        self.attn = Attention(width, heads, anatomy)
        self.ls1 = scale()
        self.norm2 = norm(width, anatomy)
        self.mlp = Mlp(width, int(width * mlp_ratio), gelu)
        self.ls2 = scale()
        self.drop_path = drop_path
        self.is_compiled = False

    def forward(
        self, x: Tensor, segments: Segments | None = None, *, draws: Draws | None = None
    ) -> Tensor:
        """draws: of the clips, for drop path; without them torch's generator draws."""
        ahead, behind = Block._ahead, Block._behind
        if self.is_compiled and self.training:
            ahead, behind = _compiled(ahead), _compiled(behind)
        factors = [self._factor(x, segments, draws and draws.at(place)) for place in (0, 1)]
        q, k, v = ahead(self, x)
        attended = attend(q, k, v, heads=self.attn.heads, segments=segments)
        out: Tensor = behind(self, x, attended, v, *factors)
        return out

    def _ahead(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.attn.ahead(self.norm1(x))

    def _behind(
        self, x: Tensor, attended: Tensor, v: Tensor, factor_1: Tensor | None,
        factor_2: Tensor | None,
    ) -> Tensor:  # fmt: skip
        x = _add(x, self.attn.behind(attended, v), self.ls1, factor_1)
        return _add(x, self.mlp(self.norm2(x)), self.ls2, factor_2)

    def _factor(self, x: Tensor, segments: Segments | None, draws: Draws | None) -> Tensor | None:
        """Stochastic depth (arXiv 1603.09382): a clip keeps a branch, larger, or loses it whole.

        What the branch is multiplied by, (B, 1, 1) or (S, 1); None where nothing is dropped.
        """
        if not self.training or not self.drop_path:
            return None
        num_clips = len(x) if segments is None else len(segments)
        drawn_B1 = draws.uniform(1) if draws else torch.rand(num_clips, 1, device=x.device)
        kept_B1 = drawn_B1 >= self.drop_path
        kept = kept_B1[:, None] if segments is None else kept_B1[segments.clip_S]
        return kept / (1 - self.drop_path)


def _add(x: Tensor, branch: Tensor, scale: Tensor | None, factor: Tensor | None) -> Tensor:
    if factor is not None:
        branch = branch * factor.to(branch.dtype)
    if scale is None:
        return x + branch
    # autocast keeps LayerScale's product in the precision of the residual stream
    return torch.addcmul(x, branch.to(x.dtype), scale.to(x.dtype))


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled when it is first called, once for all lengths and numbers of clips."""
    return torch.compile(function, dynamic=True)


class AttentionPool(nn.Module):
    """Attention pooling: the mean token asks, all tokens answer. -> (B, pooled).

    count_S: how many tokens each one stands for (its run length): mean and answer are then those
    of a clip in which it is there so often.
    """

    def __init__(self, width: int, heads: int, pooled: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, pooled)

    def forward(
        self, x: Tensor, segments: Segments | None = None, count_S: Tensor | None = None
    ) -> Tensor:
        k, v = self.k(self.norm_k(x)), self.v(self.norm_v(x))
        if segments is None:
            q = self.q(self.norm_q(x.mean(1, keepdim=True)))
            return self.proj(attend(q, k, v, heads=self.heads)[:, 0])
        q = self.q(self.norm_q(_mean(x, segments, count_S)))
        answer = attend_once(q, k, v, heads=self.heads, segments=segments, count_S=count_S)
        return self.proj(answer)


class MapPool(nn.Module):
    """Multi-head attention pooling with a learned query, and an MLP behind it: -> (B, D).

    That of SigLIP. count_S as in `AttentionPool`.
    """

    def __init__(self, width: int, heads: int, *, mlp_ratio: float, gelu: Gelu, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), gelu)

    def forward(
        self, x: Tensor, segments: Segments | None = None, count_S: Tensor | None = None
    ) -> Tensor:
        q_D, k, v = self.q(self.query), self.k(x), self.v(x)
        if segments is None:
            q_B1D = q_D.expand(len(x), 1, -1)
            answer_BD = attend(q_B1D, k, v, heads=self.heads)[:, 0]
        else:
            q_BD = q_D.expand(len(segments), -1)
            answer_BD = attend_once(
                q_BD, k, v, heads=self.heads, segments=segments, count_S=count_S
            )
        pooled_BD = self.proj(answer_BD)
        return pooled_BD + self.mlp(self.norm(pooled_BD))


class ClassPool(nn.Module):
    """The class token, the first of every clip: -> (B, D)."""

    def forward(
        self, x: Tensor, segments: Segments | None = None, count_S: Tensor | None = None
    ) -> Tensor:
        return x[:, 0] if segments is None else x.index_select(0, segments.offsets[:-1])


class MeanPool(nn.Module):
    """The mean of the patches, without the class token: -> (B, D). count_S as above."""

    def forward(
        self, x: Tensor, segments: Segments | None = None, count_S: Tensor | None = None
    ) -> Tensor:
        if segments is None:
            return x[:, 1:].mean(1)
        if count_S is None:
            count_S = x.new_ones(len(x), dtype=torch.float32)
        # the class token counts for nothing
        count_S = count_S.index_fill(0, segments.offsets[:-1].long(), 0)
        return _mean(x, segments, count_S)


def _mean(x_SD: Tensor, segments: Segments, count_S: Tensor | None) -> Tensor:
    """Mean token of each clip (B, D), summed in fp32."""
    sums = x_SD.new_zeros(len(segments), x_SD.shape[1], dtype=torch.float32)
    if count_S is None:
        total_B1 = segments.offsets.diff()[:, None]
        summed_BD = sums.index_add(0, segments.clip_S, x_SD.float())
    else:
        count_S1 = count_S.float()[:, None]
        total_B1 = sums.new_zeros(len(segments), 1).index_add(0, segments.clip_S, count_S1)
        summed_BD = sums.index_add(0, segments.clip_S, x_SD.float() * count_S1)
    return (summed_BD / total_B1).to(x_SD.dtype)
