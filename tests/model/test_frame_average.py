"""An open_clip model from a local file as an Embedder: a small random one, no network."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fluxclip import Embedder, load_model
from fluxclip.video import Clip, read_clip

NAME = "tiny-for-tests"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    folder = tmp_path_factory.mktemp("open_clip")
    settings = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16,
                       "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                     "layers": 2},
    }  # fmt: skip
    (folder / f"{NAME}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    random = open_clip.create_model(NAME)
    save_file(random.state_dict(), folder / "weights.safetensors")
    return load_model(f"open_clip:{NAME}/{folder / 'weights.safetensors'}")


def test_a_clip_is_the_normalised_mean_of_its_frames(model: Embedder, emoji: Path) -> None:
    path = emoji / "clips" / "1f300.mp4"
    clip = read_clip(path, num_frames=8, side=64)
    frames = [Clip(clip.frames_THWC[i : i + 1], clip.times_s[i : i + 1]) for i in range(8)]
    mean = model.embed_video(frames).mean(0)
    expected = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(model.embed_video([clip])[0], expected, atol=1e-5)
    np.testing.assert_allclose(model.embed_video([path])[0], expected, atol=1e-5)


def test_one_frame_is_open_clip_s_own_image_vector(model: Embedder, emoji: Path) -> None:
    path = emoji / "stills" / "00a9-fe0f.webp"
    clip = read_clip(path, num_frames=1, side=64)
    visual = model.model.clip.visual
    mean, std = (torch.tensor(visual.preprocess_cfg[key]) for key in ("mean", "std"))
    image = (torch.from_numpy(clip.frames_THWC) / 255 - mean) / std
    with torch.no_grad():
        expected = model.model.clip.encode_image(image.permute(0, 3, 1, 2), normalize=True)
    np.testing.assert_allclose(model.embed_video([path]), expected.numpy(), atol=1e-5)


def test_texts_are_open_clip_s_own(model: Embedder) -> None:
    texts = ["a cat", "two dogs in the snow"]
    ids = open_clip.get_tokenizer(NAME)(texts)
    with torch.no_grad():
        expected = model.model.clip.encode_text(ids, normalize=True)
    np.testing.assert_allclose(model.embed_text(texts), expected.numpy(), atol=1e-5)


def test_a_budget_chooses_whole_frames(model: Embedder) -> None:
    assert model.grid(None) == (8, 64)
    assert model.num_tokens(*model.grid(None)) == 8 * 16
    assert [model.grid(budget)[0] for budget in (1, 16, 31, 32, 100)] == [1, 1, 1, 2, 6]
    # 16 patches and a class token, width 32, 2 layers: linear maps, q k^T and attention v
    n, d = 17, 32
    block = n * (4 * d * d + 8 * d * d) + 2 * n * n * d
    assert model.macs(1, 64) == 16 * 3 * 16**2 * d + 2 * block + d * 24
    assert model.macs(4, 64) == 4 * model.macs(1, 64)
    assert model.grid(10**9) == (64, 64)


def test_wrong_weights_are_one_clear_line(model: Embedder, tmp_path: Path) -> None:
    save_file({"stray": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not load") as error:
        load_model(f"open_clip:{NAME}/{tmp_path / 'w.safetensors'}")
    assert "\n" not in str(error.value)
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="does not load") as error:
        load_model(f"open_clip:{NAME}/{tmp_path / 'text.pt'}")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="64 pixels, not 224"):
        model.num_tokens(8, 224)
