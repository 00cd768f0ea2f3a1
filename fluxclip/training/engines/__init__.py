"""Engines: one file each makes the steps of a run, on one process or many, by the same verbs.

`make(forward, settings) -> Engine`, where `settings` are those of the recipe's optimizer.
"""

from typing import Protocol

from torch import Tensor

from fluxclip.data.loader import Step


class Engine(Protocol):
    """What the training loop asks of an engine; every process calls every verb in step."""

    def loss(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """The loss of this process's pairs, and its parts by name."""

    def step_down(self, loss: Tensor, *, lr: float) -> float:
        """One optimizer step at rate `lr` along the mean over processes of the gradients.

        Returns their norm before it was cut; where that is no number, nothing was stepped.
        """

    def state(self) -> dict[str, Tensor]:
        """Whole tensors by the names that training/checkpoint.py lists, on every process."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state` gave, in this engine or another, with as many processes or others."""
