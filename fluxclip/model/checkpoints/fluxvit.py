"""FluxViT-S/14 and -B/14 (arXiv 2503.14237): the official state dicts and checkpoint files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fluxclip.model.checkpoints import names
from fluxclip.model.checkpoints.files import Converted, Report, read
from fluxclip.model.presets import FluxCLIPConfig, TextConfig, VideoTowerConfig, preset
from fluxclip.model.video_tower import FluxViTClassifier
from fluxclip.model.weights import build, load_strictly
from fluxclip.settings import parse
from fluxclip.tokens.budget import GridTable

BUDGETS = (3072, 2048, 1024)  # projector, head and aligner i belong to the i-th of these

_PREFIXES = ("backbone.", "encoder.")
_HEADS = {"head.": "heads.", "fc_norm.": "norm."}
_ALIGNER = "final_clip_decoder_for_projs."
# what an official file has beside the tower, and why a video-text model does not take it
_UNUSED = {
    "head.": "classifier",
    "fc_norm.": "classifier",
    _ALIGNER: "aligner of self-distillation",
}


def from_fluxvit(
    source: Mapping[str, Tensor] | str | Path,
    config: Mapping[str, Any] | VideoTowerConfig | None = None,
    *,
    gelu: Literal["tanh", "erf"] = "tanh",
    num_classes: int | None = None,
) -> FluxViTClassifier:
    """A video tower with heads from an official FluxViT state dict or checkpoint file.

    config: the official constructor values (embed_dim, depth, num_heads, mlp_ratio, img_size,
    num_frames, attn_pool_num_heads, clip_embed_dim), or the settings of a preset; by default those
    of the published size that the shapes have. gelu: "tanh" is what the official fused training
    path computes, "erf" the non-fused one. num_classes: only the first so many rows of the heads
    (400 of the 710 classes of joint Kinetics are those of Kinetics-400).
    Projector and head i belong to 3072, 2048 and 1024 tokens in this order.
    Raises ValueError naming the tensors that are missing, left over or misshapen.
    """
    state_dict, name = source, "the FluxViT state dict"
    if not isinstance(state_dict, Mapping):
        name = str(source)
        state_dict = read(state_dict, prefixes=_PREFIXES).tensors
    tower = _config(state_dict, config, gelu, name)
    tower = replace(tower, projector_budgets=BUDGETS)
    state = {_head_name(key): x for key, x in names.vision(state_dict, tower).items()}
    for key, rows in state.items():
        if key.startswith("heads.") and num_classes is not None:
            if len(rows) < num_classes:
                raise ValueError(f"{name} has heads of {len(rows)} classes, not {num_classes}")
            state[key] = rows[:num_classes]
    classes = len(state.get("heads.0.bias", ()))
    aligners = len([key for key in state if key.startswith("aligners.") and ".1.bias" in key])
    model = FluxViTClassifier(tower, num_classes=classes, num_aligners=aligners)
    load_strictly(model, state, source=name, expected=model.state_dict())
    return model.eval()


def as_fluxclip(
    path: str | Path,
    *,
    gelu: Literal["tanh", "erf"] = "tanh",
    projector: int | None = None,
    config: Mapping[str, Any] | VideoTowerConfig | None = None,
    text: TextConfig | None = None,
    dim: int = 512,
) -> Converted:
    """A video-text model whose video tower has the weights of an official checkpoint file.

    Its projections into the shared space of `dim` channels are fresh, since FluxViT has no text
    tower: something to train, which finds nothing by text before. projector: keep the pooling of
    this budget (3072, 2048 or 1024) alone; None keeps all three. text: by default the frozen
    encoder of a fresh model. Raises ValueError naming the tensors that are missing, left over or
    misshapen.
    """
    if projector is not None and projector not in BUDGETS:
        raise ValueError(f"FluxViT has projectors for {BUDGETS} tokens, none for {projector}")
    state, part = read(path, prefixes=_PREFIXES).part(
        "FluxViT", lambda name: next((w for p, w in _UNUSED.items() if name.startswith(p)), None)
    )
    video = _config(state, config, gelu, str(path))
    missing = [p + "*" for p in _UNUSED if not any(name.startswith(p) for name in part.ignored)]
    ours = names.vision(state, video, tower="")
    if projector is not None:
        wanted = f"pools.{BUDGETS.index(projector)}."
        kept = {name for name in ours if not name.startswith("pools.") or name.startswith(wanted)}
        ours = {name.replace(wanted, "pools.0."): x for name, x in ours.items() if name in kept}
    else:
        video = replace(video, projector_budgets=BUDGETS)
    text = text or TextConfig()
    model = build(FluxCLIPConfig(video=video, grids=GridTable((8, 224)), text=text, dim=dim))
    try:
        load_strictly(model.video, ours, source=str(path), expected=model.video.state_dict())
    except ValueError as error:
        hint = ""
        if "missing" in str(error):
            hint = "; a file saved without its frozen parameters has to be joined with them first"
        raise ValueError(f"{error}{hint}") from error
    pools = "all three projectors" if projector is None else f"the projector of {projector} tokens"
    about = (
        "FluxViT's video tower, as published, with a text tower that it has not learned to speak "
        "with: the projections into the shared space are random. A start for training; a search by "
        "text finds nothing yet."
    )
    notes = (f"GELU: {gelu}. Kept: {pools}.",)
    return Converted(model.eval(), Report(about, (part,), tuple(missing), notes))


def _config(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | VideoTowerConfig | None,
    gelu: Literal["tanh", "erf"],
    source: str,
) -> VideoTowerConfig:
    if config is None:
        config = _known_size(state, source)
    elif not isinstance(config, VideoTowerConfig):
        config = _official(config)
    return replace(config, gelu=gelu)


def _official(official: Mapping[str, Any]) -> VideoTowerConfig:
    theirs = {
        "width": "embed_dim", "depth": "depth", "heads": "num_heads", "mlp_ratio": "mlp_ratio",
        "pool_heads": "attn_pool_num_heads", "pooled": "clip_embed_dim",
        "table_frames": "num_frames", "table_side": "img_size",
    }  # fmt: skip
    values = {ours: official[name] for ours, name in theirs.items() if name in official}
    return parse(VideoTowerConfig, values, source="FluxViT config")


def _known_size(state: Mapping[str, Tensor], source: str) -> VideoTowerConfig:
    sizes = [preset(name) for name in ("small", "base")]
    found = (names.width(state.get("cls_token")), names.depth(state))
    for size in sizes:
        if (size.width, size.depth) == found:
            return size
    known = " and ".join(f"{size.width} with {size.depth}" for size in sizes)
    raise ValueError(
        f"{source} has a tower of width {found[0]} with {found[1]} blocks; FluxViT-S and -B have "
        f"width {known}"
    )


def _head_name(name: str) -> str:
    if name.startswith(_ALIGNER):
        index, _, rest = name.removeprefix(_ALIGNER).partition(".")
        return f"aligners.{index}.{names.replace_prefix(rest, {'head.': '0.', 'norm.': '1.'})}"
    return names.replace_prefix(name, _HEADS)
