"""Engine `deepspeed`: processes that share moments (ZeRO 1) and gradients (ZeRO 2) among them.

ZeRO: arXiv 1910.02054. Weights stay whole and fp32 in every process and are what the towers see;
bf16 is autocast, as in the engine `plain`, so that both make the same steps to rounding.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fluxclip import distributed
from fluxclip.data.batch import Step
from fluxclip.training import gradient_cache, optimizer
from fluxclip.training.forward import Forward
from fluxclip.training.recipe import Recipe

# numbers that are exchanged at once at most: DeepSpeed sets so much memory apart
_BUCKET = 50_000_000


class DeepSpeed:
    """Stage 0 shares nothing, 1 the moments, 2 also the gradients once they are averaged."""

    def __init__(self, forward: Forward, recipe: Recipe) -> None:
        self.forward, self.recipe, o = forward, recipe, recipe.optimizer
        self.adamw = optimizer.build(
            forward, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, muon=o.muon
        )
        self.trained = [p for p in forward.parameters() if p.requires_grad]
        if recipe.zero_stage == 2 and forward.some_unused and distributed.world_size() > 1:
            raise ValueError(
                "zero_stage = 2 gives gradients away in the order in which they are ready, and "
                "with a teacher or a projector for each budget processes differ in it: set "
                "zero_stage=1"
            )
        self.engine = _initialize(
            forward,
            self.adamw,
            {
                "train_micro_batch_size_per_gpu": max(
                    1, sum(source.batch for source in recipe.data) // distributed.world_size()
                ),
                "gradient_clipping": o.clip_norm,
                "zero_optimization": {
                    "stage": recipe.zero_stage,
                    "reduce_bucket_size": min(_BUCKET, sum(p.numel() for p in self.trained)),
                    "allgather_bucket_size": _BUCKET,
                },
                "zero_allow_untested_optimizer": True,
                "timers": {"throughput": {"enabled": False}},  # waits for the GPU
            },
        )
        self.zero: Any = self.engine.optimizer if recipe.zero_stage else None
        if self.zero:
            self._start_moments()

    def backward(self, step: Step) -> tuple[float, dict[str, float]]:
        self._forget_gradients()
        return gradient_cache.backward(
            self.forward, step, pieces=self.recipe.pieces, call=self.engine,
            run_back=self._run_back, silent=self._silent,
        )  # fmt: skip

    def step_down(self, *, lr: float) -> float:
        if not self.zero:
            clip_norm = self.recipe.optimizer.clip_norm
            norm = optimizer.step_down(self.adamw, self.forward, lr=lr, clip_norm=clip_norm)
        else:
            optimizer.set_rate(self.adamw, lr)
            self.engine.step()  # leaves out a step whose gradient is no number
            norm = float(self.engine.get_global_grad_norm())
        if math.isfinite(norm):
            self._clamp_scale()
        return norm

    def shapes(self) -> dict[str, Tensor]:
        return optimizer.shapes(self.adamw, self.forward)

    def state(self) -> dict[str, Tensor]:
        weights = self.forward.state()
        if not self.zero:
            return weights | optimizer.moments(self.adamw, self.forward)
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        is_first = distributed.rank() == 0
        for name, parameter, steps in self._shared():
            for key in ("exp_avg", "exp_avg_sq"):
                whole = safe_get_full_optimizer_state(parameter, key)
                if is_first:  # one after the other: together they need not fit onto a GPU
                    found[f"{key}/{name}"] = whole.cpu()
            found[f"step/{name}"] = steps.clone()
        return weights | found if is_first else {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, own in self.forward.state().items():
                own.copy_(tensors[name])
        if not self.zero:
            optimizer.set_moments(self.adamw, self.forward, tensors)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        self.zero.refresh_fp32_params()
        for name, parameter, steps in self._shared():
            for key in ("exp_avg", "exp_avg_sq"):
                value = tensors[f"{key}/{name}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, key)
            # one count for all of a group: those that differ in it had no part in the first steps
            steps.copy_(torch.maximum(steps, tensors[f"step/{name}"].to(steps.device)))

    def _shared(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Each trained parameter with its name and the step count of the group it is in."""
        names = {id(parameter): name for name, parameter in self.forward.named_parameters()}
        flats = self.zero.single_partition_of_fp32_groups
        for group, flat in zip(self.zero.bit16_groups, flats, strict=True):
            for parameter in group:
                yield names[id(parameter)], parameter, self.adamw.state[flat]["step"]

    def _start_moments(self) -> None:
        """Zeros, as of a run's start: DeepSpeed makes them at the first step, a state is older."""
        for flat in self.zero.single_partition_of_fp32_groups:
            self.adamw.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        self.zero._lazy_init_hp_params_optimizer_state()

    def _clamp_scale(self) -> None:
        self.forward.model.clamp_scale()
        scale = self.forward.model.log_scale
        if self.zero and scale.requires_grad:
            from deepspeed.utils import safe_set_full_fp32_param

            # else the next step starts from what ZeRO keeps of it, which was not clamped
            safe_set_full_fp32_param(scale, scale.detach())

    def _run_back(self, loss: Tensor) -> None:
        if self.recipe.zero_stage == 1 and self.engine.is_gradient_accumulation_boundary():
            # what has no part in this process's loss may have one in another's, and what is
            # exchanged has to be equally long in all
            for parameter in self.trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self.engine.backward(loss)

    def _forget_gradients(self) -> None:
        """Start a step without what is left of one that was skipped."""
        self.engine.zero_grad()
        if self.zero:
            self.zero.zero_grad()
            for held in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
                for group in held:
                    held[group] = None

    @contextmanager
    def _silent(self) -> Iterator[None]:
        """Gradients of a piece stay in the process: the last piece's are exchanged with them."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)


def _library() -> ModuleType:
    """The package deepspeed, without its talk on standard output; ValueError if not installed."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise ValueError(
            f"engine = \"deepspeed\" needs {error.name}: pip install 'fluxclip[deepspeed]'"
        ) from error
    package: ModuleType = deepspeed
    return package


deepspeed = _library()


def _initialize(forward: Forward, adamw: torch.optim.AdamW, config: dict[str, object]) -> Any:
    """DeepSpeed's engine around what is trained and what trains it."""
    # else a CPU compiles, for 20 s, an operation for inference that training has no use for
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    distributed.join_alone()
    # which GPU of those that this process sees: with one for each task, not the task's number
    os.environ["LOCAL_RANK"] = str(forward.device.index or 0)
    # DeepSpeed 0.19 cannot broadcast numbers without an axis, but leaves out what has this mark;
    # nothing is lost, as all processes make the same weights from the same seed
    scalars = [parameter for parameter in forward.parameters() if parameter.ndim == 0]
    for scalar in scalars:
        scalar.ds_optim_param = True  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, _, _, _ = deepspeed.initialize(
            model=forward, optimizer=adamw, config=config, dist_init_required=False
        )
    for scalar in scalars:
        del scalar.ds_optim_param  # type: ignore[attr-defined]
    return engine


def make(forward: Forward, recipe: Recipe) -> DeepSpeed:
    """The engine over all that `forward` trains."""
    return DeepSpeed(forward, recipe)
