"""Engine `deepspeed`: processes that share moments (ZeRO 1) and gradients (ZeRO 2) among them.

ZeRO: arXiv 1910.02054. Weights stay whole and fp32 in every process and are what the towers see;
bf16 is autocast, as in the engine `plain`, so that both make the same steps to rounding.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fluxclip import distributed
from fluxclip.data.loader import Step
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
        trained = [p for p in forward.parameters() if p.requires_grad]
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
                    "reduce_bucket_size": min(_BUCKET, sum(p.numel() for p in trained)),
                    "allgather_bucket_size": _BUCKET,
                },
                "zero_allow_untested_optimizer": True,
            },
        )
        self.zero: Any = self.engine.optimizer if recipe.zero_stage else None
        if self.zero:
            self._start_moments()

    def backward(self, step: Step) -> tuple[float, dict[str, float]]:
        self._forget_gradients()
        return gradient_cache.backward(
            self.forward, step, pieces=self.recipe.pieces, call=self.engine,
            run_back=self.engine.backward, silent=self._silent,
        )  # fmt: skip

    def step_down(self, *, lr: float) -> float:
        if not self.zero:
            clip_norm = self.recipe.optimizer.clip_norm
            return optimizer.step_down(self.adamw, self.forward, lr=lr, clip_norm=clip_norm)
        optimizer.set_rate(self.adamw, lr)
        self.engine.step()  # leaves out a step whose gradient is no number
        return float(self.engine.get_global_grad_norm())

    def state(self) -> dict[str, Tensor]:
        weights = self.forward.state()
        if not self.zero:
            return weights | optimizer.moments(self.adamw, self.forward)
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        for name, parameter, steps in self._shared():
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key)
            found[f"step/{name}"] = steps.clone()
        return weights | found

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


def library() -> ModuleType:
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


def _initialize(forward: Forward, adamw: torch.optim.AdamW, config: dict[str, object]) -> Any:
    """DeepSpeed's engine around what is trained and what trains it."""
    deepspeed = library()
    # else a CPU compiles, for 20 s, an operation for inference that training has no use for
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    distributed.join_alone()
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
