"""Flux draws, admissible grids, and the grid of a budget."""

import itertools
import math

import pytest

from fluxclip.tokens.budget import FluxSampling, GridTable, candidate_grids

# the pre-training setting of the FluxViT paper: frames 4-24, sides 168-252, 2,048-4,096 tokens
PAPER = FluxSampling((4, 24, 2), (168, 252, 28), (2048, 4096), (2048, 1536, 1024))


def test_the_paper_s_setting_has_its_18_grids() -> None:
    expected = {
        8: [224, 252], 10: [224, 252], 12: [196, 224, 252], 14: [196, 224],
        16: [168, 196, 224], 18: [168, 196], 20: [168, 196], 22: [168], 24: [168],
    }  # fmt: skip
    assert sorted(PAPER.admissible) == sorted((t, s) for t, row in expected.items() for s in row)


def test_a_draw_is_a_function_of_seed_and_step() -> None:
    draws = [PAPER.draw(7, step) for step in range(500)]
    assert draws == [PAPER.draw(7, step) for step in range(500)]
    assert draws != [PAPER.draw(8, step) for step in range(500)]
    seen = {(d.num_frames, d.side) for d in draws}
    assert seen == set(PAPER.admissible)
    assert all(d.budgets == (2048, 1536, 1024) for d in draws)


def test_budgets_above_the_grid_keep_its_tokens_and_are_not_repeated() -> None:
    small = FluxSampling((2, 2, 1), (56, 56, 28), (1, 100), (64, 48, 16))
    assert small.draw(0, 0).budgets == (32, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": (8, 4, 2)}, "flux.frames"),
        ({"sides": (100, 200, 28)}, "multiples of the patch"),
        ({"budgets": ()}, "flux.budgets"),
        ({"budgets": (0,)}, "flux.budgets"),
        ({"tokens": (10, 20)}, "widen flux.tokens"),
    ],
)
def test_wrong_settings_name_themselves(changes: dict[str, object], message: str) -> None:
    values: dict[str, object] = {
        "frames": (4, 8, 2), "sides": (112, 168, 28), "tokens": (100, 4000), "budgets": (64,),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        FluxSampling(**values | changes)  # type: ignore[arg-type]


def test_the_nearest_row_in_log_tokens_gives_the_grid() -> None:
    table = GridTable(default=(8, 112), rows=((512, 8, 112), (128, 6, 84), (64, 4, 84)))
    assert table.grid(None) == (8, 112)
    assert table.grid(512) == table.grid(10_000) == table.grid(300) == (8, 112)
    assert table.grid(250) == table.grid(128) == (6, 84)
    assert table.grid(1) == (4, 84)
    assert table.grid(256) == (8, 112)  # equally near to 512 and 128: the larger
    assert GridTable(default=(8, 112)).grid(5) == (8, 112)


def test_rows_replace_those_of_their_budgets() -> None:
    table = GridTable((8, 112), ((128, 6, 84), (64, 4, 84)))
    changed = table.with_rows([(64, 2, 112), (256, 8, 98)])
    assert changed.rows == ((256, 8, 98), (128, 6, 84), (64, 2, 112))
    assert changed.default == table.default
    assert changed.grid(64) == (2, 112)


def test_the_grids_of_a_run_are_readable() -> None:
    few = FluxSampling((2, 4, 2), (84, 84, 14), (72, 144), (36, 72))
    assert str(few) == "grids: 2 x 84 px (72 tokens), 4 x 84 px (144 tokens); budgets 72, 36"
    assert str(PAPER).endswith(
        ", ... 24 x 168 px (3456 tokens), 18 in all; budgets 2048, 1536, 1024"
    )
    assert "\n" not in str(PAPER) and len(str(PAPER)) < 300


@pytest.mark.parametrize("budget", [9, 64, 300])
@pytest.mark.parametrize("tubelet", [1, 2])
def test_candidates_are_all_grids_with_enough_tokens(budget: int, tubelet: int) -> None:
    def tokens(grid: tuple[int, int]) -> int:
        return math.ceil(grid[0] / tubelet) * (grid[1] // 14) ** 2

    frames, sides = (1, 8, 1), (28, 112, 14)
    grids = [g for g in itertools.product(range(1, 9), range(28, 113, 14)) if tokens(g) >= budget]
    found = candidate_grids(budget, frames=frames, sides=sides, patch=14, tubelet=tubelet)
    assert found == grids
    few = candidate_grids(budget, frames=frames, sides=sides, patch=14, tubelet=tubelet, at_most=5)
    assert len(few) == 5 or len(few) == len([g for g in grids if tokens(g) <= 4 * budget])

    def far(grid: tuple[int, int]) -> float:
        return abs(math.log(tokens(grid) / (2 * budget)))

    left = [grid for grid in grids if grid not in few and tokens(grid) <= 4 * budget]
    assert all(far(grid) <= far(other) for grid in few for other in left)
    assert all(budget <= tokens(grid) <= 4 * budget for grid in few)


def test_no_candidates_and_wrong_bounds() -> None:
    assert candidate_grids(999, frames=(1, 2, 1), sides=(28, 56, 14), patch=14) == []
    for frames, sides, message in (
        ((4, 2, 1), (28, 56, 14), "frames is .first, last, stride."),
        ((1, 2, 0), (28, 56, 14), "frames is .first, last, stride."),
        ((1, 2, 1), (28, 56, 10), "sides must be multiples of the patch, 14 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            candidate_grids(9, frames=frames, sides=sides, patch=14)
