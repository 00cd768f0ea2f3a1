"""Model folders: what is saved is what is loaded, strictly."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxclip import load_model
from fluxclip.model import weights
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.presets import FluxCLIPConfig, preset
from fluxclip.tokens.budget import GridTable


@pytest.fixture(scope="module")
def model() -> FluxCLIP:
    torch.manual_seed(0)
    config = FluxCLIPConfig(
        video=preset("tiny", depth=1), dim=32, grids=GridTable((4, 56), ((64, 4, 56), (16, 2, 56)))
    )
    return weights.build(config).eval()


@pytest.fixture(scope="module")
def saved(model: FluxCLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small-one"
    weights.save(model, folder, card="# A card\n")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_saved_and_loaded_is_the_same_model(model: FluxCLIP, saved: Path) -> None:
    loaded = weights.load(saved)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (saved / "README.md").read_text() == "# A card\n"


def test_a_referred_text_tower_is_not_stored(saved: Path) -> None:
    names = load_file(saved / "model.safetensors").keys()
    assert not [name for name in names if name.startswith("text.")]
    assert "text_projection.weight" in names


def test_half_precision_storage_is_close_and_loads_as_fp32(model: FluxCLIP, tmp_path: Path) -> None:
    weights.save(model, tmp_path / "half", card="", dtype=torch.float16)
    loaded = weights.load(tmp_path / "half")
    frames = torch.randn(2, 4, 56, 56, 3)
    assert next(loaded.parameters()).dtype == torch.float32
    with torch.no_grad():
        a, b = model.encode_video(frames), loaded.encode_video(frames)
    assert (a * b).sum(-1).min() > 0.999


def test_fingerprints_tell_models_apart(saved: Path, folder: Path) -> None:
    same, other = load_model(saved), load_model(folder)
    assert same.fingerprint == other.fingerprint
    state = load_file(folder / "model.safetensors")
    state["video.class_token"][0] += 1e-3
    save_file(state, folder / "model.safetensors")
    assert load_model(folder).fingerprint != same.fingerprint
    assert same.name == "small-one"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("log_scale"), "missing log_scale"),
        (lambda state: state.update(stray=torch.zeros(1)), "unexpected stray"),
        (
            lambda state: state.update({"video.class_token": torch.zeros(5)}),
            r"video.class_token has shape \(5,\), not \(192,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder: Path, spoil: object, message: str) -> None:
    state = load_file(folder / "model.safetensors")
    spoil(state)  # type: ignore[operator]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        weights.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"dims": 3}, "unknown key 'dims'; did you mean 'dim'?"),
        ({"dim": "wide"}, "dim: .*got 'wide'"),
        ({"format": 99}, "model format 1"),
        ({"grids": {"default": [0, 112]}}, "positive integers"),
    ],
)
def test_a_wrong_config_is_named(folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        weights.load(folder)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model(folder: Path) -> None:
    (folder / "model.safetensors").write_text("not tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        weights.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        weights.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        weights.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no model folder"):
        weights.load(folder)


def test_a_run_folder_loads_its_best_model(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "my-run" / "best")
    model = load_model(tmp_path / "my-run")
    assert model.name == "my-run"


def test_unknown_models_are_answered_with_the_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown model 'nothing'.*emoji-tiny.*open_clip:"):
        load_model("nothing")
    with pytest.raises(ValueError, match="names no weights"):
        load_model("open_clip:ViT-B-32")
    with pytest.raises(FileNotFoundError, match="no such weights file.*laion2b_s34b_b79k"):
        load_model("open_clip:ViT-B-32/bogus")
    with pytest.raises(ValueError, match="unknown open_clip model 'ViT-Z'"):
        load_model("open_clip:ViT-Z/x")


def test_text_features_do_not_depend_on_padding(model: FluxCLIP) -> None:
    alone = model.encode_text(model.tokenize(["a cat"]))
    padded = model.encode_text(model.tokenize(["a cat", "a much longer caption about many dogs"]))
    np.testing.assert_allclose(alone[0].detach().numpy(), padded[0].detach().numpy(), atol=1e-5)


def test_settings_of_a_stored_filter_are_changed_one_by_one(tmp_path: Path) -> None:
    stored = {"anchor": "last_kept", "threshold": 0.2}
    video = preset("tiny", depth=1, filter="run_length", filter_settings=stored)
    config = FluxCLIPConfig(video=video, grids=GridTable((4, 56)), dim=48)
    weights.save(weights.build(config), tmp_path, card="card")

    def settings(**changes: Any) -> dict[str, Any]:
        changed = weights.with_video(weights.read_config(tmp_path), changes)
        return weights.load(tmp_path, config=changed).config.video.filter_settings

    assert settings() == stored
    assert settings(filter_settings={"threshold": 0.05}) == stored | {"threshold": 0.05}
    assert settings(filter="run_length", filter_settings={}) == {}
