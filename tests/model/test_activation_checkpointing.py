"""What a training step keeps for its backward pass, and that computing it again changes nothing."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fluxclip.model.attention import Segments, attend
from fluxclip.model.presets import preset
from fluxclip.model.video_tower import VideoTower
from fluxclip.tokens.draws import Draws

SMALL: dict[str, Any] = {"width": 64, "depth": 8, "heads": 2, "pool_heads": 2, "pooled": 64}


class MemoryHeld(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.held:
                    self.held[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.held.pop(key)


def clips(num_clips: int = 3, *, frames: int = 4, side: int = 56) -> Tensor:
    """Noise of which a part, different in every clip, stands still."""
    x = torch.randn(num_clips, frames, side, side, 3, generator=torch.Generator().manual_seed(0))
    for i in range(num_clips):
        x[i, :, : 14 * i] = x[i, :1, : 14 * i]
    return x


def step(tower: VideoTower, frames: Tensor, draws: Draws | None) -> dict[str, Tensor]:
    """Gradients of a step of two views, as training makes them."""
    tower.zero_grad()
    torch.manual_seed(1)
    patches = tower.embed(frames)
    total = torch.zeros(())
    for budget in (40, 16):
        own = draws and draws.at(budget)
        encoded = tower.encode(patches, tower.select(patches, budget, draws=own), draws=own)
        total = total + (tower.pool(encoded) ** 2).sum()
    total.backward()
    return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["draws", "generator", "packed"])
def test_gradients_are_the_same_with_drop_path_on(kind: str) -> None:
    """What is dropped is a function of the clip, or of torch's generator, which is wound back."""
    torch.manual_seed(0)
    changes = {"filter": "run_length"} if kind == "packed" else {}
    tower = VideoTower(preset("tiny", **SMALL, drop_path=0.5, scorer="random_drop", **changes))
    draws = None if kind == "generator" else Draws(7, torch.arange(3))
    expected, state = step(tower, clips(), draws), torch.get_rng_state()
    other = step(tower, clips(), draws and Draws(8, torch.arange(3)))
    tower.recompute = True
    found = step(tower, clips(), draws)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.keys() == expected.keys() == dict(tower.named_parameters()).keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name
    if draws:
        name = "blocks.5.attn.qkv.weight"
        assert not torch.allclose(other[name], expected[name], rtol=0.1)  # what is random counts


def test_the_most_memory_that_activations_take_is_far_less() -> None:
    """A8: at most 0.45 of it, what the backward pass computes again included."""
    torch.manual_seed(0)
    tower = VideoTower(preset("tiny", **SMALL, drop_path=0.2))
    frames, most = clips(2, frames=8, side=112), []
    for recompute in (False, True):
        tower.recompute = recompute
        tower.zero_grad(set_to_none=True)
        with MemoryHeld() as memory:
            total = tower(frames).square().sum()
            total.backward()
        most.append(memory.most)
    assert most[1] <= 0.45 * most[0]


def written_out(q_BND: Tensor, k_BND: Tensor, v_BND: Tensor) -> Tensor:
    return (q_BND @ k_BND.mT).softmax(-1) @ v_BND


@pytest.mark.parametrize("kind", ["dense", "packed", "written out"])
def test_attention_keeps_no_matrix_of_tokens_by_tokens(kind: str) -> None:
    """A7: twice the tokens, twice the bytes, in the backward pass as well."""
    most = []
    for tokens in (256, 512, 1024):
        lengths = (tokens, tokens // 2) if kind == "packed" else (tokens, tokens)
        shape = (sum(lengths), 64) if kind == "packed" else (2, tokens, 64)
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        segments = Segments(lengths) if kind == "packed" else None
        with MemoryHeld() as memory:
            if kind == "written out":
                written_out(q, k, v).sum().backward()
            else:
                attend(q, k, v, heads=2, segments=segments).sum().backward()
        most.append(memory.most)
    ratios = [most[1] / most[0], most[2] / most[1]]
    # the bound that would miss such a matrix is none
    assert min(ratios) > 2.5 if kind == "written out" else max(ratios) <= 2.2


def test_a_tower_keeps_memory_by_its_tokens() -> None:
    """The blocks of twice the tokens keep at most 2.2 times the bytes."""
    torch.manual_seed(0)
    tower = VideoTower(preset("tiny", **SMALL))
    most = []
    for frames in (4, 8):
        with MemoryHeld() as memory:
            tower(clips(1, frames=frames, side=112)).sum()
        most.append(memory.most)
    assert most[1] <= 2.2 * most[0]


def test_compiled_blocks_have_the_same_gradients_on_every_grid() -> None:
    """Grids, budgets and numbers of clips change, what was compiled first serves them all."""
    torch.manual_seed(0)
    tower = VideoTower(preset("tiny", **{**SMALL, "depth": 2}, drop_path=0.5))
    names = list(tower.state_dict())
    cases = [(3, 4, 56), (2, 8, 56), (4, 2, 84), (3, 5, 28)]

    def steps() -> list[dict[str, Tensor]]:
        return [
            step(tower, clips(n, frames=t, side=side), Draws(7, torch.arange(n)))
            for n, t, side in cases
        ]

    expected = steps()
    tower.compile_blocks()
    compiled = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    for recompute in (False, True):
        tower.recompute = recompute
        for found, gradients in zip(steps(), expected, strict=True):
            for name, gradient in gradients.items():
                assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
    # ahead of attention, behind it, and behind it in a block that drops paths
    assert compiled["unique_graphs"] - before == 3
    assert list(tower.state_dict()) == names
