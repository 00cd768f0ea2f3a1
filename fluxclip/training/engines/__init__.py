"""Engines: one file each makes the steps of a run, on one process or many, by the same verbs."""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from fluxclip import plugins
from fluxclip.data.batch import Step

if TYPE_CHECKING:
    from fluxclip.training.forward import Forward
    from fluxclip.training.recipe import Recipe


class Engine(Protocol):
    """What the training loop asks of an engine; every process calls every verb in step."""

    def backward(self, step: Step) -> tuple[float, dict[str, float]]:
        """The gradients of a step, averaged over processes; this one's loss and its parts."""

    def step_down(self, *, lr: float) -> float:
        """One optimizer step at rate `lr` along these gradients; the temperature stays in range.

        Returns their norm before it was cut; where that is no number, nothing was stepped.
        """

    def shapes(self) -> dict[str, Tensor]:
        """What `state` gives, by name, on the device "meta": without values."""

    def state(self) -> dict[str, Tensor]:
        """Whole tensors by the names that training/checkpoint.py lists, in the first process."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state` gave, in this engine or another, with as many processes or others."""


def make(name: str, forward: "Forward", recipe: "Recipe") -> Engine:
    """What `make(forward, recipe)` of the engine's file gives; ValueError for an unknown name."""
    engine: Engine = plugins.load("fluxclip.training.engines", name).make(forward, recipe)
    return engine
