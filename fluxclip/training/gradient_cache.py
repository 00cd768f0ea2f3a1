"""Gradients of a step that does not fit into memory at once: exact, in pieces (GradCache).

arXiv 2101.06983: first the features of all pieces, without a graph; then the loss of all features
and its gradient with respect to them; then each piece again, and that gradient through it. What
the towers draw at random belongs to the clip or is drawn anew from the same seed, so both passes
see the same. It costs one more forward pass of the towers.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from fluxclip.data.batch import Step
from fluxclip.stages import stage
from fluxclip.training.forward import Features, Forward, Parts

Call = Callable[..., tuple[Tensor, Parts]]


def backward(
    forward: Forward,
    step: Step,
    *,
    pieces: int,
    call: Call | None = None,
    run_back: Callable[[Tensor], None] = torch.Tensor.backward,
    silent: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[float, dict[str, float]]:
    """Add the gradients of a step to the weights; its loss and the parts of it by name.

    pieces: as many as the step goes through in, at most as many as it has pairs. call: what
    `forward` is called through if an engine has wrapped it, run_back: how it takes gradients back,
    silent: a context in which processes do not exchange them yet.
    """
    call = call or forward
    if pieces == 1:
        with stage("forward"):
            loss, parts = call(step)
        with stage("backward"):
            run_back(loss)
        return _numbers(loss, parts)
    parts_of_step = step.split(pieces)
    with torch.no_grad(), stage("forward"):
        cached = [forward.encode(part) for part in parts_of_step]
    whole = _joined(cached)
    for tensor in whole.tensors:
        tensor.requires_grad_()
    with stage("forward"):
        loss, parts = forward.loss(whole, number=step.number)
    inputs = [*whole.tensors, *forward.heads]
    with stage("backward"):
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
    of_features, of_heads = found[: len(whole.tensors)], found[len(whole.tensors) :]
    starts = [0] * len(whole.tensors)
    for i, (part, piece) in enumerate(zip(parts_of_step, cached, strict=True)):
        ends = [start + len(x) for start, x in zip(starts, piece.tensors, strict=True)]
        gradients = [
            None if gradient is None else gradient[start:end]
            for gradient, start, end in zip(of_features, starts, ends, strict=True)
        ]
        starts, is_last = ends, i == len(cached) - 1
        heads = zip(forward.heads, of_heads, strict=True) if is_last else ()
        then = partial(_product, gradients=gradients, heads=list(heads))
        with nullcontext() if is_last else silent():
            with stage("forward"):
                product = call(part, then)[0]
            with stage("backward"):
                run_back(product)
    return _numbers(loss, parts)


def _numbers(loss: Tensor, parts: Parts) -> tuple[float, dict[str, float]]:
    """A loss and its parts, waited for once, when the backward pass is already under way."""
    on_device = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
    values = torch.stack([x.detach().double() for x in (loss, *on_device.values())]).tolist()
    known = dict(zip(on_device, values[1:], strict=True))
    return values[0], {name: known.get(name, part) for name, part in parts.items()}


def _product(
    features: Features, *, gradients: Sequence[Tensor | None],
    heads: Sequence[tuple[Tensor, Tensor | None]],
) -> Tensor:  # fmt: skip
    """A number whose gradient is that of the loss."""
    pairs = [*zip(features.tensors, gradients, strict=True), *heads]
    products = [(x.float() * gradient).sum() for x, gradient in pairs if gradient is not None]
    return torch.stack(products).sum()


def _joined(pieces: list[Features]) -> Features:
    """The features of all pieces, one after the other, apart from any graph."""
    views = [torch.cat(of_budget) for of_budget in zip(*(p.views_BD for p in pieces), strict=True)]
    return Features(
        views_BD=tuple(views),
        text_BD=torch.cat([piece.text_BD for piece in pieces]),
        distance_B=torch.cat([piece.distance_B for piece in pieces]),
        captions=tuple(caption for piece in pieces for caption in piece.captions),
        names=tuple(name for piece in pieces for name in piece.names),
        num_tokens=sum(piece.num_tokens for piece in pieces),
        flops=sum(piece.flops for piece in pieces),
    )
