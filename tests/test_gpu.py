"""The same numbers on a GPU as on the CPU; FLUXCLIP_REQUIRE_GPU makes a missing GPU a failure."""

import os
import warnings
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import pytest
import torch

from fluxclip import load_model
from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.sources.annotations import read
from fluxclip.data.workers import steps
from fluxclip.model.attention import Segments, attend
from fluxclip.model.presets import preset
from fluxclip.model.video_tower import VideoTower
from fluxclip.tokens.budget import FluxSampling
from fluxclip.tokens.draws import Draws
from fluxclip.training.flops import matrix_peak
from retrieval.backends.faiss_index import FaissIndex


@pytest.fixture
def gpu() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("FLUXCLIP_REQUIRE_GPU"):
        pytest.fail("FLUXCLIP_REQUIRE_GPU is set, but torch finds no GPU")
    pytest.skip("no GPU")


@pytest.mark.parametrize("budget", [None, 64, 16])
def test_vectors_agree_with_the_cpu_s(gpu: str, emoji: Path, budget: int | None) -> None:
    clips = sorted((emoji / "clips").iterdir())[:8]
    on_cpu, on_gpu = (load_model("emoji-tiny", device=device) for device in ("cpu", gpu))
    assert on_cpu.fingerprint == on_gpu.fingerprint
    a, b = (model.embed_video(clips, token_budget=budget) for model in (on_cpu, on_gpu))
    np.testing.assert_allclose(a, b, atol=2e-3)
    texts = ["a cat", "a rocket"]
    np.testing.assert_allclose(on_cpu.embed_text(texts), on_gpu.embed_text(texts), atol=2e-3)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_packed_attention_agrees_with_clip_by_clip(
    gpu: str, dtype: torch.dtype, atol: float
) -> None:
    """bf16 goes through the variable-length kernel, fp32 through one kernel per length."""
    lengths, heads = (40, 40, 7, 300, 1), 4
    drawn = torch.Generator(gpu).manual_seed(0)
    q, k, v = (
        torch.randn(sum(lengths), 256, device=gpu, dtype=dtype, generator=drawn).requires_grad_()
        for _ in range(3)
    )
    out = attend(q, k, v, heads=heads, segments=Segments(lengths, gpu))
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    parts = [x.split(lengths) for x in (q, k, v)]
    expected = torch.cat(
        [attend(*(x[i][None] for x in parts), heads=heads)[0] for i in range(len(lengths))]
    )
    torch.testing.assert_close(out, expected, atol=atol, rtol=atol)
    for a, b in zip(ours, torch.autograd.grad((expected * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=atol)


def test_filtered_clips_agree_with_the_cpu_s(gpu: str, emoji: Path) -> None:
    clips = sorted((emoji / "clips").iterdir())[:8]
    source = "emoji-tiny?filter=run_length"
    a, b = (load_model(source, device=device).embed_video(clips) for device in ("cpu", gpu))
    np.testing.assert_allclose(a, b, atol=2e-3)


def test_a_packed_tower_in_bf16_is_near_fp32_with_its_gradients(gpu: str) -> None:
    """As in training: what a filter leaves of clips that differ, under autocast."""
    torch.manual_seed(0)
    tower = VideoTower(preset("tiny", layer_scale=1.0, filter="run_length")).to(gpu)
    x = torch.randn(4, 8, 112, 112, 3, device=gpu)
    for i in range(4):
        x[i, :, : 28 * i] = x[i, :1, : 28 * i]
    results = []
    for bf16 in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            pooled = tower(x).float()
        gradients = torch.autograd.grad(pooled.square().sum(), list(tower.parameters()))
        results.append([pooled, *gradients])
    for exact, half in zip(*results, strict=True):
        # a key's bias changes no softmax: its gradient is nothing but rounding
        assert (half - exact).norm() <= 5e-2 * exact.norm() + 3e-5


def test_a_packed_pass_waits_for_the_gpu_once(gpu: str) -> None:
    """How many tokens a filter left has to be known; nothing else has."""
    tower = VideoTower(preset("tiny", filter="run_length")).to(gpu).eval()
    x = torch.randn(4, 8, 112, 112, 3, device=gpu)
    for i in range(4):
        x[i, :, : 28 * i] = x[i, :1, : 28 * i]
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        tower(x)  # tables of this grid are made
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                tower(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) <= 1, [f"{w.filename}:{w.lineno}" for w in waits]


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_blocks_computed_again_or_compiled_give_the_same_gradients(gpu: str, kind: str) -> None:
    """In bf16, as in training; what is computed again takes a fraction of the memory."""
    torch.manual_seed(0)
    changes = {"filter": "run_length"} if kind == "packed" else {}
    tower = VideoTower(preset("tiny", layer_scale=1.0, drop_path=0.3, **changes)).to(gpu)
    x = torch.randn(16, 8, 112, 112, 3, device=gpu)
    for i in range(16):
        x[i, :, : 7 * i] = x[i, :1, : 7 * i]
    draws = Draws(7, torch.arange(16, device=gpu))
    results, peaks = [], []
    for compiled, recompute in ((False, False), (False, True), (True, False), (True, True)):
        tower.recompute = recompute
        if compiled:
            tower.compile_blocks()
        tower.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            patches = tower.embed(x)
            selection = tower.select(patches, None, draws=draws)
            pooled = tower.pool(tower.encode(patches, selection, draws=draws)).float()
        gradients = torch.autograd.grad(pooled.square().sum(), list(tower.parameters()))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append([pooled.detach(), *gradients])
    assert peaks[1] <= 0.45 * peaks[0]
    expected = results[0]
    for found, bound in zip(results[1:], (1e-3, 5e-2, 5e-2), strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() <= bound * theirs.norm() + 3e-5


@pytest.mark.parametrize("bf16", [False, True])
def test_the_peak_of_matrix_products_is_that_of_a_gpu(gpu: str, bf16: bool) -> None:
    assert matrix_peak(gpu, bf16=bf16, seconds=0.2) > 1e12


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_come_where_the_gpu_can_fetch_them(gpu: str, emoji: Path, workers: int) -> None:
    sampling = FluxSampling((2, 4, 1), (28, 56, 28), (4, 64), (16, 8))
    data = Steps([Source(read(emoji / "train.json"), 4)], sampling, Augment(), seed=0)
    for expected, step in enumerate(steps(data, start=0, stop=5, workers=workers)):
        assert step.number == expected
        for own, batch in zip(data[expected].batches, step.batches, strict=True):
            assert batch.frames_BTHWC.is_pinned()
            assert torch.equal(batch.frames_BTHWC, own.frames_BTHWC)


@pytest.mark.parametrize("kind", ["Flat", "IVF16,SQ8", "IVF16,PQ8np"])
@pytest.mark.parametrize("where", [0, "all"])
def test_an_index_on_the_gpu_finds_what_the_cpu_s_does(
    gpu: str, tmp_path: Path, kind: str, where: int | Literal["all"]
) -> None:
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("faiss-cpu is installed, not faiss-gpu")
    vectors_ND = np.random.default_rng(0).normal(size=(5000, 64)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    blocks = [(np.arange(5000) * 3 + 1, vectors_ND)]
    FaissIndex.build(blocks, num=5000, dim=64, factory=kind).save(tmp_path / "index.faiss", {})
    on_cpu, on_gpu = (FaissIndex.load(tmp_path / "index.faiss")[0] for _ in range(2))
    on_gpu.use_gpu(where)
    queries_QD = vectors_ND[:50] + 0.05 * vectors_ND[50:100]
    expected, found = on_cpu.search(queries_QD, 5), on_gpu.search(queries_QD, 5)
    assert (expected[0] == found[0]).mean() >= 0.99  # codes are compared with other rounding
    np.testing.assert_allclose(expected[1][:, 0], found[1][:, 0], atol=1e-4)
