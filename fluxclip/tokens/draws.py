"""Random numbers of training that belong to a clip: the same in any batch, piece or process.

Shape legend: B clips.
"""

import math

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Draws:
    """Numbers that are a function of a key, a place and a clip alone.

    clips_B: int64, a number for each clip of a batch. So token dropout and drop path are the same
    whether a step's clips go through at once, in pieces, or on several machines, and nothing
    random has to be kept to repeat a pass. A counter-based generator (Salmon et al. 2011), with the
    finaliser of SplitMix64 (Steele et al. 2014) as its hash.
    """

    def __init__(self, key: int, clips_B: Tensor) -> None:
        self.key, self.clips_B = key & _MASK, clips_B

    def at(self, place: int) -> "Draws":
        """The draws of another place: a layer, a view, a branch."""
        return Draws(_mixed(self.key + (place + 1) * _GOLDEN), self.clips_B)

    def uniform(self, *shape: int) -> Tensor:
        """float32 (B, *shape) in [0, 1), evenly spread."""
        clips_B, size = self.clips_B, math.prod(shape)
        start_B1 = _mixed_tensor(clips_B + _signed(self.key))[:, None]
        numbers = torch.arange(1, size + 1, device=clips_B.device) * _signed(_GOLDEN)
        bits_BN = _mixed_tensor(start_B1 + numbers)
        # the upper 24 bits: as many as a float32 holds
        return ((bits_BN >> 40) & (2**24 - 1)).float().div(2**24).view(len(clips_B), *shape)


def _mixed(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mixed_tensor(x: Tensor) -> Tensor:
    """As `_mixed`, in int64, whose products wrap around and whose shifts keep the sign."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
