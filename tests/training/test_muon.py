"""Muon's step: orthogonal, for block matrices only, and as large as AdamW's."""

import torch
from torch import nn

from fluxclip.training import optimizer
from fluxclip.training.muon import Muon, orthogonal


def test_a_matrix_becomes_nearly_orthogonal_with_its_own_singular_vectors() -> None:
    torch.manual_seed(0)
    for shape in ((24, 24), (24, 96), (96, 24)):
        matrix = torch.randn(*shape)
        made = orthogonal(matrix)
        assert made.shape == matrix.shape
        values = torch.linalg.svdvals(made)
        # a square random matrix has singular values near zero, which take more rounds to grow
        assert values.max() < 1.25 and values.median() > 0.65
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        inside = left.T @ made @ right.T  # diagonal, as the singular vectors are the same
        assert (inside - inside.diag().diag()).abs().max() < 1e-4


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])
        self.head = nn.Linear(8, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def built(tower: Tower, *, muon: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    return optimizer.build(
        nn.ModuleDict({"tower": tower}),
        lr=0.01, betas=(0.9, 0.98), weight_decay=weight_decay, muon=muon,
    )  # fmt: skip


def test_block_matrices_are_stepped_by_muon_and_the_rest_as_by_adamw() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), torch.randn(32, 4)
    results = []
    for muon in (0.0, 2.0):
        torch.manual_seed(1)
        tower = Tower()
        before = {name: p.detach().clone() for name, p in tower.named_parameters()}
        adamw = built(tower, muon=muon)
        (tower(x) - y).square().mean().backward()
        optimizer.step_down(adamw, tower, lr=0.01, clip_norm=9.0)
        results.append({n: p.detach() - before[n] for n, p in tower.named_parameters()})
    plain, with_muon = results
    for name in plain:
        if name.startswith("blocks") and name.endswith("weight"):
            step = with_muon[name]
            # lr * muon * 0.2 * sqrt(longest side) times a matrix of singular values about 1
            size = 0.01 * 2.0 * 0.2 * max(step.shape) ** 0.5
            assert 0.6 * size < torch.linalg.svdvals(step).median() < 1.25 * size
            assert not torch.equal(step, plain[name])
        else:
            assert torch.equal(with_muon[name], plain[name]), name
    assert not with_muon["frozen.weight"].any()


def test_weight_decay_shrinks_what_muon_steps() -> None:
    tower = Tower()
    adamw = built(tower, muon=1.0, weight_decay=0.5)
    weight = tower.blocks[0].weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    adamw.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.01 * 0.5))


def test_muon_learns_and_a_state_by_name_continues_it_exactly() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = torch.sin(x[:, :4])

    def run(tower: Tower, adamw: torch.optim.AdamW, steps: int) -> float:
        for _ in range(steps):
            loss = (tower(x) - y).square().mean()
            adamw.zero_grad()
            loss.backward()
            optimizer.step_down(adamw, tower, lr=0.02, clip_norm=9.0)
        return loss.item()

    whole = Tower()
    start = {name: p.detach().clone() for name, p in whole.named_parameters()}
    adamw = built(whole, muon=1.0)
    assert isinstance(adamw, Muon)
    first = run(whole, adamw, 1)
    halfway = optimizer.moments(adamw, whole)
    assert set(halfway) >= {"exp_avg/blocks.0.weight", "exp_avg_sq/head.weight"}
    assert "exp_avg_sq/blocks.0.weight" not in halfway
    halfway = {name: tensor.clone() for name, tensor in halfway.items()}
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    assert run(whole, adamw, 60) < 0.3 * first

    resumed = Tower()
    resumed.load_state_dict(weights)
    again = built(resumed, muon=1.0)
    optimizer.set_moments(again, resumed, halfway)
    run(resumed, again, 60)
    for name, p in whole.named_parameters():
        assert torch.equal(p, dict(resumed.named_parameters())[name]), name
    assert any(not torch.equal(p, start[name]) for name, p in whole.named_parameters())
