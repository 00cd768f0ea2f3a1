"""Flux draws, admissible grids, and the grid of a budget."""

import pytest

from fluxclip.tokens.budget import FluxSampling, GridTable

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
