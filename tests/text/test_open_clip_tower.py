"""The open_clip text encoder: published MobileCLIP weights, tokens, sources."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn

from fluxclip.text.encoder import load_encoder
from fluxclip.text.encoders.open_clip_tower import OpenCLIPTower, load, mobileclip_state

REFERENCE = Path(__file__).parents[1] / "data" / "internvideo2_clip_tiny.npz"
NAME = "fluxclip-test-tower"
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Makes a configuration known to open_clip and returns its name."""
    folder = tmp_path_factory.mktemp("configurations")

    def add(name: str, **values: Any) -> str:
        images = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1}
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"vision_cfg": images, **values}))
        open_clip.add_model_config(path)
        return name

    return add


@pytest.fixture(scope="module")
def name(configure: Callable[..., str]) -> str:
    """A configuration with CLIP's tokenizer and small towers."""
    return configure(NAME, embed_dim=24, text_cfg=TEXT)


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """Weights, ids and outputs of the official classes at a tiny size."""
    return dict(np.load(REFERENCE))


@pytest.fixture(scope="module")
def tower(configure: Callable[..., str], reference: Mapping[str, np.ndarray]) -> OpenCLIPTower:
    """Fresh, of the size that the reference has."""
    config = json.loads(bytes(reference["meta"]))["config"]["text"]
    theirs = config["text_cfg"]
    text = {
        "context_length": theirs["context_length"],
        "vocab_size": theirs["vocab_size"],
        "width": theirs["dim"],
        "heads": theirs["n_heads_per_layer"],
        "layers": theirs["n_transformer_layers"],
    }
    known = configure("mobileclip-test-tower", embed_dim=config["embed_dim"], text_cfg=text)
    return load(known, max_tokens=77).eval()


def official(reference: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, Tensor]:
    return {
        prefix + key.removeprefix("text_state/"): torch.from_numpy(array)
        for key, array in reference.items()
        if key.startswith("text_state/")
    }


@pytest.mark.parametrize("prefix", ["", "text_encoder."])
@torch.no_grad()
def test_published_mobileclip_weights_give_what_the_official_class_gives(
    tower: OpenCLIPTower, reference: Mapping[str, np.ndarray], prefix: str
) -> None:
    nn.init.zeros_(tower.tower.ln_final.weight)  # whatever was loaded before is no answer
    tower.tower.load_state_dict(mobileclip_state(official(reference, prefix), tower.tower))
    for case in ("text/case0", "text/case1"):
        features = tower(torch.from_numpy(reference[f"{case}_ids"]).long())
        assert features.shape == (2, tower.width)
        np.testing.assert_allclose(features.numpy(), reference[case], atol=1e-5, rtol=0)
        unit = nn.functional.normalize(features, dim=-1).numpy()
        np.testing.assert_allclose(unit, reference[f"{case}_norm"], atol=1e-6, rtol=0)


