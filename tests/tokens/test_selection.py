"""take and gather against plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxclip.tokens.selection import Selection, gather, take


@settings(max_examples=60)
@given(
    batch=st.integers(1, 4),
    num_steps=st.integers(1, 5),
    length=st.integers(1, 12),
    budget=st.none() | st.integers(1, 70),
    seed=st.integers(0, 1000),
    masked=st.booleans(),
)
def test_take_keeps_the_best_unmasked_positions(
    batch: int, num_steps: int, length: int, budget: int | None, seed: int, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # few distinct values, so that ties are common
    score = torch.randint(0, 5, (batch, num_steps, length), generator=generator).float()
    mask = torch.rand(batch, num_steps, length, generator=generator) < 0.6 if masked else None
    selection = take(score, mask, budget)
    kept = selection.index.split(selection.lengths)
    for i in range(batch):
        flat = score[i].flatten().tolist()
        allowed = [p for p in range(len(flat)) if mask is None or mask[i].flatten()[p]]
        best_first = sorted(allowed, key=lambda p: (-flat[p], p))
        expected = sorted(best_first if budget is None else best_first[:budget])
        assert kept[i].tolist() == expected


@pytest.mark.parametrize("budget", [0, -3, 2.5, True])
def test_a_budget_is_a_positive_integer(budget: object) -> None:
    with pytest.raises(ValueError, match="token budget"):
        take(torch.zeros(1, 2, 2), budget=budget)  # type: ignore[arg-type]


def test_gather_picks_each_clip_s_own_tokens_and_passes_gradients_back() -> None:
    x = torch.arange(24.0).view(2, 4, 3).requires_grad_()
    selection = Selection(torch.tensor([0, 2, 1, 3]), (2, 2))
    out = gather(x, selection)
    assert out.tolist() == [x[0, [0, 2]].tolist(), x[1, [1, 3]].tolist()]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad[:, :, 0].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


def test_selections_of_different_lengths_have_no_matrix() -> None:
    mask = torch.tensor([[[True, True]], [[True, False]]])
    selection = take(torch.zeros(2, 1, 2), mask)
    assert selection.lengths == (2, 1)
    with pytest.raises(ValueError, match="different numbers"):
        _ = selection.index_BK
