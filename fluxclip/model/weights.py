"""Weights in and out: model folders, and checkpoints of the systems we build on.

A model folder holds config.json (architecture, preprocessing, grids of budgets, text encoder),
model.safetensors and README.md, the card. Everything is loaded strictly: a missing, unexpected
or misshapen tensor is a ValueError that names it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.presets import FluxCLIPConfig, VideoTowerConfig
from fluxclip.model.video_tower import FluxViTClassifier
from fluxclip.settings import parse
from fluxclip.text.encoder import load_encoder

FORMAT = 1


def build(config: FluxCLIPConfig) -> FluxCLIP:
    """A model with fresh video weights and the text encoder that its config refers to."""
    text = config.text
    return FluxCLIP(config, load_encoder(text.encoder, text.source, max_tokens=text.max_tokens))


def save(
    model: FluxCLIP, folder: str | Path, *, card: str, dtype: torch.dtype = torch.float32
) -> None:
    """Write a model folder; floating weights are stored as `dtype`, the card as README.md.

    Weights of a text tower that is only referred to are left out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, **model.config.to_dict()}
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in own_state(model).items()
    }
    # each file replaces the old one whole, so that a full disk or a kill leaves a loadable folder
    _replace(folder / "config.json", json.dumps(config, indent=2) + "\n")
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial)
    # safetensors writes files that only their owner may read
    partial.chmod((folder / "config.json").stat().st_mode)
    partial.replace(folder / "model.safetensors")
    _replace(folder / "README.md", card)


def load(folder: str | Path) -> FluxCLIP:
    """Read a model folder, weights as fp32, in eval mode."""
    folder = Path(folder)
    model = build(read_config(folder))
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"model folder {folder} has no model.safetensors")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    state = {name: tensor.float() for name, tensor in state.items()}
    load_strictly(model, state, source=str(path), expected=own_state(model))
    return model.eval()


def read_config(folder: str | Path) -> FluxCLIPConfig:
    """The config.json of a model folder, checked."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not of model format {FORMAT}, the one this version reads")
    return parse(FluxCLIPConfig, values, source=str(path))


def own_state(model: FluxCLIP) -> dict[str, Tensor]:
    """The tensors that a model folder holds: all but those of a referred text tower."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (model.text_is_frozen and name.startswith("text."))
    }


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], *, source: str, expected: Mapping[str, Tensor]
) -> None:
    """Copy `state` into the module; its keys and shapes must be those of `expected` exactly."""
    wrong = [f"missing {name}" for name in sorted(expected.keys() - state.keys())]
    wrong += [f"unexpected {name}" for name in sorted(state.keys() - expected.keys())]
    wrong += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source} does not fit its model: {'; '.join(wrong[:3])}{more}")
    module.load_state_dict(dict(state), strict=False)


def from_fluxvit(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | VideoTowerConfig,
    *,
    gelu: Literal["tanh", "erf"] = "tanh",
) -> FluxViTClassifier:
    """A video tower with heads from an official FluxViT state dict (names and shapes as there).

    config: the official constructor values (embed_dim, depth, num_heads, mlp_ratio, img_size,
    num_frames, attn_pool_num_heads, clip_embed_dim), or the settings of a preset.
    gelu: "tanh" is what the official fused training path computes, "erf" the non-fused one.
    Projector and head i belong to 3072, 2048 and 1024 tokens in this order.
    Raises ValueError naming the tensors that are missing, left over or misshapen.
    """
    if not isinstance(config, VideoTowerConfig):
        config = _fluxvit_config(config)
    values = {**config.__dict__, "gelu": gelu, "projector_budgets": (3072, 2048, 1024)}
    config = parse(VideoTowerConfig, values, source="FluxViT config")
    state = _rename_fluxvit(state_dict, config)
    num_classes = len(state.get("heads.0.bias", ()))
    num_aligners = len([name for name in state if name.endswith(".1.bias") and "align" in name])
    model = FluxViTClassifier(config, num_classes=num_classes, num_aligners=num_aligners)
    load_strictly(model, state, source="the FluxViT state dict", expected=model.state_dict())
    return model.eval()


def _fluxvit_config(official: Mapping[str, Any]) -> VideoTowerConfig:
    names = {
        "width": "embed_dim", "depth": "depth", "heads": "num_heads", "mlp_ratio": "mlp_ratio",
        "pool_heads": "attn_pool_num_heads", "pooled": "clip_embed_dim",
        "table_frames": "num_frames", "table_side": "img_size",
    }  # fmt: skip
    values = {ours: official[theirs] for ours, theirs in names.items() if theirs in official}
    return parse(VideoTowerConfig, values, source="FluxViT config")


# official name -> ours, by the longest prefix; what follows the prefix is kept
_FLUXVIT_PREFIXES = {
    "patch_embed.": "tower.patch_embed.",
    "gpe_proj.depthwise_conv.weight": "tower.positions.scale",
    "gpe_proj.depthwise_conv.bias": "tower.positions.shift",
    "cls_token": "tower.class_token",
    "head.": "heads.",
    "fc_norm.": "norm.",
}
_FLUXVIT_BLOCK = {
    "attn.lpe.depthwise_conv.weight": "attn.lpe_scale",
    "attn.lpe.depthwise_conv.bias": "attn.lpe_shift",
    "ls1.gamma": "ls1",
    "ls2.gamma": "ls2",
}
_FLUXVIT_POOL = {
    "norm1_": "norm_", "cross_attn.q_bias": "q.bias", "cross_attn.k_bias": "k.bias",
    "cross_attn.v_bias": "v.bias", "cross_attn.": "",
}  # fmt: skip


def _rename_fluxvit(state: Mapping[str, Tensor], config: VideoTowerConfig) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.float()
        if name == "pos_embed":
            renamed["tower.class_position"] = tensor[0, 0]
            side = config.table_side // config.patch
            if tensor.shape[1] - 1 != config.table_frames * side**2:
                raise ValueError(
                    f"pos_embed has {tensor.shape[1] - 1} positions, not those of "
                    f"{config.table_frames} frames of {config.table_side} pixels"
                )
            renamed["tower.positions.table"] = tensor[0, 1:].view(-1, side, side, config.width)
        elif name == "patch_embed.proj.weight":
            # Conv3d (D, 3, t, y, x) -> Linear over pixels ordered (t, y, x, channel)
            renamed["tower." + name] = tensor.permute(0, 2, 3, 4, 1).flatten(1)
        else:
            name = _rename_one(name)
            if tensor.ndim == 5 or name == "tower.class_token":
                tensor = tensor.flatten()
            renamed[name] = tensor
    return renamed


def _rename_one(name: str) -> str:
    part, _, rest = name.partition(".")
    if part in ("blocks", "clip_projector"):
        index, _, rest = rest.partition(".")
        table, home = (_FLUXVIT_BLOCK, "blocks") if part == "blocks" else (_FLUXVIT_POOL, "pools")
        return f"tower.{home}.{index}.{_replace_prefix(rest, table)}"
    if part == "final_clip_decoder_for_projs":
        index, _, rest = rest.partition(".")
        return f"aligners.{index}.{_replace_prefix(rest, {'head.': '0.', 'norm.': '1.'})}"
    return _replace_prefix(name, _FLUXVIT_PREFIXES)


def _replace_prefix(name: str, table: Mapping[str, str]) -> str:
    prefix = max((p for p in table if name.startswith(p)), key=len, default=None)
    return name if prefix is None else table[prefix] + name.removeprefix(prefix)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
