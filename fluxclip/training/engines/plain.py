"""Engine `plain`: one process, or several that average their gradients (torch's DDP)."""

from typing import Any

import torch
from torch import Tensor

from fluxclip import distributed
from fluxclip.data.batch import Step
from fluxclip.training import gradient_cache, optimizer
from fluxclip.training.forward import Forward
from fluxclip.training.recipe import Recipe


class Plain:
    """Whole weights and moments in every process."""

    def __init__(self, forward: Forward, recipe: Recipe) -> None:
        self.forward, self.recipe, o = forward, recipe, recipe.optimizer
        self.adamw = optimizer.build(
            forward, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, muon=o.muon
        )
        self.call: Any = distributed.averaging(forward, some_unused=forward.some_unused)

    def backward(self, step: Step) -> tuple[float, dict[str, float]]:
        self.adamw.zero_grad()
        silent = {} if self.call is self.forward else {"silent": self.call.no_sync}
        return gradient_cache.backward(
            self.forward, step, pieces=self.recipe.pieces, call=self.call, **silent
        )

    def step_down(self, *, lr: float) -> float:
        clip_norm = self.recipe.optimizer.clip_norm
        norm = optimizer.step_down(self.adamw, self.forward, lr=lr, clip_norm=clip_norm)
        self.forward.model.clamp_scale()
        return norm

    def shapes(self) -> dict[str, Tensor]:
        return optimizer.shapes(self.adamw, self.forward)

    def state(self) -> dict[str, Tensor]:
        return self.forward.state() | optimizer.moments(self.adamw, self.forward)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, own in self.forward.state().items():
                own.copy_(tensors[name])
        optimizer.set_moments(self.adamw, self.forward, tensors)


def make(forward: Forward, recipe: Recipe) -> Plain:
    """The engine over all that `forward` trains."""
    return Plain(forward, recipe)
