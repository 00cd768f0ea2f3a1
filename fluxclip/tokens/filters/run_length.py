"""Filter `run_length`: what stands still is one token, however long (RLT, arXiv 2411.05222).

Shape legend: B clips, T frames, H W pixels, N time steps (tubelets), L patches per step
(row-major), h w patches along height and width.
"""

from typing import Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from fluxclip.settings import settings


@settings
class Settings:
    """When a tubelet counts as the same as an earlier one.

    threshold: of the mean absolute difference of normalised pixels, in units of their standard
    deviation; 0.1 is the paper's, about 6 of 255 grey levels.
    anchor: what a tubelet is compared with. "previous" is the paper's, the step before, which lets
    a slow fade drift away unnoticed; "last_kept" is the token that stands for the run.
    noise_floor: what is taken off every pixel's difference first, in the same units, not below
    zero. Sensor noise of s grey levels needs about s / 20: without it, noise of 6 levels keeps
    every token of a video that stands still.
    """

    threshold: NonNegativeFloat = 0.1
    anchor: Literal["previous", "last_kept"] = "previous"
    noise_floor: NonNegativeFloat = 0.0


@torch.no_grad()
def keep(
    frames_BTHWC: Tensor, settings: Settings, *, patch: int, tubelet: int
) -> tuple[Tensor, Tensor]:
    """Which tubelets are kept, bool (B, N, L), and how long their runs are, int64 (B, N, L).

    A tubelet is kept where its last frame differs from the first frame of the one it is compared
    with by more than the threshold, on average over pixels and channels of the patch; the first
    always is. The runs of a place add up to N; dropped tubelets have run length 0.
    """
    first_BNhwP = _patches(frames_BTHWC[:, ::tubelet], patch)
    # of a last tubelet that is not full, the last frame there is
    t = frames_BTHWC.shape[1]
    ends = torch.arange(tubelet - 1, t + tubelet - 1, tubelet).clamp(max=t - 1)
    last_BNhwP = _patches(frames_BTHWC[:, ends.to(frames_BTHWC.device)], patch)

    def differs(last: Tensor, first: Tensor) -> Tensor:
        difference = (last - first).abs()
        if settings.noise_floor:
            difference = (difference - settings.noise_floor).clamp(min=0)
        return difference.mean(-1) > settings.threshold

    n = first_BNhwP.shape[1]
    if settings.anchor == "previous":
        changed = differs(last_BNhwP[:, 1:], first_BNhwP[:, :-1])
        mask = torch.cat([torch.ones_like(changed[:, :1]), changed], dim=1) if n > 1 else None
    else:
        anchor, steps = first_BNhwP[:, 0], []
        for i in range(1, n):
            changed = differs(last_BNhwP[:, i], anchor)
            anchor = torch.where(changed[..., None], first_BNhwP[:, i], anchor)
            steps.append(changed)
        mask = torch.stack([torch.ones_like(steps[0]), *steps], dim=1) if steps else None
    if mask is None:  # a single step
        mask = torch.ones(first_BNhwP.shape[:-1], dtype=torch.bool, device=frames_BTHWC.device)
    mask_BNL = mask.flatten(2)
    return mask_BNL, run_lengths(mask_BNL)


def run_lengths(mask_BNL: Tensor) -> Tensor:
    """Steps from each kept token to the next kept one at its place, or the end; 0 where dropped."""
    n = mask_BNL.shape[1]
    step_N1 = torch.arange(n, device=mask_BNL.device)[:, None]
    kept_at = torch.where(mask_BNL, step_N1, n)
    from_here = kept_at.flip(1).cummin(1).values.flip(1)
    next_kept = torch.cat([from_here[:, 1:], torch.full_like(from_here[:, :1], n)], dim=1)
    return torch.where(mask_BNL, next_kept - step_N1, 0)


def _patches(frames_BNHWC: Tensor, patch: int) -> Tensor:
    """fp32 pixel vectors (B, N, h, w, patch * patch * 3) of one frame per step."""
    b, n, h, w, c = frames_BNHWC.shape
    x = frames_BNHWC.float().reshape(b, n, h // patch, patch, w // patch, patch, c)
    return x.permute(0, 1, 2, 4, 3, 5, 6).flatten(4)
