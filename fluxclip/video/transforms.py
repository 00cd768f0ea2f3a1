"""What is done to frames on the device: uint8 comes in, so that little crosses the bus.

Legend: B clips, T frames, H rows, W columns, C colours (RGB).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxclip.video.framing import Fit, Framing, pixel_span

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_float(
    frames_BTHWC: Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """uint8 frames 0-255 to float32 (x / 255 - mean) / std per colour, same shape and device."""
    _check_uint8(frames_BTHWC)
    mean_C = torch.tensor(mean, device=frames_BTHWC.device)
    std_C = torch.tensor(std, device=frames_BTHWC.device)
    return (frames_BTHWC.float() / 255 - mean_C) / std_C


def resize(frames_BTHWC: Tensor, side: int, fit: Fit = "crop") -> Tensor:
    """uint8 frames to uint8 (B, T, side, side, C), antialiased (bicubic), as `read_clip` does.

    For clips that arrive at another size than the model's; frames of the right size are returned as
    they are. `fit` is "crop" for the largest centred square or "squash" for the whole picture.
    """
    _check_uint8(frames_BTHWC)
    B, T, H, W, C = frames_BTHWC.shape
    if H == W == side:
        return frames_BTHWC
    top, left, bottom, right = Framing(side, fit).box(W, H)
    (y0, y1), (x0, x1) = pixel_span(top, bottom, H), pixel_span(left, right, W)
    part_NCHW = frames_BTHWC[:, :, y0:y1, x0:x1].flatten(0, 1).permute(0, 3, 1, 2).float()
    scaled_NCHW = F.interpolate(part_NCHW, size=(side, side), mode="bicubic", antialias=True)
    scaled_NHWC = scaled_NCHW.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8)
    return scaled_NHWC.reshape(B, T, side, side, C)


def flip(frames_BTHWC: Tensor, flips_B: Tensor) -> Tensor:
    """Mirror left and right the clips whose entry in the bool tensor `flips_B` is True."""
    return torch.where(flips_B[:, None, None, None, None], frames_BTHWC.flip(3), frames_BTHWC)


def _check_uint8(frames_BTHWC: Tensor) -> None:
    if frames_BTHWC.dtype != torch.uint8 or frames_BTHWC.ndim != 5 or frames_BTHWC.shape[4] != 3:
        raise ValueError(
            "frames must be uint8 of shape (B, T, H, W, 3), not "
            f"{frames_BTHWC.dtype} of shape {tuple(frames_BTHWC.shape)}"
        )
