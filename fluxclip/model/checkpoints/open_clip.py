"""Image-text models of open_clip, inflated: their image tower as a video tower.

The tower sees a clip as one set of tokens, frames x patches, with joint attention over space and
time (as AVION, arXiv 2309.16669). Nothing new is drawn: the position table repeats the image's for
each frame, so that a clip of one frame has the vector that open_clip gives the image.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fluxclip.model.checkpoints.files import Converted, Part, Report, sha256, short_name
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.presets import (
    ANATOMIES,
    FluxCLIPConfig,
    Gelu,
    PreprocessConfig,
    TextConfig,
    VideoTowerConfig,
)
from fluxclip.model.weights import load_strictly
from fluxclip.text import open_clip_models
from fluxclip.text.encoders.open_clip_tower import OpenCLIPTower
from fluxclip.tokens.budget import GridTable

SUPPORTED = "open_clip's own ViTs (ViT-*, CLIPA) and SigLIP's"


def from_open_clip(name: str, pretrained: str, *, num_frames: int = 8) -> Converted:
    """A video-text model from any ViT that open_clip has, without training.

    name: an open_clip configuration. pretrained: one of its tags (fetched on first use), or a
    file. num_frames: time steps of the position table and frames of the default grid. Raises
    ValueError or FileNotFoundError in one line, also for an image tower that is no plain ViT.
    """
    clip = open_clip_models.load(name, pretrained, force_custom_text=True).eval()
    dim: int = open_clip_models.config(name)["embed_dim"]
    visual = clip.visual
    if _is_clip(visual):
        video, theirs = _clip_tower(visual, num_frames)
    elif _is_siglip(visual):
        video, theirs = _siglip_tower(visual, num_frames)
    else:
        raise ValueError(
            f"the image tower of {name} cannot become a video tower: supported are {SUPPORTED}; "
            f"open_clip:{name}/{pretrained} uses it frame by frame"
        )
    settings = visual.preprocess_cfg
    tower = OpenCLIPTower(
        name, clip.text, width=dim, max_tokens=clip.context_length, is_fresh=False
    )
    config = FluxCLIPConfig(
        video=video,
        grids=GridTable((num_frames, video.table_side)),
        text=TextConfig(
            "open_clip_tower", name, weights="stored", max_tokens=tower.max_tokens,
            projection="none",
        ),
        preprocess=PreprocessConfig(
            mean=tuple(settings["mean"]), std=tuple(settings["std"]),
            fit="squash" if settings.get("resize_mode") == "squash" else "crop",
        ),
        dim=dim,
    )  # fmt: skip
    model = FluxCLIP(config, tower)
    state = {
        **{f"text.{key}": x for key, x in tower.state_dict().items()},
        **{key: x.detach().float() for key, x in theirs.items()},
        "log_scale": clip.logit_scale.detach().float().reshape(()).clamp(0, math.log(100)),
    }
    source = f"open_clip:{name}/{pretrained}"
    load_strictly(model, state, source=source, expected=model.state_dict())
    return Converted(model.eval(), _report(clip, name, pretrained, num_frames))


def _report(clip: nn.Module, name: str, pretrained: str, num_frames: int) -> Report:
    path = Path(pretrained)
    used = tuple(key for key in clip.state_dict() if key != "logit_bias")
    ignored = {"logit_bias": "it changes no ranking"} if clip.logit_bias is not None else {}
    is_file = path.is_file()
    digest = sha256(path) if is_file else "not taken of what open_clip fetches"
    label = short_name(path) if is_file else f"tag {pretrained}"
    part = Part(f"open_clip {name}", label, digest, used, ignored)
    note = f"Spatial positions repeated over {num_frames} frames; equal for all of them."
    about = f"open_clip's {name}, its image tower inflated to a video tower."
    return Report(about, (part,), notes=(note,))


def _is_clip(visual: Any) -> bool:
    """Whether a tower is open_clip's own ViT in one of the two forms that are used."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
        return False
    blocks: Any = visual.transformer.resblocks
    has_norm_before = not isinstance(visual.ln_pre, nn.Identity)
    is_clip = visual.pool_type == "tok" and has_norm_before
    is_clipa = visual.pool_type == "avg" and visual.final_ln_after_pool and not has_norm_before
    return (is_clip or is_clipa) and all(
        isinstance(block, ResidualAttentionBlock) and isinstance(block.ls_1, nn.Identity)
        for block in blocks
    )


def _is_siglip(visual: Any) -> bool:
    """Whether a tower is timm's ViT without class token, with a learned query that pools."""
    trunk: Any = getattr(visual, "trunk", None)
    return (
        type(trunk).__name__ == "VisionTransformer"
        and type(getattr(trunk, "attn_pool", None)).__name__ == "AttentionPoolLatent"
        and trunk.cls_token is None
        and not list(visual.head.parameters())
    )


