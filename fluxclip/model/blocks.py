"""Transformer block and poolings: FluxViT's (arXiv 2503.14237), and those of other anatomies.

Tokens come dense, (B, K, D), or packed, (S, D) with the clips' `Segments`.
Shape legend: B clips, K tokens of each, S tokens of all, D width.
"""

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
    """Self-attention with FluxViT's full-width q/k norm and local position term LPE, or without.

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

    def forward(self, x: Tensor, segments: Segments | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        out = attend(self.q_norm(q), self.k_norm(k), v, heads=self.heads, segments=segments)
        if self.has_lpe:
            out = out + torch.addcmul(self.lpe_shift, v, self.lpe_scale)
        return self.proj(out)


class Block(nn.Module):
    """Pre-norm block with drop path drawn once per clip; the shape stays.

    layer_scale: initial value of LayerScale, where the anatomy has it.
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

    def forward(
        self, x: Tensor, segments: Segments | None = None, *, draws: Draws | None = None
    ) -> Tensor:
        """draws: of the clips, for drop path; without them torch's generator draws."""
        attended = self.attn(self.norm1(x), segments)
        x = self._add(x, attended, self.ls1, segments, draws and draws.at(0))
        return self._add(x, self.mlp(self.norm2(x)), self.ls2, segments, draws and draws.at(1))

    def _add(
        self, x: Tensor, branch: Tensor, scale: Tensor | None, segments: Segments | None,
        draws: Draws | None,
    ) -> Tensor:  # fmt: skip
        if self.training and self.drop_path:
            # stochastic depth (arXiv 1603.09382): a clip keeps the branch or loses it whole
            num_clips = len(x) if segments is None else len(segments)
            drawn_B1 = draws.uniform(1) if draws else torch.rand(num_clips, 1, device=x.device)
            kept_B1 = drawn_B1 >= self.drop_path
            kept = kept_B1[:, None] if segments is None else kept_B1[segments.clip_S]
            branch = branch * (kept / (1 - self.drop_path)).to(branch.dtype)
        if scale is None:
            return x + branch
        # autocast keeps LayerScale's product in the precision of the residual stream
        return torch.addcmul(x, branch.to(x.dtype), scale.to(x.dtype))


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
