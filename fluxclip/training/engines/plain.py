"""Engine `plain`: one process, or several that average their gradients (torch's DDP)."""

from typing import Any

import torch
from torch import Tensor

from fluxclip import distributed
from fluxclip.data.loader import Step
from fluxclip.training import optimizer
from fluxclip.training.forward import Forward
from fluxclip.training.recipe import OptimizerRecipe


class Plain:
    """Whole weights and moments in every process."""

    def __init__(self, forward: Forward, settings: OptimizerRecipe) -> None:
        self.forward, self.clip_norm = forward, settings.clip_norm
        self.adamw = optimizer.build(
            forward, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay,
            muon=settings.muon,
        )  # fmt: skip
        self.call: Any = distributed.averaging(forward, some_unused=forward.some_unused)

    def loss(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        loss, parts = self.call(step)
        return loss, parts

    def step_down(self, loss: Tensor, *, lr: float) -> float:
        return optimizer.step_down(self.adamw, self.forward, loss, lr=lr, clip_norm=self.clip_norm)

    def state(self) -> dict[str, Tensor]:
        return self.forward.state() | optimizer.moments(self.adamw, self.forward)

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, own in self.forward.state().items():
                own.copy_(tensors[name])
        optimizer.set_moments(self.adamw, self.forward, tensors)


def make(forward: Forward, settings: OptimizerRecipe) -> Plain:
    """The engine over all that `forward` trains."""
    return Plain(forward, settings)
