"""Flux sampling: which grid and how many tokens a training step uses, and the grid of a budget.

Integers only: no tensors here. A grid is (num_frames, side in pixels).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fluxclip.settings import settings


@dataclass(frozen=True)
class Draw:
    """What one training step uses: grid, and its token budgets, the largest first."""

    num_frames: int
    side: int
    budgets: tuple[int, ...]


@settings
class FluxSampling:
    """Grids that a training step may draw, and its token budgets (FluxViT, arXiv 2503.14237, 3.1).

    frames, sides: (first, last, stride), the last included; sides are multiples of `patch` pixels.
    tokens: (least, most) tokens a drawn grid may have before selection.
    budgets: tokens kept in each view of a step ("Flux-Multi" with several, "Flux-Single" with
    one); a grid with fewer tokens keeps all of its own.
    """

    frames: tuple[int, int, int]
    sides: tuple[int, int, int]
    tokens: tuple[int, int]
    budgets: tuple[int, ...]
    patch: int = 14
    tubelet: int = 1

    def __post_init__(self) -> None:
        for name, (first, last, stride) in (("frames", self.frames), ("sides", self.sides)):
            if first < 1 or last < first or stride < 1:
                got = [first, last, stride]
                raise ValueError(
                    f"flux.{name} is [first, last, stride] with 1 <= first <= last "
                    f"and stride >= 1, got {got}"
                )
        if self.sides[0] % self.patch or self.sides[2] % self.patch:
            raise ValueError(
                f"flux.sides must be multiples of the patch, {self.patch} pixels, "
                f"got {list(self.sides)}"
            )
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(
                f"flux.budgets must be token counts of 1 or more, got {list(self.budgets)}"
            )
        if not self.admissible:
            raise ValueError(
                f"no grid of flux.frames {list(self.frames)} and flux.sides "
                f"{list(self.sides)} has between {self.tokens[0]} and "
                f"{self.tokens[1]} tokens: widen flux.tokens"
            )

    def num_tokens(self, num_frames: int, side: int) -> int:
        return -(-num_frames // self.tubelet) * (side // self.patch) ** 2

    @property
    def admissible(self) -> tuple[tuple[int, int], ...]:
        """All (num_frames, side) whose tokens lie within `tokens`."""
        first, last, stride = self.frames
        all_frames = range(first, last + 1, stride)
        first, last, stride = self.sides
        all_sides = range(first, last + 1, stride)
        low, high = self.tokens
        return tuple(
            (t, side)
            for t in all_frames
            for side in all_sides
            if low <= self.num_tokens(t, side) <= high
        )

    def draw(self, seed: int, step: int) -> Draw:
        """The draw of a step: a function of (seed, step) alone, so equal on every rank."""
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        num_frames, side = self.admissible[rng.integers(len(self.admissible))]
        most = self.num_tokens(num_frames, side)
        budgets = sorted({min(budget, most) for budget in self.budgets}, reverse=True)
        return Draw(num_frames, side, tuple(budgets))


@settings
class GridTable:
    """The grid that a model uses for a token budget ("Token Optimization", FluxViT 3.3).

    default: (num_frames, side) without a budget. rows: (token_budget, num_frames, side).
    """

    default: tuple[int, int]
    rows: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        for values in (self.default, *self.rows):
            if min(values) < 1:
                raise ValueError(f"a grid table holds positive integers, got {list(values)}")

    def grid(self, token_budget: int | None) -> tuple[int, int]:
        """(num_frames, side) for a budget: of the row nearest in log tokens, the larger on a tie.

        Without a budget, or without rows, the default grid.
        """
        if token_budget is None or not self.rows:
            return self.default

        def distance(row: Sequence[int]) -> tuple[float, int]:
            return abs(math.log(row[0] / token_budget)), -row[0]

        _, num_frames, side = min(self.rows, key=distance)
        return num_frames, side
