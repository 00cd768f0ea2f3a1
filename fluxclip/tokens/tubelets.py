"""Pixels to patch vectors: tubelets with dual patch norm.

Shape legend: B clips, T frames, H W pixels, N time steps (T / tubelet), L patches per time step
(row-major), P values per tubelet, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tubelets(frames_BTHWC: Tensor, *, patch: int, tubelet: int = 1) -> Tensor:
    """Cut frames into pixel vectors (B, N, L, P), each ordered (frame, row, column, channel).

    frames_BTHWC is normalised float. H and W must be multiples of `patch` (ValueError otherwise);
    T need not be a multiple of `tubelet`: the last frame fills the last tubelet, so that a still
    is one tubelet.
    """
    b, t, h, w, c = frames_BTHWC.shape
    if h % patch or w % patch or not h or not w:
        raise ValueError(f"frames of {h} x {w} pixels do not divide into patches of {patch} pixels")
    if t == 0:
        raise ValueError("a clip needs at least one frame, got none")
    if missing := -t % tubelet:
        fill = frames_BTHWC[:, -1:].expand(b, missing, h, w, c)
        frames_BTHWC = torch.cat([frames_BTHWC, fill], dim=1)
    x = frames_BTHWC.reshape(b, -1, tubelet, h // patch, patch, w // patch, patch, c)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(b, x.shape[1], (h // patch) * (w // patch), -1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 whatever the input is."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class PatchEmbedding(nn.Module):
    """Tubelets to patch vectors, with a norm before and after (dual patch norm) or without.

    FluxViT (arXiv 2503.14237), modules "DPN": RMSNorm over the pixel values of a patch, a linear
    map to the width, RMSNorm over the width. Pixel vectors (..., P) -> (..., D).
    """

    def __init__(
        self, width: int, *, patch: int = 14, tubelet: int = 1, norm: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        num_values = tubelet * patch * patch * 3
        self.norm_before = RMSNorm(num_values) if norm else nn.Identity()
        self.proj = nn.Linear(num_values, width, bias=bias)
        self.norm = RMSNorm(width) if norm else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.norm(self.proj(self.norm_before(pixels)))
