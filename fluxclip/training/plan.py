"""What a recipe would train, on what and at what cost, found out before any step is spent."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fluxclip import distributed, plugins
from fluxclip.data import sources as data_sources
from fluxclip.data.sources import Records
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.training import wandb_log
from fluxclip.training.flops import clip_macs, passes
from fluxclip.training.forward import refuse_without_compiler
from fluxclip.training.loop import dataset
from fluxclip.training.recipe import Recipe
from fluxclip.training.validation import Validation


@dataclass
class Plan:
    """Lines to read, and the files that a run would miss."""

    lines: list[str] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """Records of a [[data]] section, how many are in a step, and how many of these are pictures."""

    name: str
    num_records: int
    num_looked_at: int
    batch: int
    num_stills: float


def plan(recipe: Recipe) -> Plan:
    """Read the recipe's files and build its model, write nothing.

    The work is that of the video tower, by its own count. The memory of activations is measured on
    one clip, in fp32 (bf16 takes about half), and multiplied; what a step needs beyond what the
    backward pass keeps is not in it. Raises ValueError for files that are there and wrong.
    """
    found = Plan()
    sources = list(_sources(recipe, found.missing))
    if not found.missing:  # what a run would find wrong besides
        dataset(recipe)
        Validation(recipe.validation)
    for kind, name in (("objectives", recipe.objective), ("engines", recipe.engine)):
        plugins.load(f"fluxclip.training.{kind}", name)
    if recipe.compile:
        refuse_without_compiler()
    if recipe.wandb:
        wandb_log.refuse_without()
    model = recipe.build()
    found.lines += _parameters(model, recipe)
    o = recipe.optimizer
    for source in sources:
        epochs = o.steps * source.batch / source.num_records
        by = f"; missing files and stills by {source.num_looked_at:,} of them"
        found.lines.append(
            f"data: {source.name}, {source.num_records:,} records, {source.batch} a step, "
            f"{epochs:,.1f} epochs{by if source.num_looked_at < source.num_records else ''}"
        )
    if not sources:
        return found
    pairs = sum(source.batch for source in sources)
    found.lines.append(f"steps: {o.steps:,} of {pairs:,} pairs, {o.steps * pairs:,} in all")
    found.lines.append(str(recipe.sampling()))
    found.lines += _work(model, recipe, sources)
    found.lines.append(_memory(model, recipe, pairs))
    return found


def _sources(recipe: Recipe, missing: list[Path]) -> Iterator[Source]:
    """The sources whose annotations are there; files that are not, validation's too, are noted."""
    for section in recipe.data:
        records = _records(section.source, section.annotations, missing)
        if section.teacher and not Path(section.teacher).is_file():
            missing.append(Path(section.teacher))
        if records is not None:
            looked_at = data_sources.looked_at(len(records))
            stills = sum(records[i].is_still for i in looked_at) / len(looked_at)
            name = data_sources.shown(section.annotations)
            yield Source(name, len(records), len(looked_at), section.batch, stills * section.batch)
    _records("annotations", recipe.validation.annotations, missing)


def _records(kind: str, name: str, missing: list[Path]) -> Records | None:
    """The records of a source, if its files are there; which of their own are not is noted."""
    if gone := [path for path in data_sources.files(kind, name) if not path.exists()]:
        missing += gone
        return None
    records = data_sources.read(kind, name, check_files=False)
    missing += data_sources.missing(records)
    return records


def _parameters(model: FluxCLIP, recipe: Recipe) -> list[str]:
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        own = parameter.requires_grad
        part = name.partition(".")[0].replace("_", " ")
        counts = trained if own else frozen
        counts[part] = counts.get(part, 0) + parameter.numel()
    start = f"started from {recipe.init}" if recipe.init else f"preset {recipe.model.preset}"
    return [f"model: {start}", f"trained: {_millions(trained)}", f"frozen: {_millions(frozen)}"]


def _millions(counts: dict[str, int]) -> str:
    largest = sorted(counts.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{part} {n / 1e6:.2f}" for part, n in largest if n >= 5_000)
    return f"{sum(counts.values()) / 1e6:.2f} M parameters" + (f" ({parts})" if parts else "")


def _work(model: FluxCLIP, recipe: Recipe, sources: list[Source]) -> list[str]:
    """Tokens and multiply-accumulates of a step, over the grids that may be drawn.

    What pieces and activation checkpointing compute a second time is work here.
    """
    stills = sum(source.num_stills for source in sources)
    clips = sum(source.batch for source in sources) - stills
    tokens, macs = [], []
    for num_frames, side in recipe.sampling().admissible:
        of_grid, work = 0.0, 0.0
        for count, frames in ((clips, num_frames), (stills, 1)):
            whole = model.num_tokens(frames, side)
            # budgets that a grid has no tokens for share a view; patches are embedded once for all
            views = {min(budget, whole) for budget in recipe.flux.budgets}
            of_grid += count * sum(views)
            work += count * clip_macs(model.video, embedded=whole, views=tuple(views))
        tokens.append(of_grid)
        again = (recipe.pieces > 1) + (model.video.recompute and not model.video_is_frozen)
        macs.append((passes(model.video) + again) * work)
    share = "; what a filter drops is not taken off" if model.config.video.filter else ""
    return [
        f"tokens: {min(tokens):,.0f} to {max(tokens):,.0f} a step into the blocks, {_mean(tokens)}"
        f"{share}",
        f"work: {np.mean(macs) / 1e12:.3g} tera multiply-accumulates a step, "
        f"{np.mean(macs) * recipe.optimizer.steps / 1e15:.3g} peta in all (video tower)",
    ]


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):,.0f} on average"


def _memory(model: FluxCLIP, recipe: Recipe, pairs: int) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    world_size = distributed.world_size()
    # of two moments for each weight a process has its share
    shares = world_size if recipe.engine == "deepspeed" and recipe.zero_stage else 1
    weights = 4 * sum(p.numel() for p in model.parameters()) + 4 * trained * (1 + 2 / shares)
    at_once = -(-pairs // (world_size * recipe.pieces))
    activations = kept_for_backward(model, recipe) * at_once
    each = f" in each of {world_size} processes" if world_size > 1 else ""
    return (
        f"memory{each}: {weights / 2**30:.2f} GiB for weights, gradients and moments, about "
        f"{activations / 2**30:.2f} GiB for activations of the video tower (fp32, every pair "
        f"a clip of the largest grid)"
    )


def kept_for_backward(model: FluxCLIP, recipe: Recipe) -> int:
    """Bytes that a clip of the largest grid, at all budgets, keeps for the backward pass.

    Where blocks are computed again there, those of the one block that is at it come on top.
    """
    num_frames, side = max(recipe.sampling().admissible, key=lambda grid: model.num_tokens(*grid))
    frames = torch.randn(1, num_frames, side, side, 3)
    kept = _kept(model, lambda: model.encode_video_views(frames, recipe.flux.budgets))
    if model.video.recompute and not model.video_is_frozen:
        c = model.config.video
        most = min(max(recipe.flux.budgets), model.num_tokens(num_frames, side))
        x_BKD = torch.randn(1, c.parts.class_token + most, c.width, requires_grad=True)
        kept += _kept(model, lambda: model.video.blocks[-1](x_BKD))
    return kept


def _kept(model: FluxCLIP, work: Callable[[], object]) -> int:
    """Bytes that autograd keeps of `work`, the model's weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept.setdefault(address, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
