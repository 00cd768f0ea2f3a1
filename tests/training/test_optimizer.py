"""The schedule of the learning rate, and which weights decay."""

import pytest
import torch

from fluxclip.training import optimizer


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
