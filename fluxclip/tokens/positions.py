"""Global positions: one learnable table, interpolated to any number of frames and any side.

Shape legend: N time steps, h w patches along height and width, D width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sincos_3d(num_steps: int, rows: int, columns: int, width: int) -> Tensor:
    """Fixed 3-D sine-cosine table (num_steps, rows, columns, width).

    The first width/4 channels encode time, the other 3/4 space: half of them the column, half the
    row, each as [sin | cos] with frequencies 10000^(-i/(d/2)) (FluxViT, InternVideo2).
    """

    def encode(positions: Tensor, d: int) -> Tensor:
        omega = 10000 ** (-torch.arange(d // 2, dtype=torch.float64) / (d // 2))
        angle = positions.double()[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1).float()

    if width % 16:
        raise ValueError(f"a 3-D sine-cosine table needs a width divisible by 16, got {width}")
    d_time, d_axis = width // 4, width // 8 * 3
    shape = (num_steps, rows, columns)
    time = encode(torch.arange(num_steps), d_time)[:, None, None].expand(*shape, d_time)
    column = encode(torch.arange(columns), d_axis)[None, None].expand(*shape, d_axis)
    row = encode(torch.arange(rows), d_axis)[None, :, None].expand(*shape, d_axis)
    return torch.cat([time, column, row], dim=-1)


class GlobalPositions(nn.Module):
    """Global position embedding (FluxViT "GPE"): (N, h, w) -> table (N * h * w, D).

    The table is affinely mapped per channel, then interpolated: linearly over time, then bicubic
    over space, each only if that size differs (compared per dimension, since 6 x 36 x 36 and
    24 x 18 x 18 have equally many entries). In eval, without gradients, the result is kept per
    grid until the parameters change or `train` or `eval` is called.
    affine: False for a table that is used as it is. one_step: "mean" gives a single time step the
    mean of the table over time (InternVideo2's images), of which "interpolated" takes the middle.
    """

    def __init__(
        self, num_steps: int, side: int, width: int, *, affine: bool = True,
        one_step: Literal["interpolated", "mean"] = "interpolated",
    ) -> None:  # fmt: skip
        super().__init__()
        self.table = nn.Parameter(sincos_3d(num_steps, side, side, width))
        self.affine, self.one_step = affine, one_step
        if affine:
            self.scale = nn.Parameter(torch.ones(width))
            self.shift = nn.Parameter(torch.zeros(width))
        self._cache: dict[tuple[int, int, int], Tensor] = {}
        self._cache_key: tuple[object, ...] = ()

    def train(self, mode: bool = True) -> "GlobalPositions":
        # fused optimizers change parameters without raising _version
        self._cache = {}
        return super().train(mode)

    def forward(self, num_steps: int, rows: int, columns: int) -> Tensor:
        if self.training or torch.is_grad_enabled() or self.table.is_inference():
            return self._interpolate(num_steps, rows, columns)
        # in-place edits raise _version; moving to another device or dtype changes data_ptr
        key = tuple((p._version, p.data_ptr(), p.dtype) for p in self.parameters())
        if key != self._cache_key:
            self._cache, self._cache_key = {}, key
        grid = (num_steps, rows, columns)
        if grid not in self._cache:
            self._cache[grid] = self._interpolate(*grid)
        return self._cache[grid]

    def _interpolate(self, num_steps: int, rows: int, columns: int) -> Tensor:
        table_NhwD = self.table * self.scale + self.shift if self.affine else self.table
        x_NhwD = table_NhwD.float()
        n0, h0, w0, d = x_NhwD.shape
        if num_steps == 1 and self.one_step == "mean":
            x_NhwD = x_NhwD.mean(0, keepdim=True)
        elif num_steps != n0:
            x = x_NhwD.reshape(n0, -1).T[None]
            x = F.interpolate(x, size=num_steps, mode="linear", align_corners=False)
            x_NhwD = x[0].T.reshape(num_steps, h0, w0, d)
        if (rows, columns) != (h0, w0):
            x = x_NhwD.permute(0, 3, 1, 2)
            x = F.interpolate(x, size=(rows, columns), mode="bicubic", align_corners=False)
            x_NhwD = x.permute(0, 2, 3, 1)
        return x_NhwD.reshape(-1, d).to(self.table.dtype)
