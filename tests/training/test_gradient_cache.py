"""Steps in pieces: the gradients of the whole step, with all that is random on."""

import math
import weakref
from typing import Any

import pytest
import torch
from small_run import QUIET, metrics, read

from fluxclip.data.batch import Step
from fluxclip.training import gradient_cache
from fluxclip.training.forward import Forward
from fluxclip.training.loop import dataset, train

RANDOM = ["model.drop_path=0.3", "model.scorer=random_drop", "flux.tokens=[64,64]"]


def forward_of(changes: list[str]) -> tuple[Forward, Step]:
    recipe = read(changes)
    torch.manual_seed(0)
    data = dataset(recipe)
    return Forward(recipe.build(), data.sources, recipe), data[0]


def gradients(forward: Forward, step: Step, pieces: int) -> tuple[float, dict[str, torch.Tensor]]:
    forward.zero_grad()
    loss, _ = gradient_cache.backward(forward, step, pieces=pieces)
    return loss, {n: p.grad.clone() for n, p in forward.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", ["contrastive", "sigmoid"])
def test_pieces_have_the_gradients_of_the_whole(changes: list[str], objective: str) -> None:
    forward, step = forward_of([*changes, *RANDOM, "negatives=all", f"objective={objective}"])
    loss, expected = gradients(forward, step, 1)
    again = gradients(forward, step, 1)[1]
    other = gradients(forward, Step(1, step.draw, step.batches, {}), 1)[1]
    name = "model.video.blocks.3.attn.qkv.weight"
    assert torch.equal(expected[name], again[name])
    assert not torch.allclose(expected[name], other[name], rtol=0.1)  # what is random counts
    for pieces in (2, 5, 8):
        in_pieces, found = gradients(forward, step, pieces)
        assert in_pieces == pytest.approx(loss, rel=1e-5)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / (gradient.norm() + 1e-8)
            assert error < 1e-5 or (found[name] - gradient).abs().max() < 1e-8, (pieces, name)


def test_memory_is_that_of_a_piece(changes: list[str]) -> None:
    """What autograd keeps at once: a step four times as large takes no more in as large pieces."""
    kept = []
    for batch, pieces in ((4, 1), (16, 1), (16, 4)):
        sizes = [f"data.0.batch={batch}", f"data.1.batch={batch // 2}"]
        forward, step = forward_of([*changes, *sizes, "flux.tokens=[64,64]"])
        kept.append(most_kept(forward, step, pieces))
    assert kept[1] > 3.5 * kept[0]
    assert kept[2] < 1.25 * kept[0]


def most_kept(forward: Forward, step: Step, pieces: int) -> int:
    """The most bytes that were kept for the backward pass at a time, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in forward.parameters()}
    held: dict[int, int] = {}
    most = 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: torch.Tensor) -> Any:
        nonlocal most
        storage = tensor.untyped_storage()
        holder = Held(tensor)
        if storage.data_ptr() not in weights:
            held[id(holder)] = storage.nbytes()
            weakref.finalize(holder, held.pop, id(holder), None)
            most = max(most, sum(held.values()))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        gradient_cache.backward(forward, step, pieces=pieces)
    return most


def test_a_run_in_pieces_is_the_run(changes: list[str], tmp_path: Any) -> None:
    short = [*changes, *RANDOM, "optimizer.steps=4", "optimizer.warmup_steps=1"]
    losses = []
    for pieces in (1, 3):
        output = [f"pieces={pieces}", f"output={tmp_path / str(pieces)}"]
        folder = train(read([*short, *output]), console=QUIET)
        losses.append([row["loss"] for row in metrics(folder) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert not math.isclose(losses[0][0], losses[0][1])
