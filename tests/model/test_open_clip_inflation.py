"""Image towers of open_clip as video towers: small random ones, no network."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fluxclip.model.attention import Segments
from fluxclip.model.checkpoints.open_clip import from_open_clip
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.video_tower import VideoTower

TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIZE = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
VISION: dict[str, dict[str, Any]] = {
    "clip": SIZE,
    "clip-14": {**SIZE, "image_size": 56, "patch_size": 14, "mlp_ratio": 4.3637},
    "clip-quick": SIZE,
    "clipa": {**SIZE, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "map": {"image_size": 64, "timm_model_name": "vit_siglip_for_tests", "timm_pool": "map",
               "timm_proj": "none"},
}  # fmt: skip


def vit_siglip_for_tests(pretrained: bool = False, **options: Any) -> nn.Module:
    """SigLIP's tower at a small size; the options that timm adds say nothing about it."""
    return VisionTransformer(
        img_size=64, patch_size=16, embed_dim=48, depth=2, num_heads=2, class_token=False,
        global_pool="map", num_classes=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, Path, Any]]:
    """Makes a configuration and a weights file for it: name, file, open_clip's own model.

    "siglip" in a name would ask for SigLIP's tokenizer, which comes from the hub.
    """
    folder = tmp_path_factory.mktemp("open_clip")
    timm.models.register_model(vit_siglip_for_tests)

    def build(kind: str, vision: dict[str, Any]) -> tuple[str, Path, Any]:
        name = f"inflate-{kind}"
        settings = {
            "embed_dim": 48 if kind == "map" else 24, "vision_cfg": vision, "text_cfg": TEXT,
            "quick_gelu": kind.endswith("quick"), "custom_text": kind == "map",
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(settings))
        open_clip.add_model_config(folder / f"{name}.json")
        torch.manual_seed(0)
        clip = open_clip.create_model(name).eval()
        for parameter in clip.parameters():  # fresh norms and biases are constants
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
        nn.init.constant_(clip.logit_scale, 3.0)
        torch.save(clip.state_dict(), folder / f"{name}.pt")
        return name, folder / f"{name}.pt", clip

    return build


@pytest.fixture(scope="module", params=list(VISION))
def pair(make: Callable[..., Any], request: pytest.FixtureRequest) -> tuple[str, FluxCLIP, Any]:
    name, path, clip = make(request.param, VISION[request.param])
    return request.param, from_open_clip(name, str(path), num_frames=4).model, clip


