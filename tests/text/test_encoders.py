"""Contract of every text encoder found in fluxclip/text/encoders."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer

from fluxclip import plugins
from fluxclip.text.encoder import TextEncoder, load_encoder

MAX_TOKENS = 16
CAPTIONS = [
    "a dog",
    "a dog runs in the park",
    "Two Cats,  one  mouse!",
    "собака бежит по снегу",
    "一只猫在睡觉",
    "कुत्ता दौड़ रहा है",
    "🎉🎉 it's a party 🎉",
    "café",
    "",
    "   ",
]


class Loaded(NamedTuple):
    name: str
    source: str
    encoder: TextEncoder


@pytest.fixture(scope="module", params=plugins.available("fluxclip.text.encoders"))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    name: str = request.param
    module = plugins.load("fluxclip.text.encoders", name)
    source = module.example(tmp_path_factory.mktemp(name))
    return Loaded(name, source, load_encoder(name, source, max_tokens=MAX_TOKENS).eval())


@torch.no_grad()
def test_captions_become_one_feature_each(loaded: Loaded) -> None:
    encoder = loaded.encoder
    ids_BL = encoder.tokenize(CAPTIONS)
    assert ids_BL.dtype == torch.int64
    assert len(ids_BL) == len(CAPTIONS)
    features_BD = encoder(ids_BL)
    assert features_BD.shape == (len(CAPTIONS), encoder.width)
    assert torch.isfinite(features_BD).all()
    assert torch.equal(encoder(ids_BL), features_BD)


@torch.no_grad()
def test_a_caption_s_feature_depends_on_that_caption_alone(loaded: Loaded) -> None:
    encoder = loaded.encoder
    together_BD = encoder(encoder.tokenize(CAPTIONS))
    for caption, feature_D in zip(CAPTIONS, together_BD, strict=True):
        alone_D = encoder(encoder.tokenize([caption]))[0]
        torch.testing.assert_close(alone_D, feature_D, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_other_captions_and_other_orders_of_words_get_other_features(loaded: Loaded) -> None:
    encoder = loaded.encoder
    captions = ["a dog bites a man", "a man bites a dog", "a dog bites", ""]
    features_BD = encoder(encoder.tokenize(captions))
    distance_BB = torch.cdist(features_BD, features_BD) / features_BD.norm(dim=-1).mean()
    apart = ~torch.eye(len(captions), dtype=torch.bool)
    assert distance_BB[apart].min() > 1e-3


def test_long_captions_are_cut_and_it_is_said(loaded: Loaded) -> None:
    encoder = loaded.encoder
    long = "dog cat bird horse child " * 20
    assert encoder.max_tokens == MAX_TOKENS
    assert encoder.are_cut(["a dog", long, ""]) == [False, True, False]
    assert torch.equal(encoder.tokenize([long]), encoder.tokenize([long + "and more"]))
    assert not torch.equal(encoder.tokenize([long]), encoder.tokenize(["bird " + long]))


def test_every_weight_takes_part_in_training(loaded: Loaded) -> None:
    """But for what the captions do not use: other pieces and later positions."""
    encoder = loaded.encoder
    encoder.zero_grad()
    features_BD = encoder(encoder.tokenize(CAPTIONS))
    generator = torch.Generator().manual_seed(0)
    (features_BD * torch.randn(features_BD.shape, generator=generator)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name
    encoder.zero_grad()


@torch.no_grad()
def test_source_or_files_and_weights_give_the_same_encoder_again(
    loaded: Loaded, tmp_path: Path
) -> None:
    name, source, encoder = loaded
    files = encoder.files()
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    again = load_encoder(name, str(tmp_path) if files else source, max_tokens=MAX_TOKENS).eval()
    ids_BL = encoder.tokenize(CAPTIONS)
    assert torch.equal(again.tokenize(CAPTIONS), ids_BL)
    assert again.files() == files
    assert torch.allclose(again(ids_BL), encoder(ids_BL)) is not encoder.is_fresh
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again(ids_BL), encoder(ids_BL))


def test_the_tokenizer_file_says_what_tokenize_does_or_there_is_none(loaded: Loaded) -> None:
    encoder = loaded.encoder
    try:
        text = encoder.tokenizer_json()
    except ValueError as error:
        assert "\n" not in str(error)
        return
    tokenizer = Tokenizer.from_str(text)
    ids = [encoding.ids for encoding in tokenizer.encode_batch([*CAPTIONS, "dog " * 50])]
    assert ids == encoder.tokenize([*CAPTIONS, "dog " * 50]).tolist()


def test_a_source_that_is_not_there_is_one_line(loaded: Loaded) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        load_encoder(loaded.name, "/no/such/source", max_tokens=MAX_TOKENS)
    assert "\n" not in str(error.value)
    assert str(error.value)


def test_blocks_computed_again_have_the_same_gradients(loaded: Loaded) -> None:
    """With the dropout that some have in training; and less is kept for the backward pass."""
    encoder = loaded.encoder
    ids_BL = encoder.tokenize(CAPTIONS)
    again = load_encoder(loaded.name, loaded.source, max_tokens=MAX_TOKENS)
    again.load_state_dict(encoder.state_dict())
    again.recompute_blocks()
    found, kept = [], []
    for own in (encoder, again):
        own.train()
        tensors: dict[int, torch.Tensor] = {}  # held, so that no address is used twice

        def pack(tensor: torch.Tensor, tensors: dict[int, torch.Tensor] = tensors) -> torch.Tensor:
            tensors.setdefault(tensor.data_ptr(), tensor)
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total = own(ids_BL).square().sum()
        parameters = [p for p in own.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(total, parameters))
        weights = {p.data_ptr() for p in own.parameters()}
        kept.append(sum(t.nbytes for at, t in tensors.items() if at not in weights))
        own.eval()
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert kept[1] < 0.6 * kept[0]
