"""The text encoder trained from scratch: its network, its folder, mistakes."""

import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import nn

from fluxclip.text import tokenizer
from fluxclip.text.encoder import load_encoder
from fluxclip.text.encoders.sentencepiece_transformer import SentencePieceTransformer, _Block
from fluxclip.text.tokenizer import EncoderSize

NAME = "sentencepiece_transformer"
CAPTIONS = [
    f"the {animal} {act} in the park at night"
    for animal in ("dog", "cat", "bird", "child")
    for act in ("runs", "sleeps", "plays", "jumps")
]


@pytest.fixture(scope="module")
def vocabulary() -> bytes:
    return tokenizer.train(CAPTIONS, pieces=450)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocabulary: bytes) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "en"
    tokenizer.write(folder, vocabulary, EncoderSize(width=48, depth=3, heads=6))
    return folder


@pytest.fixture
def encoder(folder: Path) -> SentencePieceTransformer:
    torch.manual_seed(0)
    encoder = load_encoder(NAME, str(folder), max_tokens=32)
    assert isinstance(encoder, SentencePieceTransformer)
    return encoder.eval()


def test_the_folder_gives_the_size(encoder: SentencePieceTransformer) -> None:
    assert encoder.width == 48
    assert len(encoder.blocks) == 3
    assert {block.heads for block in encoder.blocks} == {6}
    assert encoder.embedding.num_embeddings == 450
    assert encoder.positions.shape == (32, 48)


@torch.no_grad()
def test_a_block_is_torch_s_own_pre_norm_layer() -> None:
    torch.manual_seed(0)
    ours = _Block(32, heads=4)
    theirs = nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj_weight": "qkv.weight", "self_attn.in_proj_bias": "qkv.bias",
        "self_attn.out_proj.weight": "proj.weight", "self_attn.out_proj.bias": "proj.bias",
        "linear1.weight": "mlp.0.weight", "linear1.bias": "mlp.0.bias",
        "linear2.weight": "mlp.2.weight", "linear2.bias": "mlp.2.bias",
    }  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    state = theirs.state_dict()
    ours.load_state_dict({names.get(name, name): tensor for name, tensor in state.items()})
    x_BLD = torch.randn(3, 7, 32)
    is_token_BL = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    expected = theirs(x_BLD, src_key_padding_mask=~is_token_BL)
    got = ours(x_BLD, is_token_BL[:, None, None])
    torch.testing.assert_close(got[is_token_BL], expected[is_token_BL], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_feature_is_the_mean_over_a_caption_s_tokens(encoder: SentencePieceTransformer) -> None:
    ids = encoder.tokenize(["the dog sleeps"])
    tokens: list[torch.Tensor] = []
    encoder.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    feature = encoder(ids)
    torch.testing.assert_close(feature, tokens[0].mean(dim=1))


@torch.no_grad()
def test_padding_changes_nothing(encoder: SentencePieceTransformer) -> None:
    texts = ["a dog", "", "the bird sleeps in the park at night on the grass", "собака"]
    together = encoder(encoder.tokenize(texts))
    for text, feature in zip(texts, together, strict=True):
        ids = encoder.tokenize([text])
        torch.testing.assert_close(encoder(ids)[0], feature, atol=1e-6, rtol=0)
        more = nn.functional.pad(ids, (0, 32 - ids.shape[1]), value=encoder.pad_id)
        torch.testing.assert_close(encoder(more)[0], feature, atol=1e-6, rtol=0)


def test_every_caption_ends_with_the_end_piece_and_is_cut_before_it(folder: Path) -> None:
    encoder = load_encoder(NAME, str(folder), max_tokens=4)
    end, pad = encoder.pieces.eos_id(), encoder.pad_id
    texts = ["", "the dog", "the dog sleeps", "the dog sleeps at night"]
    the, dog, sleeps = encoder.pieces.encode("the dog sleeps")
    assert encoder.tokenize(texts).tolist() == [
        [end, pad, pad, pad],
        [the, dog, end, pad],
        [the, dog, sleeps, end],
        [the, dog, sleeps, end],
    ]
    assert encoder.are_cut(texts) == [False, False, False, True]
    assert encoder.tokenize([]).shape == (0, 0)


def test_the_seed_gives_the_weights(folder: Path) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(load_encoder(NAME, str(folder), max_tokens=8).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["embedding.weight"], states[2]["embedding.weight"])


def test_its_files_are_the_folder_it_came_from(
    encoder: SentencePieceTransformer, folder: Path
) -> None:
    assert encoder.files() == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    def refused(source: Path) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_encoder(NAME, str(source), max_tokens=8)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "it has no sentencepiece.model" in refused(tmp_path / "missing")
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    (own / "encoder.json").write_text('{"width": 48, "deep": 3}')
    assert "unknown key 'deep'; did you mean 'depth'?" in refused(own)
    (own / "encoder.json").write_text('{"width": 50, "heads": 4}')
    assert "width 50 must be divisible by heads, 4" in refused(own)
    (own / "encoder.json").write_text("[]")
    assert "no object" in refused(own)
    (own / "encoder.json").write_text("width = 48")
    assert "is no JSON" in refused(own)
    (own / "encoder.json").unlink()
    assert "it has no encoder.json" in refused(own)
    shutil.copy(folder / "encoder.json", own)
    (own / "sentencepiece.model").write_bytes(b"no model")
    assert "sentencepiece.model cannot be used" in refused(own)
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CAPTIONS), model_prefix=str(own / "sentencepiece"), vocab_size=40,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    assert "has no <pad>" in refused(own)
