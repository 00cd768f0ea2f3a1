"""Flux sampling: which grid and how many tokens a training step uses, and the grid of a budget.

Integers only: no tensors here. A grid is (num_frames, side in pixels).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fluxclip.settings import settings

_GRIDS_SHOWN = 8


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
        _check_bounds(self.frames, self.sides, patch=self.patch, prefix="flux.")
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

    def __str__(self) -> str:
        """The grids that may be drawn and the budgets, readable: 2 x 84 px is 2 frames of 84²."""
        grids = self.admissible
        shown = [f"{t} x {side} px ({self.num_tokens(t, side)} tokens)" for t, side in grids]
        if len(grids) > _GRIDS_SHOWN:
            shown = [*shown[: _GRIDS_SHOWN - 1], f"... {shown[-1]}, {len(grids)} in all"]
        budgets = ", ".join(map(str, sorted(set(self.budgets), reverse=True)))
        return f"grids: {', '.join(shown)}; budgets {budgets}"

    def num_tokens(self, num_frames: int, side: int) -> int:
        return -(-num_frames // self.tubelet) * (side // self.patch) ** 2

    @property
    def admissible(self) -> tuple[tuple[int, int], ...]:
        """All (num_frames, side) whose tokens lie within `tokens`."""
        low, high = self.tokens
        return tuple(
            (t, side)
            for t in _inclusive(self.frames)
            for side in _inclusive(self.sides)
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

    def with_rows(self, rows: Sequence[tuple[int, int, int]]) -> "GridTable":
        """The table with these rows in place of those of the same budgets, the largest first."""
        by_budget = {row[0]: row for row in (*self.rows, *rows)}
        return GridTable(self.default, tuple(by_budget[b] for b in sorted(by_budget, reverse=True)))


def candidate_grids(
    token_budget: int, *, frames: tuple[int, int, int], sides: tuple[int, int, int],
    patch: int, tubelet: int = 1, at_most: int | None = None,
) -> list[tuple[int, int]]:  # fmt: skip
    """(num_frames, side) worth a trial for a budget: those with at least as many tokens.

    frames, sides: (first, last, stride), the last included; sides are multiples of `patch`.
    at_most: only so many grids, of at most 4 times the budget: the nearest in log tokens to twice
    it, more frames first among equals (of FluxViT's best grids, Table 11, most have 1.6 to 2.3
    times the budget, and many frames are better than many pixels). Empty if no grid is large
    enough. Raises ValueError for bounds that are none.
    """
    _check_bounds(frames, sides, patch=patch)

    def num_tokens(grid: tuple[int, int]) -> int:
        return -(-grid[0] // tubelet) * (grid[1] // patch) ** 2

    grids = [(t, side) for t in _inclusive(frames) for side in _inclusive(sides)]
    grids = [grid for grid in grids if num_tokens(grid) >= token_budget]
    if at_most is None:
        return grids
    grids = [grid for grid in grids if num_tokens(grid) <= 4 * token_budget]
    # more frames first, then a stable sort
    grids.sort(key=lambda grid: -grid[0])
    grids.sort(key=lambda grid: abs(math.log(num_tokens(grid) / (2 * token_budget))))
    return sorted(grids[:at_most])


def _check_bounds(
    frames: tuple[int, int, int], sides: tuple[int, int, int], *, patch: int, prefix: str = ""
) -> None:
    """Raise ValueError that names what is no (first, last, stride), or no multiple of `patch`."""
    for name, (first, last, stride) in (("frames", frames), ("sides", sides)):
        if first < 1 or last < first or stride < 1:
            raise ValueError(
                f"{prefix}{name} is [first, last, stride] with 1 <= first <= last "
                f"and stride >= 1, got {[first, last, stride]}"
            )
    if sides[0] % patch or sides[2] % patch:
        raise ValueError(
            f"{prefix}sides must be multiples of the patch, {patch} pixels, got {list(sides)}"
        )


def _inclusive(bounds: tuple[int, int, int]) -> range:
    first, last, stride = bounds
    return range(first, last + 1, stride)
