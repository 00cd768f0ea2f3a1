"""Draws: even, apart from each other, and each clip's own."""

import math

import numpy as np
import pytest
import torch

from fluxclip.tokens.draws import Draws

M = 2**64


def splitmix64(state: int) -> int:
    """The published reference: the output that follows a state."""
    z = (state + 0x9E3779B97F4A7C15) % M
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % M
    return z ^ (z >> 31)


def finalised(x: int) -> int:
    return splitmix64((x - 0x9E3779B97F4A7C15) % M)


@pytest.mark.parametrize("key", [0, 1, 2**63 + 5, M - 1])
def test_numbers_are_splitmix64_s_in_64_bits(key: int) -> None:
    clips = [0, 7, 2**32 + 3, 2**62]
    drawn = Draws(key, torch.tensor(clips)).uniform(3)
    for clip, row in zip(clips, drawn.tolist(), strict=True):
        state = finalised((clip + key) % M)
        for i, value in enumerate(row):
            assert value == (splitmix64((state + i * 0x9E3779B97F4A7C15) % M) >> 40) / 2**24


def test_they_are_even_and_uncorrelated() -> None:
    draws = Draws(3, torch.arange(4000))
    x = torch.stack([draws.at(place).uniform(8) for place in range(4)]).double().numpy()
    assert x.min() >= 0 and x.max() < 1
    counts, _ = np.histogram(x, bins=64, range=(0, 1))
    # 128,000 numbers in 64 bins: chi-square of 63 degrees, mean 63, deviation 11
    assert ((counts - 2000) ** 2 / 2000).sum() < 63 + 6 * 11.2
    # of places, of clips next to each other and of numbers of a clip
    for a, b in ((x[0], x[1]), (x[:, 1:], x[:, :-1]), (x[..., 1:], x[..., :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 6 / math.sqrt(a.size)


def test_a_clip_s_numbers_do_not_depend_on_the_batch() -> None:
    whole = Draws(5, torch.arange(10)).at(2).uniform(3, 4)
    part = Draws(5, torch.tensor([8, 1])).at(2).uniform(3, 4)
    assert torch.equal(part, whole[[8, 1]])
