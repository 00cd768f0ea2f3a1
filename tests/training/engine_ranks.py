"""Ten steps of a small run by each engine, in 1 and 2 processes.

`python engine_ranks.py FOLDER EMOJI` writes to FOLDER/NAME-R.pt what rank R of each setup in SETUPS
found: gradients of the first step, losses and norms of all, the bytes its moments take, its states
before step HALF and at the end, whether steps can be skipped. For the pairs in MOVES it writes to
FOLDER/FROM-0-to-NAME-R.pt the losses after taking up the state that another setup had at HALF.
"""

import math
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_run import read, small_run
from torch import Tensor

from fluxclip.data import loader
from fluxclip.data.batch import Step
from fluxclip.training import engines, optimizer
from fluxclip.training.engines.deepspeed import deepspeed  # noqa: F401  see main
from fluxclip.training.engines.plain import Plain
from fluxclip.training.forward import Features, Forward
from fluxclip.training.loop import dataset

STEPS, HALF = 10, 5
# name: processes and what to change in the recipe
SETUPS: dict[str, tuple[int, list[str]]] = {
    "plain": (1, []),
    "zero-0": (2, ["engine=deepspeed", "zero_stage=0"]),
    "zero-1": (2, ["engine=deepspeed", "zero_stage=1"]),
    "zero-1-pieces": (2, ["engine=deepspeed", "pieces=3", "activation_checkpointing=true"]),
    "zero-2": (4, ["engine=deepspeed", "zero_stage=2"]),
}
# whose state is taken up by whom
MOVES = [("plain", "zero-1"), ("zero-1", "plain"), ("zero-2", "zero-1")]


def gradient(forward: Forward, engine: Any) -> dict[str, Tensor]:
    """Of all trained parameters, averaged over processes."""
    from deepspeed.utils import safe_get_full_grad

    trained = [(name, p) for name, p in forward.named_parameters() if p.requires_grad]
    if getattr(engine, "zero", None):
        return {name: safe_get_full_grad(p).clone() for name, p in trained}
    return {name: p.grad.clone() for name, p in trained if p.grad is not None}


def copy(engine: Any) -> dict[str, Tensor]:
    """The state as it is now."""
    return {name: tensor.clone() for name, tensor in engine.state().items()}


def run(forward: Forward, engine: Any, data: loader.Steps, first: int, found: dict) -> list[float]:
    """Steps from the first to the last; their losses over all processes."""
    losses = []
    for number in range(first, STEPS):
        if number == HALF and first == 0:
            found["half"] = copy(engine)
        loss, _ = engine.backward(data[number])
        if number == 0:
            found["gradient"] = gradient(forward, engine)
        lr = optimizer.learning_rate(number, steps=STEPS, warmup_steps=2, lr=1e-3, final_lr=0.01)
        found.setdefault("norms", []).append(engine.step_down(lr=lr))
        of_all = torch.tensor(loss)
        if dist.is_initialized():
            dist.all_reduce(of_all)
            of_all /= dist.get_world_size()
        losses.append(of_all.item())
    return losses


def without_a_step(forward: Forward, engine: Any, step: Step) -> bool:
    """Whether a step whose loss is no number leaves no trace, neither taken nor left out."""
    before = copy(engine)
    scale = forward.model.log_scale
    kept = scale.detach().clone()
    engine.backward(step)
    right = gradient(forward, engine)
    for is_taken in (False, True):
        with torch.no_grad():
            scale.fill_(math.nan)
        loss, _ = engine.backward(step)
        norm = engine.step_down(lr=1.0) if is_taken else math.nan
        if math.isfinite(loss) or math.isfinite(norm):
            return False
        with torch.no_grad():
            scale.copy_(kept)
        engine.backward(step)
        again = gradient(forward, engine)
        if not all(torch.allclose(again[n], right[n], rtol=1e-4, atol=1e-7) for n in right):
            return False
    after = engine.state()
    return all(torch.equal(after[name], tensor) for name, tensor in before.items())


def scale_after_the_clamp(forward: Forward, engine: Any, step: Step) -> float:
    """The temperature when it was pushed against its end for some steps, then back."""
    scale = forward.model.log_scale
    is_plain = isinstance(engine, Plain)
    for sign in (-1.0, 1.0):
        for _ in range(6):

            def push(features: Features, sign: float = sign) -> Tensor:
                return sign * scale + 0 * sum(x.sum() for x in features.tensors)

            engine.adamw.zero_grad() if is_plain else engine._forget_gradients()
            loss, _ = (engine.call if is_plain else engine.engine)(step, push)
            loss.backward() if is_plain else engine._run_back(loss)
            engine.step_down(lr=1.0)
    return scale.item()


def moment_bytes(engine: Any) -> int:
    held = [x for state in engine.adamw.state.values() for x in state.values()]
    return sum(x.untyped_storage().nbytes() for x in held if x.ndim)


def work(rank: int, name: str, forward: Forward, data: loader.Steps, folder: Path, base: list[str],
         start: Path | None) -> None:  # fmt: skip
    """One process of a setup; `start`: a state to take up before step HALF."""
    world, changes = SETUPS[name]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if world > 1:
        store = f"file://{folder / f'store-{name}-{start.stem if start else 0}'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    recipe = read([*base, *changes])
    own = loader.Steps(
        data.sources, data.sampling, data.augment, seed=data.seed, rank=rank, world_size=world
    )
    forward.recipe = recipe
    if recipe.activation_checkpointing:
        forward.model.recompute_blocks()
    engine: Any = engines.make(recipe.engine, forward, recipe)
    found: dict = {}
    if start:
        engine.load_state(torch.load(start)["half"])
        found["losses"] = run(forward, engine, own, HALF, found)
        torch.save(found, folder / f"{start.stem}-to-{name}-{rank}.pt")
    else:
        found["losses"] = run(forward, engine, own, 0, found)
        found |= {"end": copy(engine), "bytes": moment_bytes(engine)}
        found["skips"] = without_a_step(forward, engine, own[0])
        found["scale"] = scale_after_the_clamp(forward, engine, own[0])
        torch.save(found, folder / f"{name}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def main(folder: Path, emoji: Path) -> None:
    torch.set_num_threads(1)
    base = [*small_run(folder, emoji), "model.drop_path=0.2", "flux.tokens=[16,64]"]
    recipe = read(base)
    data = dataset(recipe)
    for number in range(STEPS):
        data[number]  # decoded once, for all
    torch.manual_seed(0)
    forward = Forward(recipe.build(), data.sources, recipe)
    # deepspeed too is imported once, for all; with one thread there is nothing a fork could break
    fork = multiprocessing.get_context("fork")
    jobs = [(name, None) for name in SETUPS]
    jobs += [(name, folder / f"{source}-0.pt") for source, name in MOVES]
    for name, start in jobs:
        ranks = [
            fork.Process(target=work, args=(rank, name, forward, data, folder, base, start))
            for rank in range(SETUPS[name][0])
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(f"{name}: exit codes {[process.exitcode for process in ranks]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
