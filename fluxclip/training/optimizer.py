"""Parameter groups, learning rate, optimizer: pure functions of the settings."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fluxclip.training.muon import Muon

if TYPE_CHECKING:
    from fluxclip.training.forward import Forward


def learning_rate(step: int, *, steps: int, warmup_steps: int, lr: float, final_lr: float) -> float:
    """Linear from lr / warmup_steps to lr, then a cosine down to final_lr * lr at the last step."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return lr * (final_lr + (1 - final_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def parameter_groups(
    model: nn.Module, *, weight_decay: float, muon: float = 0.0
) -> list[dict[str, object]]:
    """Trained parameters, with weight decay on matrices only.

    None on vectors and scalars (norms, biases, LayerScale, temperature) and on the position table.
    muon: above 0, the matrices of transformer blocks are a group for Muon. Each group has `scale`,
    what the rate of a step is multiplied by.
    """
    blocks: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and not name.endswith("positions.table")
        in_block = matrix and muon > 0 and ".blocks." in f".{name}" and parameter.ndim == 2
        (blocks if in_block else decayed if matrix else free).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "scale": 1.0},
        {"params": free, "weight_decay": 0.0, "scale": 1.0},
        *([_muon_group(blocks, weight_decay, muon)] if blocks else []),
    ]


def _muon_group(
    matrices: list[nn.Parameter], weight_decay: float, muon: float
) -> dict[str, object]:
    return {
        "params": matrices, "weight_decay": weight_decay, "scale": muon, "orthogonal": True
    }  # fmt: skip


def build(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float,
    muon: float = 0.0,
) -> torch.optim.AdamW:  # fmt: skip
    """AdamW, or Muon for some, over the groups above; `set_rate` sets the rate of each step."""
    groups = parameter_groups(model, weight_decay=weight_decay, muon=muon)
    kind = Muon if muon else torch.optim.AdamW
    return kind(groups, lr=lr, betas=betas, eps=1e-6, fused=True)


def set_rate(adamw: torch.optim.Optimizer, lr: float) -> None:
    """Make `lr` the rate of the next step, each group scaled as it wants."""
    for group in adamw.param_groups:
        group["lr"] = lr * group["scale"]


def step_down(
    adamw: torch.optim.Optimizer, model: nn.Module, *, lr: float, clip_norm: float
) -> float:
    """One step at rate `lr` along the gradients there are; returns their norm before it was cut.

    Where the norm is no number, there is no step. What had no part in the loss is stepped too,
    along a gradient of zero: so all engines do, and all processes of any number.
    """
    set_rate(adamw, lr)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item()
    if math.isfinite(norm):
        adamw.step()
    return norm


def moments(adamw: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """What is remembered of each trained parameter: exp_avg/NAME, exp_avg_sq/NAME, step/NAME.

    The moments have the parameter's shape, the count of its steps is a scalar; all are fp32. Muon
    has exp_avg alone. A parameter that has had no gradient yet has zeros, which is what it starts
    from.
    """
    found: dict[str, Tensor] = {}
    for name, parameter, fresh in _fresh(adamw, model):
        held = adamw.state.get(parameter) or fresh
        found |= {f"{key}/{name}": held[key] for key in fresh}
    return found


def shapes(adamw: torch.optim.AdamW, forward: "Forward") -> dict[str, Tensor]:
    """Weights and moments by name as a state has them, on the device "meta"."""
    found = {name: tensor.to("meta") for name, tensor in forward.state().items()}
    for name, _, fresh in _fresh(adamw, forward):
        found |= {f"{key}/{name}": zeros.to("meta") for key, zeros in fresh.items()}
    return found


def set_moments(adamw: torch.optim.AdamW, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the optimizer remember what `moments` gave."""
    for name, parameter, fresh in _fresh(adamw, model):
        # copied into memory laid out as the optimizer's own, so that its kernels take the same path
        adamw.state[parameter] = {
            key: zeros.copy_(tensors[f"{key}/{name}"]) for key, zeros in fresh.items()
        }


def _fresh(
    adamw: torch.optim.AdamW, model: nn.Module
) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor]]]:
    """Each trained parameter with its name and what is remembered of it at the start."""
    by_muon = {
        id(matrix)
        for group in adamw.param_groups
        if group.get("orthogonal")
        for matrix in group["params"]
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fresh = {"exp_avg": torch.zeros_like(parameter)}
            if id(parameter) not in by_muon:
                fresh["exp_avg_sq"] = torch.zeros_like(parameter)
                fresh["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            yield name, parameter, fresh
