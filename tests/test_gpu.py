"""The same numbers on a GPU as on the CPU; FLUXCLIP_REQUIRE_GPU makes a missing GPU a failure."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxclip import load_model


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