def _clip_tower(visual: Any, num_frames: int) -> tuple[VideoTowerConfig, dict[str, Tensor]]:
    """Settings and tensors of open_clip's own ViT."""
    first = visual.transformer.resblocks[0]
    video = _config(
        "clip" if visual.pool_type == "tok" else "clipa", num_frames, visual.conv1, first.ln_1,
        rows_columns=visual.grid_size, depth=len(visual.transformer.resblocks),
        heads=first.attn.num_heads, hidden=first.mlp.c_fc.out_features, gelu=_gelu(first.mlp.gelu),
    )  # fmt: skip
    table = visual.positional_embedding
    state = {
        "video.patch_embed.proj.weight": _patches(visual.conv1.weight),
        "video.class_token": visual.class_embedding,
        "video.class_position": table[0],
        "video.positions.table": _repeated(table[1:], video),
        "video_projection.1.weight": visual.proj.T,
        "video_projection.1.bias": torch.zeros(visual.proj.shape[1]),
    }
    prefixes = {
        "ln_pre.": "video.norm_before.", "ln_post.": "video_projection.0.",
        "transformer.resblocks.": "video.blocks.",
    }  # fmt: skip
    inner = {
        ".ln_1.": ".norm1.", ".ln_2.": ".norm2.", ".attn.in_proj_": ".attn.qkv.",
        ".attn.out_proj.": ".attn.proj.", ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2.",
    }  # fmt: skip
    return video, state | _renamed(visual, prefixes, inner)


def _siglip_tower(visual: Any, num_frames: int) -> tuple[VideoTowerConfig, dict[str, Tensor]]:
    """Settings and tensors of timm's SigLIP ViT."""
    trunk, first, pool = visual.trunk, visual.trunk.blocks[0], visual.trunk.attn_pool
    video = _config(
        "siglip", num_frames, trunk.patch_embed.proj, first.norm1,
        rows_columns=trunk.patch_embed.grid_size, depth=len(trunk.blocks),
        heads=first.attn.num_heads, hidden=first.mlp.fc1.out_features, gelu=_gelu(first.mlp.act),
    )  # fmt: skip
    k_v = [x.chunk(2) for x in (pool.kv.weight, pool.kv.bias)]
    state = {
        "video.patch_embed.proj.weight": _patches(trunk.patch_embed.proj.weight),
        "video.patch_embed.proj.bias": trunk.patch_embed.proj.bias,
        "video.positions.table": _repeated(trunk.pos_embed[0], video),
        "video.pools.0.query": pool.latent.flatten(),
        **{f"video.pools.0.{'kv'[i]}.weight": k_v[0][i] for i in range(2)},
        **{f"video.pools.0.{'kv'[i]}.bias": k_v[1][i] for i in range(2)},
    }
    prefixes = {
        "trunk.blocks.": "video.blocks.", "trunk.norm.": "video.norm_after.",
        "trunk.attn_pool.q.": "video.pools.0.q.", "trunk.attn_pool.proj.": "video.pools.0.proj.",
        "trunk.attn_pool.norm.": "video.pools.0.norm.",
        "trunk.attn_pool.mlp.": "video.pools.0.mlp.",
    }  # fmt: skip
    return video, state | _renamed(visual, prefixes, {})


def _renamed(
    visual: nn.Module, prefixes: dict[str, str], inner: dict[str, str]
) -> dict[str, Tensor]:
    """The tensors whose names begin with one of the prefixes, under our names."""
    renamed = {}
    for name, tensor in visual.state_dict().items():
        for theirs, ours in prefixes.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                for old, new in inner.items():
                    name = name.replace(old, new)
                renamed[name] = tensor
                break
    return renamed


def _config(
    anatomy: str, num_frames: int, conv: nn.Conv2d, norm: nn.LayerNorm, *,
    rows_columns: tuple[int, int], depth: int, heads: int, hidden: int, gelu: Gelu,
) -> VideoTowerConfig:  # fmt: skip
    rows, columns = rows_columns
    eps = ANATOMIES[anatomy].norm_eps
    if norm.eps != eps:
        raise ValueError(f"an image tower whose LayerNorms add {norm.eps}, not {eps} as {anatomy}")
    patch, width = conv.kernel_size[0], conv.out_channels
    if rows != columns:
        raise ValueError(f"an image tower of {rows} x {columns} patches is not square")
    ratio = hidden / width
    if int(width * ratio) < hidden:  # the quotient was rounded down
        ratio = math.nextafter(ratio, math.inf)
    return VideoTowerConfig(
        anatomy=anatomy, width=width, depth=depth, heads=heads, pool_heads=heads, pooled=width,
        table_frames=num_frames, table_side=rows * patch, patch=patch, mlp_ratio=ratio, gelu=gelu,
    )  # fmt: skip


def _gelu(layer: Any) -> Gelu:
    if type(layer).__name__ == "QuickGELU":
        return "quick"
    if type(layer).__name__ not in ("GELU", "GELUTanh"):
        raise ValueError(f"an image tower with {type(layer).__name__} between its maps")
    is_tanh = getattr(layer, "approximate", None) == "tanh" or type(layer).__name__ == "GELUTanh"
    return "tanh" if is_tanh else "erf"


def _patches(weight: Tensor) -> Tensor:
    """Conv2d (D, 3, y, x) -> Linear over pixels ordered (y, x, channel)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _repeated(table_LD: Tensor, video: VideoTowerConfig) -> Tensor:
    """The image's positions for each time step: (T, rows, columns, D)."""
    side = video.table_side // video.patch
    return table_LD.view(1, side, side, -1).repeat(video.table_frames, 1, 1, 1)