def test_the_published_size_is_open_clip_s_mobileclip_b() -> None:
    """Names, shapes and numbers of values as published, through to a tower of the real size."""
    encoder = load_encoder("open_clip_tower", "MobileCLIP-B", max_tokens=77)
    shapes = {
        "embedding_layer.weight": (49408, 512),
        "positional_embedding.pos_embed.pos_embed": (1, 1, 77, 512),
        "final_layer_norm.weight": (512,),
        "final_layer_norm.bias": (512,),
        "projection_layer": (512, 512),
    }
    for i in range(12):
        for part, shape in {
            "mha.0": (512,), "mha.1.qkv_proj": (1536, 512), "mha.1.out_proj": (512, 512),
            "ffn.0": (512,), "ffn.1": (2048, 512), "ffn.4": (512, 2048),
        }.items():  # fmt: skip
            shapes[f"transformer.{i}.pre_norm_{part}.weight"] = shape
            shapes[f"transformer.{i}.pre_norm_{part}.bias"] = shape[:1]
    assert len(shapes) == 149
    published = {f"text_encoder.{name}": torch.empty(shape) for name, shape in shapes.items()}
    assert sum(tensor.numel() for tensor in published.values()) == 63_428_096
    encoder.tower.load_state_dict(mobileclip_state(published, encoder.tower))
    assert encoder.width == 512
    assert {block.attn.num_heads for block in encoder.tower.transformer.resblocks} == {8}
    # the image tower is not kept
    assert sum(p.numel() for p in encoder.parameters()) == 63_428_096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection_layer": None}, "missing projection_layer"),
        ({"transformer.1.pre_norm_ffn.4.bias": None}, r"missing transformer\.1\.pre_norm_ffn\.4"),
        ({"transformer.2.pre_norm_ffn.4.bias": torch.ones(64)}, r"unexpected transformer\.2"),
        ({"image_encoder.x": torch.ones(1)}, r"unexpected image_encoder\.x"),
        (
            {"positional_embedding.pos_embed.pos_embed": torch.ones(1, 1, 76, 64)},
            r"pos_embed has shape \(76, 64\), not \(77, 64\)",
        ),
        ({"projection_layer": torch.ones(24, 64)}, r"projection_layer has shape \(24, 64\)"),
    ],
)
def test_other_weights_are_refused_by_name(
    tower: OpenCLIPTower,
    reference: Mapping[str, np.ndarray],
    change: Mapping[str, Tensor | None],
    message: str,
) -> None:
    state = {**official(reference), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as error:
        mobileclip_state(state, tower.tower)
    assert "\n" not in str(error.value)


def test_a_tower_of_another_build_is_refused(reference: Mapping[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="not built as MobileCLIP-B's"):
        mobileclip_state(official(reference), nn.Linear(2, 2))


def test_ids_are_those_of_open_clip_and_always_as_many(name: str) -> None:
    texts = ["a dog", "", "word " * 100, "Ünïcode, 日本 &amp; 🎉"]
    expected = open_clip.get_tokenizer("ViT-B-16")(texts)
    for max_tokens in (77, 500):
        encoder = load_encoder("open_clip_tower", name, max_tokens=max_tokens)
        assert encoder.max_tokens == 77
        assert torch.equal(encoder.tokenize(texts), expected)
        assert encoder.are_cut(texts) == [False, False, True, False]


@torch.no_grad()
def test_a_lower_limit_cuts_earlier_and_keeps_the_end_token(name: str) -> None:
    encoder = load_encoder("open_clip_tower", name, max_tokens=6).eval()
    # a token each, with start and end: 6 and 7
    fits, long = "one two three four", "one two three four five"
    assert encoder.are_cut([fits, long]) == [False, True]
    ids = encoder.tokenize([fits, long])
    assert ids.shape == (2, 77)
    assert torch.equal(ids[0], ids[1])
    assert ids[1, 5] == 49407
    assert not ids[:, 6:].any()
    whole = load_encoder("open_clip_tower", name, max_tokens=77)
    assert torch.equal(whole.tokenize([fits]), ids[:1])


@torch.no_grad()
def test_weights_from_a_file_are_the_text_half_of_it(name: str, tmp_path: Path) -> None:
    clip = open_clip.create_model(name)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    fresh = load_encoder("open_clip_tower", name, max_tokens=77).eval()
    stored = load_encoder("open_clip_tower", f"{name}/{tmp_path / 'clip.pt'}", max_tokens=77).eval()
    assert (fresh.is_fresh, stored.is_fresh) == (True, False)
    ids = stored.tokenize(["a dog", "two cats"])
    expected = clip.eval().encode_text(ids)
    torch.testing.assert_close(stored(ids), expected, atol=1e-6, rtol=1e-5)
    assert stored.width == expected.shape[1] == 24
    assert not torch.allclose(fresh(ids), expected)
    assert {key.split(".")[0] for key in stored.state_dict()} == {"tower"}


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (Path.touch, (Path("executed"),))  # type: ignore[return-value]


def test_no_pickled_code_is_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, "harmful.pt")
    torch.load("harmful.pt", weights_only=False)
    Path("executed").unlink()
    with pytest.raises(ValueError, match="does not load") as error:
        load_encoder("open_clip_tower", f"{name}/harmful.pt", max_tokens=77)
    assert "\n" not in str(error.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ViT-B-33", "unknown open_clip model 'ViT-B-33'"),
        ("", "unknown open_clip model ''"),
        ("ViT-B-32/no_such_tag", "no such weights file, and no tag of ViT-B-32; its tags: openai"),
        (f"{NAME}/no/such/file.pt", "no such weights file.*its tags: none"),
    ],
)
def test_sources_that_are_not_there(name: str, source: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_encoder("open_clip_tower", source, max_tokens=77)
    assert "\n" not in str(error.value)


def test_queries_without_torch_are_refused(name: str) -> None:
    """CLIP's tokenizer repairs broken text and HTML first: a tokenizer.json cannot say that."""
    with pytest.raises(ValueError, match="OpenCLIPTower has no tokenizer.json"):
        load_encoder("open_clip_tower", name, max_tokens=77).tokenizer_json()
