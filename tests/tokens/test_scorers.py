"""Contract of every scorer found in fluxclip/tokens/scorers, and what each one promises."""

import pytest
import torch

from fluxclip import plugins
from fluxclip.tokens.draws import Draws
from fluxclip.tokens.scorers import group_dynamic, random_drop, uniform
from fluxclip.tokens.selection import take

SCORERS = plugins.available("fluxclip.tokens.scorers")
GRIDS = [(1, 16), (2, 9), (3, 9), (4, 16), (5, 12), (7, 4), (8, 16), (9, 6), (12, 25)]


def patches(batch: int, num_steps: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num_steps, length, 32, generator=generator)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize(("num_steps", "length"), GRIDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_budget_is_kept_exactly(name: str, num_steps: int, length: int, batch: int) -> None:
    score = plugins.load("fluxclip.tokens.scorers", name).score
    x = patches(batch, num_steps, length)
    scores = score(x)
    assert scores.shape == (batch, num_steps, length)
    assert torch.isfinite(scores).all()
    n = num_steps * length
    for budget in (1, 2, n // 3, n // 2, n - 1, n, n + 5):
        index = take(scores, budget=max(1, budget)).index_BK
        assert index.shape == (batch, min(max(1, budget), n))
        assert (index.diff(dim=1) > 0).all()
        assert index.min() >= 0
        assert index.max() < n


@pytest.mark.parametrize("name", SCORERS)
def test_a_clip_s_scores_depend_on_that_clip_alone(name: str) -> None:
    score = plugins.load("fluxclip.tokens.scorers", name).score
    x = patches(4, 8, 16)
    together = score(x)
    for i in range(4):
        torch.testing.assert_close(score(x[i : i + 1])[0], together[i])
    torch.testing.assert_close(score(x.flip(0)).flip(0), together)


@pytest.mark.parametrize("name", SCORERS)
def test_scoring_twice_gives_the_same(name: str) -> None:
    score = plugins.load("fluxclip.tokens.scorers", name).score
    x = patches(2, 8, 16)
    assert torch.equal(score(x), score(x))


def test_uniform_spreads_over_time_and_space() -> None:
    index = take(uniform.score(patches(1, 8, 64)), budget=128).index_BK[0]
    per_step = torch.bincount(index // 64, minlength=8)
    per_eighth_of_the_picture = torch.bincount(index % 64 // 8, minlength=8)
    assert per_step.min() >= 14
    assert per_step.max() <= 18
    assert per_eighth_of_the_picture.min() >= 12
    assert per_eighth_of_the_picture.max() <= 20


def test_random_drop_with_draws_differs_per_clip_and_step_and_is_unbiased() -> None:
    x, clips_B = patches(2, 4, 16), torch.arange(2)
    scores = random_drop.score(x, draws=Draws(0, clips_B))
    assert not torch.equal(scores[0], scores[1])
    assert not torch.equal(scores, random_drop.score(x, draws=Draws(1, clips_B)))
    # a clip's draws are its own, whatever else is in the batch
    assert torch.equal(random_drop.score(x[1:], draws=Draws(0, clips_B[1:])), scores[1:])
    kept = torch.zeros(64)
    for step in range(500):
        index = take(random_drop.score(x, draws=Draws(step, clips_B)), budget=16).index_BK
        kept += torch.bincount(index.flatten(), minlength=64)
    # each of 64 positions is kept with probability 1/4 in 1,000 draws: six standard deviations
    assert (kept - 250).abs().max() < 6 * (1000 * 0.25 * 0.75) ** 0.5


def test_group_sizes_follow_the_paper_and_never_leave_a_step_without_a_neighbour() -> None:
    assert group_dynamic.group_sizes(8) == [2, 2, 2, 2]
    assert group_dynamic.group_sizes(12) == [3, 3, 3, 3]
    assert group_dynamic.group_sizes(6) == [3, 3]
    assert group_dynamic.group_sizes(10) == [5, 5]
    assert group_dynamic.group_sizes(2) == [2]
    assert group_dynamic.group_sizes(4) == [2, 2]
    assert group_dynamic.group_sizes(5) == [3, 2]
    for num_steps in range(1, 40):
        sizes = group_dynamic.group_sizes(num_steps)
        assert sum(sizes) == num_steps
        assert min(sizes) >= min(2, num_steps)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_steps", [4, 5, 6, 8, 11, 12])
@pytest.mark.parametrize("budget_share", [0.25, 0.5])
def test_group_dynamic_matches_a_slow_oracle(num_steps: int, budget_share: float) -> None:
    length = 16
    x = patches(3, num_steps, length, seed=num_steps)
    budget = int(num_steps * length * budget_share) // 4 * 4
    index = take(group_dynamic.score(x), budget=budget).index_BK
    sizes = group_dynamic.group_sizes(num_steps)
    for clip, kept in zip(x, index, strict=True):
        start = 0
        for size in sizes:
            inside = kept[(kept >= start * length) & (kept < (start + size) * length)]
            share = budget * size / num_steps
            assert abs(len(inside) - share) <= 1
            change = torch.stack(
                [
                    (clip[start + max(t, 1)] - clip[start + max(t, 1) - 1]).norm(dim=-1)
                    for t in range(size)
                ]
            ).flatten()
            chosen = change[inside - start * length]
            rest = change.clone()
            rest[inside - start * length] = -1
            assert chosen.min() >= rest.max() - 1e-5
            start += size


def test_group_dynamic_looks_where_something_moves() -> None:
    x = torch.ones(1, 8, 16, 32)
    moving = 5
    x[0, :, moving] = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    index = take(group_dynamic.score(x), budget=8).index_BK[0]
    assert (index % 16 == moving).all()
