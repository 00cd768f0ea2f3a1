"""The loss against plain Python, its gradients by what they do, and the schedule."""

import math

import pytest
import torch
import torch.nn.functional as F

from fluxclip import plugins
from fluxclip.training import optimizer
from fluxclip.training.objectives import contrastive


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def slow_info_nce(
    video: torch.Tensor, text: torch.Tensor, scale: float, same: torch.Tensor
) -> float:
    total, n = 0.0, len(video)
    for a, b in ((video, text), (text, video)):
        for i in range(n):
            scores = [scale * float(a[i] @ b[j]) for j in range(n)]
            log_sum = math.log(sum(math.exp(s) for s in scores))
            right = [j for j in range(n) if same[i, j]]
            total += sum(log_sum - scores[j] for j in right) / len(right) / n / 2
    return total


@pytest.mark.parametrize("name", plugins.available("fluxclip.training.objectives"))
def test_contract_of_every_objective(name: str) -> None:
    loss = plugins.load("fluxclip.training.objectives", name).loss
    views = [unit(5, 8, seed=i).requires_grad_() for i in range(2)]
    text = unit(5, 8, seed=9).requires_grad_()
    value, parts = loss(views, text, torch.tensor(10.0), torch.eye(5, dtype=torch.bool), align=1.0)
    assert value.ndim == 0
    assert value > 0
    assert all(isinstance(part, float) for part in parts.values())
    value.backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (*views, text))


def test_info_nce_equals_the_formula_with_and_without_shared_captions() -> None:
    video, text = unit(6, 8), unit(6, 8, seed=1)
    same = torch.eye(6, dtype=torch.bool)
    for _ in range(2):
        value, _ = contrastive.loss([video], text, torch.tensor(7.0), same, align=1.0)
        assert float(value) == pytest.approx(slow_info_nce(video, text, 7.0, same), rel=1e-9)
        same = same.clone()
        same[0, 3] = same[3, 0] = True


def test_views_are_averaged_and_smaller_ones_drawn_to_the_largest_only() -> None:
    views = [unit(4, 8, seed=i).requires_grad_() for i in range(3)]
    text, scale = unit(4, 8, seed=9), torch.tensor(5.0)
    same = torch.eye(4, dtype=torch.bool)
    single = [contrastive.loss([v], text, scale, same, align=0.0)[0].item() for v in views]
    without, _ = contrastive.loss(views, text, scale, same, align=0.0)
    with_align, parts = contrastive.loss(views, text, scale, same, align=2.0)
    assert float(without) == pytest.approx(sum(single) / 3)
    cosine = [float((v * views[0]).sum(-1).mean()) for v in views[1:]]
    assert parts["align"] == pytest.approx(1 - sum(cosine) / 2)
    assert float(with_align - without) == pytest.approx(2 * parts["align"])
    (with_align - without).backward()
    assert views[0].grad is not None
    assert views[0].grad.abs().max() < 1e-12


def test_perfect_pairs_cost_less_than_shuffled_ones() -> None:
    text, scale = unit(8, 16), torch.tensor(20.0)
    same = torch.eye(8, dtype=torch.bool)
    right, _ = contrastive.loss([text], text, scale, same, align=0.0)
    wrong, _ = contrastive.loss([text.roll(1, 0)], text, scale, same, align=0.0)
    assert right < 0.1 < math.log(8) < wrong


def test_learning_rate_warms_up_and_falls_to_its_end() -> None:
    rates = [
        optimizer.learning_rate(step, steps=100, warmup_steps=10, lr=1.0, final_lr=0.01)
        for step in range(100)
    ]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_weight_decay_is_for_trained_matrices_only() -> None:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)
            self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
            self.positions = torch.nn.Module()
            self.positions.table = torch.nn.Parameter(torch.zeros(2, 2, 2, 3))
            self.log_scale = torch.nn.Parameter(torch.tensor(1.0))

    model = Small()
    decayed, free = optimizer.parameter_groups(model, weight_decay=0.1)
    assert decayed == {"params": [model.linear.weight], "weight_decay": 0.1, "scale": 1.0}
    assert free["weight_decay"] == 0.0
    ids = {id(p) for p in free["params"]}  # type: ignore[attr-defined]
    assert ids == {id(model.linear.bias), id(model.positions.table), id(model.log_scale)}