def images(side: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, side, side, 3, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_one_frame_is_open_clip_s_own_image_vector(pair: tuple[str, FluxCLIP, Any]) -> None:
    kind, model, clip = pair
    side = model.config.video.table_side
    x_BHWC = images(side)
    expected = clip.encode_image(x_BHWC.permute(0, 3, 1, 2), normalize=True)
    assert model.grid(None) == (4, side)
    torch.testing.assert_close(model.encode_video(x_BHWC[:, None]), expected, **TOLERANCE)
    assert model.config.video.parts.class_token == (kind != "map")


@torch.no_grad()
def test_texts_and_scale_are_open_clip_s_own(pair: tuple[str, FluxCLIP, Any]) -> None:
    _, model, clip = pair
    ids = model.tokenize(["a cat", "two dogs in the snow"])
    torch.testing.assert_close(
        model.encode_text(ids), clip.encode_text(ids, normalize=True), **TOLERANCE
    )
    torch.testing.assert_close(model.logit_scale, clip.logit_scale.exp())


@torch.no_grad()
def test_a_clip_in_which_nothing_moves(pair: tuple[str, FluxCLIP, Any]) -> None:
    """Without a class token it has the picture's vector; with one only if a filter drops repeats.

    Attention over tokens that are all there four times is that over one of each; a class token is
    there once, so that its share shrinks.
    """
    kind, model, _ = pair
    x = images(model.config.video.table_side)[:, None]
    image, still = model.encode_video(x), model.encode_video(x.expand(-1, 4, -1, -1, -1))
    if kind == "map":
        torch.testing.assert_close(still, image, **TOLERANCE)
    else:
        assert (still - image).abs().max() > 1e-4
    filtered = VideoTower(replace(model.config.video, filter="run_length")).eval()
    filtered.load_state_dict(model.video.state_dict())
    pooled = filtered(x.expand(-1, 4, -1, -1, -1))
    torch.testing.assert_close(model.project_video(pooled), image, **TOLERANCE)


@torch.no_grad()
def test_order_of_time_matters_to_none_before_training(pair: tuple[str, FluxCLIP, Any]) -> None:
    _, model, _ = pair
    side = model.config.video.table_side
    x = images(side, batch=4)[None]
    torch.testing.assert_close(model.encode_video(x), model.encode_video(x.flip(1)), **TOLERANCE)


@pytest.mark.parametrize("budget", [1, 7, None])
@torch.no_grad()
def test_any_budget_packed_or_not(pair: tuple[str, FluxCLIP, Any], budget: int | None) -> None:
    _, model, _ = pair
    side = model.config.video.table_side
    groups = [images(side, 6).view(2, 3, side, side, 3), images(side)[:, None]]
    together = model.encode_clips(groups, budget)
    apart = torch.cat([model.encode_video(frames, budget) for frames in groups])
    torch.testing.assert_close(together, apart, **TOLERANCE)
    views = model.encode_video_views(groups[0], [3, 9])
    per_view = [view.tokens_SW.shape for view in views]
    assert per_view == [(2 * k, model.config.video.width) for k in (3, 9)]


@pytest.mark.parametrize("kind", ["clipa", "map"])
@torch.no_grad()
def test_pooling_by_run_length_is_that_of_the_repeated_tokens(
    make: Callable[..., Any], kind: str
) -> None:
    name, path, _ = make(kind, VISION[kind])
    tower = from_open_clip(name, str(path)).model.video
    pool, width = tower.pools[0], tower.config.width
    x_1ND = torch.randn(1, 6, width)
    count = torch.tensor([1, 3, 1, 2, 1, 1])
    repeated = x_1ND.repeat_interleave(count, dim=1)
    ours = pool(x_1ND[0], Segments([6]), count)
    torch.testing.assert_close(ours, pool(repeated), **TOLERANCE)


def test_no_parameter_is_unused(pair: tuple[str, FluxCLIP, Any]) -> None:
    _, model, clip = pair
    model.encode_video(images(model.config.video.table_side)[:, None]).sum().backward()
    unused = [name for name, p in model.video.named_parameters() if p.grad is None]
    assert not unused
    extra = model.config.video.table_frames - 1
    side = model.config.video.table_side // model.config.video.patch
    ours = sum(p.numel() for p in model.video.parameters())
    ours += sum(p.numel() for p in model.video_projection.parameters())
    theirs = sum(p.numel() for p in clip.visual.parameters())
    bias = 0 if isinstance(model.video_projection, nn.Identity) else model.dim
    assert ours == theirs + extra * side**2 * model.config.video.width + bias


def test_macs_are_those_that_are_counted(pair: tuple[str, FluxCLIP, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    _, model, _ = pair
    video = model.config.video
    frames = images(video.table_side, 4)[None]
    tower = VideoTower(video).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        tower(frames)
    tokens = video.num_tokens(4, video.table_side)
    # one learned query is mapped per batch, not per clip, as if it were a token
    slack = 2 * video.width**2 if video.parts.pooling == "map" else 0
    assert abs(counter.get_total_flops() // 2 - model.video.macs(tokens, tokens)) <= slack


@pytest.mark.parametrize(
    ("kind", "vision", "message"),
    [
        ("layer-scale", {**SIZE, "ls_init_value": 0.1}, "supported are .*SigLIP's"),
        ("coca", {**SIZE, "attentional_pool": True}, "supported are"),
        ("resnet", {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}, "supported are"),
        ("eps", {**SIZE, "norm_kwargs": {"eps": 0.1}}, "LayerNorms add 0.1"),
        ("oblong", {**SIZE, "image_size": [64, 32]}, "4 x 2 patches is not square"),
    ],
)
def test_what_is_no_plain_vit_is_refused(
    make: Callable[..., Any], kind: str, vision: dict[str, Any], message: str
) -> None:
    name, path, _ = make(kind, vision)
    with pytest.raises(ValueError, match=message) as error:
        from_open_clip(name, str(path))
    assert "\n" not in str(error.value)


def test_unknown_names_and_files_are_refused(make: Callable[..., Any]) -> None:
    name, path, _ = make("other", {**SIZE, "width": 64})
    with pytest.raises(ValueError, match="unknown open_clip model 'ViT-Z'"):
        from_open_clip("ViT-Z", "x")
    with pytest.raises(FileNotFoundError, match="no such weights file.*laion2b_s34b_b79k"):
        from_open_clip("ViT-B-32", "bogus")
    make("clip", SIZE)
    with pytest.raises(ValueError, match="does not load"):
        from_open_clip("inflate-clip", str(path))
    assert name in sys.modules["open_clip"].list_models()
