"""Packed batches: numbers and gradients as clip by clip, nothing leaks, nothing is padded."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from fluxclip.model.attention import Segments, attend, attend_once
from fluxclip.model.blocks import AttentionPool, Block
from fluxclip.model.presets import ANATOMIES, preset
from fluxclip.model.video_tower import VideoTower
from fluxclip.tokens.scorers import group_dynamic
from fluxclip.tokens.tubelets import tubelets

RUN_LENGTH = {"filter": "run_length", "filter_settings": {"threshold": 0.1}}


def tower(**changes: Any) -> VideoTower:
    torch.manual_seed(0)
    made = VideoTower(preset("tiny", depth=2, layer_scale=1.0, **changes)).eval()
    for parameter in made.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    if made.config.length_encoding:
        torch.nn.init.normal_(made.run_lengths)
    return made


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed))


def uneven(batch: int, num_frames: int = 4, side: int = 56) -> Tensor:
    """Clips of which more and more stands still: each keeps another number of tokens."""
    x = noise(batch, num_frames, side, side)
    for i in range(batch):
        rows = side * i // batch
        x[i, :, :rows] = x[i, :1, :rows]
    return x


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_packed_attention_equals_clip_by_clip_with_its_gradients() -> None:
    lengths, heads = (5, 5, 1, 9, 2), 4
    q, k, v = (noise(22, 16, seed=i).flatten(1).requires_grad_() for i in range(3))
    out = attend(q, k, v, heads=heads, segments=Segments(lengths))
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    parts = [x.split(lengths) for x in (q, k, v)]
    expected = torch.cat(
        [attend(*(x[i][None] for x in parts), heads=heads)[0] for i in range(len(lengths))]
    )
    close(out, expected)
    for a, b in zip(ours, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        close(a, b)


def test_one_query_per_clip_equals_softmax_and_counts_count() -> None:
    lengths, heads = (4, 1, 7), 2
    q, k, v = torch.randn(3, 8), torch.randn(12, 8), torch.randn(12, 8)
    count = torch.tensor([1, 3, 1, 2, 5, 1, 1, 1, 4, 1, 1, 2])
    plain = attend_once(q, k, v, heads=heads, segments=Segments(lengths))
    counted = attend_once(q, k, v, heads=heads, segments=Segments(lengths), count_S=count)
    parts = [x.split(lengths) for x in (k, v)]
    for i, own in enumerate(count.split(lengths)):
        keys, values = parts[0][i], parts[1][i]
        close(plain[i], attend(q[i][None, None], keys[None], values[None], heads=heads)[0, 0])
        keys, values = keys.repeat_interleave(own, 0), values.repeat_interleave(own, 0)
        close(counted[i], attend(q[i][None, None], keys[None], values[None], heads=heads)[0, 0])


def test_one_query_over_many_tokens_is_exact_in_half_precision_too() -> None:
    """Sums of thousands of bf16 numbers: in bf16 they would stop growing."""
    lengths = (3000, 500)
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 64, generator=drawn) for n in (2, 3500, 3500))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_() for x in (q, 0.1 * k, v + 1)]
        out = attend_once(inputs[0], inputs[1], inputs[2], heads=1, segments=Segments(lengths))
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        assert {x.dtype for x in (out, *gradients)} == {dtype}
        results.append([x.float() for x in (out, *gradients)])
    for exact, half in zip(*results, strict=True):
        assert (half - exact).norm() < 0.006 * exact.norm()


@pytest.mark.parametrize("anatomy", ["fluxvit", "clip"])
def test_under_autocast_a_gpu_s_packed_kernel_gets_half_precision(
    anatomy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q/k norm gives fp32 under autocast, which the kernel for packed batches refuses.

    On tensors that have a device and no content: no GPU is needed.
    """
    given = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        given.append([x.dtype for x in (q, k, v)])
        return torch.empty_like(v)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    block = Block(
        64, 2, mlp_ratio=2, gelu="tanh", layer_scale=0.1, drop_path=0, anatomy=ANATOMIES[anatomy]
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, parameter in block.named_parameters():
            owner, _, leaf = name.rpartition(".")
            on_gpu = torch.nn.Parameter(torch.empty(parameter.shape, device="cuda"))
            setattr(block.get_submodule(owner), leaf, on_gpu)
        x_SD = torch.empty(7, 64, device="cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            out = block(x_SD, Segments((3, 4), "cuda"))
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert out.shape == x_SD.shape and out.device.type == "cuda"
    assert given == [[torch.bfloat16] * 3]


def test_pooling_of_a_packed_batch_equals_the_dense_one() -> None:
    pool = AttentionPool(32, 4, 16)
    x = torch.randn(3, 7, 32)
    close(pool(x.flatten(0, 1), Segments((7, 7, 7))), pool(x))
    repeated = x.repeat_interleave(torch.tensor([1, 2, 1, 1, 3, 1, 1]), 1)
    count = torch.tensor([1, 2, 1, 1, 3, 1, 1]).repeat(3)
    close(pool(x.flatten(0, 1), Segments((7, 7, 7)), count), pool(repeated))


@pytest.mark.parametrize("changes", [{}, {"length_encoding": True}, {"pool_by_length": True}])
@pytest.mark.parametrize("budget", [None, 30])
def test_a_clip_packed_with_others_is_what_it_is_alone(
    changes: dict[str, bool], budget: int | None
) -> None:
    model, x = tower(**RUN_LENGTH, **changes), uneven(8).requires_grad_()
    patches = model.embed(x)
    assert len(set(model.select(patches, budget).lengths)) > 1
    together = model(x, budget)
    weight = torch.randn_like(together)
    (gradient,) = torch.autograd.grad((together * weight).sum(), x)
    for i in range(8):
        alone = model(x[i : i + 1], budget)
        close(alone[0], together[i])
        (own,) = torch.autograd.grad((alone * weight[i : i + 1]).sum(), x)
        close(own[i], gradient[i])
    order = torch.randperm(8)
    close(model(x[order], budget), together[order])


def test_no_gradient_reaches_another_clip_of_the_pack() -> None:
    x = uneven(4).requires_grad_()
    tower(**RUN_LENGTH)(x)[1].sum().backward()
    assert x.grad is not None
    assert x.grad[1].abs().sum() > 0
    assert x.grad[[0, 2, 3]].abs().sum() == 0


@torch.no_grad()
def test_without_repeats_the_filter_changes_nothing() -> None:
    """White noise: all kept, and the vector is the dense one with the length encoding on."""
    dense, filtered = tower(), tower(**RUN_LENGTH, length_encoding=True)
    filtered.load_state_dict(dense.state_dict() | {"run_lengths": filtered.run_lengths})
    x = noise(3, 8, 56, 56)
    assert filtered.count(x) == [(128, 128)] * 3
    close(filtered(x), dense(x))
    close(filtered(x, 50), dense(x, 50))


@torch.no_grad()
def test_a_still_clip_costs_one_step() -> None:
    x = noise(2, 1, 56, 56).expand(2, 8, 56, 56, 3)
    model = tower(**RUN_LENGTH)
    assert model.count(x) == [(16, 16)] * 2
    patches = model.embed(x)
    assert len(patches.vectors) == 2 * 16
    assert model.select(patches, None).lengths == (16, 16)
    # a budget that no clip has tokens for changes nothing
    assert patches.most_tokens == 16
    assert model.select(patches, 16) is patches.kept


@torch.no_grad()
def test_length_encoding_reaches_the_tokens_of_its_own_runs() -> None:
    """Guards the order: the vector of a run's length is added where that run begins."""
    model = tower(**RUN_LENGTH, length_encoding=True)
    x = uneven(2, num_frames=4, side=28)
    patches = model.embed(x)
    selection = model.select(patches, None)
    assert patches.run_length_BNL is not None
    placed = model._placed(patches, selection)
    positions = model.positions(4, 2, 2)
    rows = patches.vectors
    at = 0
    for clip, cells in enumerate(selection.index.split(selection.lengths)):
        for cell in cells.tolist():
            run = int(patches.run_length_BNL[clip].flatten()[cell])
            expected = rows[at] + positions[cell]
            if run > 1:
                expected = expected + model.run_lengths[run - 2]
            close(placed.flatten(0, -2)[at], expected)
            at += 1
    assert at == len(rows)


@torch.no_grad()
def test_a_budget_takes_from_what_the_filter_left() -> None:
    model, x = tower(**RUN_LENGTH), uneven(6)
    patches = model.embed(x)
    assert patches.kept is not None
    for budget in (1, 20, 40, 1000):
        selection = model.select(patches, budget)
        parts = zip(
            selection.index.split(selection.lengths),
            patches.kept.index.split(patches.kept.lengths),
            strict=True,
        )
        for chosen, kept in parts:
            assert len(chosen) == min(budget, len(kept))
            assert set(chosen.tolist()) <= set(kept.tolist())
            assert (chosen.diff() > 0).all()


@torch.no_grad()
def test_a_dropped_cell_counts_as_the_head_of_its_run_for_scorers() -> None:
    """Filtered patches score as the same clip with its static cells made equal."""
    model, x = tower(**RUN_LENGTH), uneven(3)
    patches = model.embed(x)
    assert patches.run_length_BNL is not None
    filled = patches.vectors_BNLD()
    plain = model.patch_embed(tubelets(x, patch=14))
    mask = patches.run_length_BNL > 0
    expected = plain.clone()
    for n in range(1, plain.shape[1]):
        expected[:, n] = torch.where(mask[:, n, :, None], plain[:, n], expected[:, n - 1])
    close(filled, expected)
    close(group_dynamic.score(filled), group_dynamic.score(expected))


@torch.no_grad()
def test_clips_of_several_shapes_share_a_pass() -> None:
    model = tower()
    groups = [noise(2, 4, 56, 56), noise(1, 1, 56, 56, seed=1), noise(2, 3, 28, 42, seed=2)]
    packed = []
    for x in groups:
        patches = model.embed(x)
        packed.append((patches, model.select(patches, 20)))
    together = model.pool(model.encode_packed(packed))
    close(together, torch.cat([model(x, 20) for x in groups]))


@torch.no_grad()
def test_each_clip_of_a_pack_takes_the_projector_nearest_to_its_tokens() -> None:
    model = tower(**RUN_LENGTH, projector_budgets=(64, 16))
    x = uneven(4)
    for i in range(4):
        close(model(x[i : i + 1])[0], model(x)[i])
    used = {model.projector_for(n) for n in model.select(model.embed(x), None).lengths}
    assert used == {0, 1}


def test_drop_path_of_a_packed_block_is_drawn_once_per_clip() -> None:
    torch.manual_seed(0)
    block = Block(32, 2, mlp_ratio=4, gelu="tanh", layer_scale=1.0, drop_path=0.5).train()
    lengths = tuple(1 + i % 5 for i in range(64))
    x = torch.randn(sum(lengths), 32)
    unchanged = (block(x, Segments(lengths)) == x).all(-1)
    fates = [part for part in unchanged.split(lengths)]
    assert all(bool(part.all()) == bool(part.any()) for part in fates)
    assert 4 <= sum(bool(part.all()) for part in fates) <= 30


def test_a_clip_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a token"):
        Segments((3, 0))


def test_mistakes_about_filters_are_named() -> None:
    with pytest.raises(ValueError, match="unknown filter 'runlength'.*run_length"):
        VideoTower(preset("tiny", filter="runlength"))
    with pytest.raises(ValueError, match="did you mean 'threshold'"):
        VideoTower(preset("tiny", filter="run_length", filter_settings={"treshold": 0.1}))
    with pytest.raises(ValueError, match="need a filter"):
        preset("tiny", length_encoding=True)
