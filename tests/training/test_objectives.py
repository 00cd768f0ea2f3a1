"""The objectives against plain Python, in chunks and whole, and their gradients by what they do.

Several processes: test_distributed_loss.py.
"""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from fluxclip import plugins
from fluxclip.training.objectives import _views, contrastive, sigmoid

OBJECTIVES = plugins.available("fluxclip.training.objectives")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def labels(num_pairs: int, *same: tuple[int, int, int]) -> torch.Tensor:
    """int64 (num_pairs, 2), all different but for `same`: (column, one pair, another)."""
    labels_BK = torch.arange(2 * num_pairs).view(num_pairs, 2)
    for column, one, another in same:
        labels_BK[another, column] = labels_BK[one, column].clone()
    return labels_BK


def make(name: str) -> torch.nn.Module:
    return plugins.load("fluxclip.training.objectives", name).make().double()


def loss_of(
    objective: torch.nn.Module, views: Sequence[torch.Tensor], text: torch.Tensor, scale: float,
    labels_BK: torch.Tensor, *, align: float = 0.0,
) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    factor = torch.tensor(scale, dtype=text.dtype)
    return objective(views, text, factor, labels_BK, align=align, negatives="local")


def right(labels_BK: torch.Tensor, i: int, j: int) -> bool:
    return any(a == b for a, b in zip(labels_BK[i].tolist(), labels_BK[j].tolist(), strict=True))


def slow_info_nce(
    video: torch.Tensor, text: torch.Tensor, scale: float, labels_BK: torch.Tensor
) -> float:
    total, n = 0.0, len(video)
    for a, b in ((video, text), (text, video)):
        for i in range(n):
            scores = [scale * float(a[i] @ b[j]) for j in range(n)]
            log_sum = math.log(sum(math.exp(s) for s in scores))
            known = [j for j in range(n) if right(labels_BK, i, j)]
            total += sum(log_sum - scores[j] for j in known) / len(known) / n / 2
    return total


def slow_sigmoid(
    video: torch.Tensor, text: torch.Tensor, scale: float, labels_BK: torch.Tensor, bias: float
) -> float:
    total, n = 0.0, len(video)
    for i in range(n):
        for j in range(n):
            z = 1 if right(labels_BK, i, j) else -1
            total += math.log(1 + math.exp(-z * (scale * float(video[i] @ text[j]) + bias)))
    return total / n


@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract_of_every_objective(name: str) -> None:
    objective = make(name)
    views = [unit(5, 8, seed=i).requires_grad_() for i in range(2)]
    text = unit(5, 8, seed=9).requires_grad_()
    value, parts = loss_of(objective, views, text, 10.0, labels(5), align=1.0)
    assert value.ndim == 0
    assert value > 0
    assert parts.keys() >= {"contrast_0", "contrast_1", "align", "recall"}
    assert all(part.ndim == 0 and not part.requires_grad for part in parts.values())
    assert 0 <= parts["recall"] <= 1
    value.backward()
    for x in (*views, text, *objective.parameters()):
        assert x.grad is not None
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("logits_at_once", [2**24, 30, 1])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_the_loss(
    name: str, logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_views, "LOGITS_AT_ONCE", logits_at_once)
    objective = make(name)
    inputs = [unit(7, 3, seed=1), unit(7, 3, seed=2), torch.tensor(8.0, dtype=torch.float64)]
    for x in inputs:
        x.requires_grad_()

    def loss(view: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        pairs = labels(7, (0, 1, 4), (1, 4, 6))
        return objective([view], text, scale, pairs, align=0.0, negatives="full")[0]

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("logits_at_once", [2**24, 12, 18, 1])
@pytest.mark.parametrize("same", [(), ((1, 0, 3),), ((1, 0, 3), (0, 3, 5), (0, 1, 2))])
def test_losses_equal_their_formulas(
    same: tuple[tuple[int, int, int], ...], logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs, without chunks and in chunks, with captions and clips that recur."""
    monkeypatch.setattr(_views, "LOGITS_AT_ONCE", logits_at_once)
    video, text, pairs = unit(6, 8), unit(6, 8, seed=1), labels(6, *same)
    value, _ = loss_of(contrastive.make(), [video], text, 7.0, pairs)
    assert value.item() == pytest.approx(slow_info_nce(video, text, 7.0, pairs), rel=1e-12)
    objective = sigmoid.make().double()
    for bias in (-10.0, 0.5):
        torch.nn.init.constant_(objective.bias, bias)
        value, _ = loss_of(objective, [video], text, 7.0, pairs)
        expected = slow_sigmoid(video, text, 7.0, pairs, bias)
        assert value.item() == pytest.approx(expected, rel=1e-12)


def test_the_sigmoid_loss_starts_from_the_papers_bias_and_trains_it() -> None:
    parameters = dict(sigmoid.make().named_parameters())
    assert parameters.keys() == {"bias"}
    assert parameters["bias"].item() == -10


@pytest.mark.parametrize("name", OBJECTIVES)
def test_single_precision_is_enough_at_the_largest_scale(name: str) -> None:
    video, text, pairs = unit(64, 16), unit(64, 16, seed=1), labels(64, (1, 3, 40))
    expected, _ = loss_of(make(name), [video], text, 100.0, pairs)
    found, _ = loss_of(make(name).float(), [video.float()], text.float(), 100.0, pairs)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_views_are_averaged_and_smaller_ones_drawn_to_the_largest_only(name: str) -> None:
    objective = make(name)
    views = [unit(4, 8, seed=i).requires_grad_() for i in range(3)]
    text, pairs = unit(4, 8, seed=9), labels(4)
    single = [loss_of(objective, [v], text, 5.0, pairs)[0].item() for v in views]
    without, parts = loss_of(objective, views, text, 5.0, pairs)
    assert without.item() == pytest.approx(sum(single) / 3)
    assert [parts[f"contrast_{i}"].item() for i in range(3)] == pytest.approx(single)
    with_align, parts = loss_of(objective, views, text, 5.0, pairs, align=2.0)
    cosine = [(v * views[0]).sum(-1).mean().item() for v in views[1:]]
    assert parts["align"].item() == pytest.approx(1 - sum(cosine) / 2)
    assert (with_align - without).item() == pytest.approx(2 * parts["align"].item())
    (with_align - without).backward()
    assert views[0].grad is not None
    assert views[0].grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_perfect_pairs_cost_less_than_shuffled_ones(name: str) -> None:
    objective, text = make(name), unit(8, 16)
    good, _ = loss_of(objective, [text], text, 20.0, labels(8))
    wrong, _ = loss_of(objective, [text.roll(1, 0)], text, 20.0, labels(8))
    assert good < 0.5 < math.log(8) < wrong


@pytest.mark.parametrize("logits_at_once", [2**24, 24, 40, 1])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_recall_counts_clips_of_the_largest_view_whose_best_caption_is_right(
    name: str, logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_views, "LOGITS_AT_ONCE", logits_at_once)
    text = unit(8, 16)
    # pairs 5 and 6 have each other's clip
    largest = text[[0, 1, 2, 3, 4, 6, 5, 7]]
    views = [largest, text.roll(1, 0)]
    for pairs, recall in ((labels(8), 6 / 8), (labels(8, (1, 5, 6)), 1.0)):
        _, parts = loss_of(make(name), views, text, 20.0, pairs)
        assert parts["recall"] == recall
