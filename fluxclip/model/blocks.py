"""Transformer block and attention pooling of FluxViT (arXiv 2503.14237).

Shape legend: B clips, K tokens, D width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxclip.model.attention import attend
from fluxclip.tokens.tubelets import RMSNorm

Gelu = Literal["tanh", "erf"]


class Mlp(nn.Module):
    """Linear, GELU, linear: (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int, gelu: Gelu) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.approximate = "tanh" if gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Attention(nn.Module):
    """Self-attention with full-width q/k norm and the local position term LPE.

    q and k are normalised over all D channels, all heads together. LPE adds an affine map per
    channel of the values to the attended values: (softmax(q k^T / sqrt(d)) + diag) v.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width)
        self.k_norm = RMSNorm(width)
        self.lpe_scale = nn.Parameter(torch.ones(width))
        self.lpe_shift = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_BKD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BKD).chunk(3, dim=-1)
        out = attend(self.q_norm(q), self.k_norm(k), v, heads=self.heads)
        out = out + torch.addcmul(self.lpe_shift, v, self.lpe_scale)
        return self.proj(out)


class Block(nn.Module):
    """Pre-norm block with LayerScale and drop path drawn once per clip: (B, K, D) -> (B, K, D)."""

    def __init__(
        self, width: int, heads: int, *, mlp_ratio: float, gelu: Gelu, layer_scale: float,
        drop_path: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.ls1 = nn.Parameter(torch.full((width,), layer_scale))
        self.norm2 = RMSNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), gelu)
        self.ls2 = nn.Parameter(torch.full((width,), layer_scale))
        self.drop_path = drop_path

    def forward(self, x_BKD: Tensor) -> Tensor:
        x_BKD = self._add(x_BKD, self.attn(self.norm1(x_BKD)), self.ls1)
        return self._add(x_BKD, self.mlp(self.norm2(x_BKD)), self.ls2)

    def _add(self, x_BKD: Tensor, branch_BKD: Tensor, scale: Tensor) -> Tensor:
        if self.training and self.drop_path:
            # stochastic depth (arXiv 1603.09382): a clip keeps the branch or loses it whole
            keep = 1 - self.drop_path
            kept_B11 = torch.rand(x_BKD.shape[0], 1, 1, device=x_BKD.device) < keep
            branch_BKD = branch_BKD * (kept_B11 / keep).to(branch_BKD.dtype)
        # autocast keeps LayerScale's product in the precision of the residual stream
        return torch.addcmul(x_BKD, branch_BKD.to(x_BKD.dtype), scale.to(x_BKD.dtype))


class AttentionPool(nn.Module):
    """Attention pooling: the mean token asks, all tokens answer. (B, K, D) -> (B, pooled)."""

    def __init__(self, width: int, heads: int, pooled: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, pooled)

    def forward(self, x_BKD: Tensor) -> Tensor:
        q = self.q(self.norm_q(x_BKD.mean(1, keepdim=True)))
        k, v = self.k(self.norm_k(x_BKD)), self.v(self.norm_v(x_BKD))
        return self.proj(attend(q, k, v, heads=self.heads))[:, 0]
