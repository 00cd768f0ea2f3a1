"""Our tower against reference outputs of the official class (tests/data/fluxvit_tiny.npz)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fluxclip.model.checkpoints.fluxvit import from_fluxvit
from fluxclip.model.video_tower import FluxViTClassifier
from fluxclip.tokens.scorers import group_dynamic
from fluxclip.tokens.selection import Selection

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "fluxvit_tiny.npz")
META = json.loads(GOLDEN["meta"].tobytes())
STATE = {
    name.removeprefix("state/"): torch.from_numpy(GOLDEN[name])
    for name in GOLDEN.files
    if name.startswith("state/")
}
CASES = list(enumerate(META["cases"]))
TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module", params=["erf", "tanh"])
def model(request: pytest.FixtureRequest) -> FluxViTClassifier:
    return from_fluxvit(STATE, META["config"], gelu=request.param)


def frames_of(case: dict[str, Any]) -> torch.Tensor:
    shape = (2, 3, case["frames"], case["side"], case["side"])
    x = np.random.default_rng(case["input_seed"]).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(x).permute(0, 2, 3, 4, 1)


def pooled_of(model: FluxViTClassifier, case: dict[str, Any], keep: Any) -> torch.Tensor:
    patches = model.tower.embed(frames_of(case))
    selection = model.tower.select(patches, None)
    if keep is not None:
        index = torch.from_numpy(keep).long()
        selection = Selection(index.flatten(), (index.shape[1],) * len(index))
    encoded = model.tower.encode(patches, selection)
    return model.tower.pool(encoded, projector=case["head"])


@pytest.mark.parametrize(("i", "case"), CASES)
@torch.no_grad()
def test_patch_embedding(model: FluxViTClassifier, i: int, case: dict[str, Any]) -> None:
    mean = model.tower.embed(frames_of(case)).vectors.mean(-1).numpy()
    np.testing.assert_allclose(mean, GOLDEN[f"case{i}/patch_mean_last"], **TOLERANCE)


@pytest.mark.parametrize(("i", "case"), CASES)
@torch.no_grad()
def test_features_logits_and_aligners(
    model: FluxViTClassifier, i: int, case: dict[str, Any]
) -> None:
    keep = GOLDEN[f"case{i}/keep"] if case["budget"] else None
    pooled = pooled_of(model, case, keep)
    if model.tower.config.gelu == "tanh":
        if f"case{i}/pooled_tanh" in GOLDEN.files:
            np.testing.assert_allclose(pooled, GOLDEN[f"case{i}/pooled_tanh"], **TOLERANCE)
        assert np.abs(pooled.numpy() - GOLDEN[f"case{i}/pooled"]).max() > 1e-5
        return
    np.testing.assert_allclose(pooled, GOLDEN[f"case{i}/pooled"], **TOLERANCE)
    logits = model.classify(pooled, case["head"])
    np.testing.assert_allclose(logits, GOLDEN[f"case{i}/logits"], **TOLERANCE)
    aligned = model.align(pooled, case["aligner"])
    np.testing.assert_allclose(aligned, GOLDEN[f"case{i}/aligned"], **TOLERANCE)


@pytest.mark.parametrize(("i", "case"), [(i, c) for i, c in CASES if c["budget"]])
@torch.no_grad()
def test_selection_with_official_rounding(
    model: FluxViTClassifier, i: int, case: dict[str, Any]
) -> None:
    patches = model.tower.embed(frames_of(case))
    _, num_steps, length, _ = patches.vectors.shape
    kept = group_dynamic.official_budget(case["budget"], num_steps, length)
    assert kept == case["kept"]
    ours = model.tower.select(patches, kept).index_BK.numpy()
    # the official sort is unstable and some scores are equal by construction, so the scores of
    # what is kept are compared, and the positions wherever the score is not that of the cut
    change = dynamics(patches.vectors)
    sizes = group_dynamic.group_sizes(num_steps)
    for clip, (mine, theirs) in enumerate(zip(ours, GOLDEN[f"case{i}/keep"], strict=True)):
        np.testing.assert_allclose(
            np.sort(change[clip][mine]), np.sort(change[clip][theirs]), atol=1e-5
        )
        per_group = sizes[0] * length
        for group in range(len(sizes)):
            a, b = (set(k[k // per_group == group].tolist()) for k in (mine, theirs))
            assert len(a) == len(b)
            cut = change[clip][list(a)].min()
            assert all(change[clip][k] <= cut + 1e-5 for k in a ^ b)


def dynamics(patches: torch.Tensor) -> np.ndarray[Any, Any]:
    """The official score, position by position (slow and plain)."""
    x = patches.double().numpy()
    out = np.zeros(x.shape[:3])
    start = 0
    for size in group_dynamic.group_sizes(x.shape[1]):
        for t in range(size):
            a, b = start + max(t, 1) - 1, start + max(t, 1)
            out[:, start + t] = np.linalg.norm(x[:, b] - x[:, a], axis=-1)
        start += size
    return out.reshape(len(x), -1)


def test_budget_is_kept_exactly_where_the_official_rounding_loses_tokens(
    model: FluxViTClassifier,
) -> None:
    case = META["cases"][1]
    assert case["kept"] == 60
    selection = model.tower.select(model.tower.embed(frames_of(case)), 64)
    assert selection.lengths == (64, 64)


def test_foreign_keys_are_named() -> None:
    state = {**STATE, "stray.weight": torch.zeros(1)}
    del state["blocks.1.attn.qkv.weight"]
    with pytest.raises(ValueError, match=r"missing tower\.blocks\.1\.attn\.qkv\.weight.*stray"):
        from_fluxvit(state, META["config"])
