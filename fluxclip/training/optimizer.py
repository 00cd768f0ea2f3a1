"""Parameter groups, learning rate, optimizer: pure functions of the settings."""

import math

import torch
from torch import nn


def learning_rate(step: int, *, steps: int, warmup_steps: int, lr: float, final_lr: float) -> float:
    """Linear from lr / warmup_steps to lr, then a cosine down to final_lr * lr at the last step."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return lr * (final_lr + (1 - final_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Trained parameters, with weight decay on matrices only.

    None on vectors and scalars (norms, biases, LayerScale, temperature) and on the position table.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and not name.endswith("positions.table")
        (decayed if matrix else free).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW over the groups above; the rate is set anew each step from `learning_rate`."""
    groups = parameter_groups(model, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-6, fused=True)
