"""InternVideo2-CLIP S/14, B/14 and L/14: published weights as a FluxCLIP model.

Vision: arXiv 2403.15377; text: MobileCLIP-B (arXiv 2311.17049).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fluxclip.model.checkpoints import names
from fluxclip.model.checkpoints.files import Checkpoint, Converted, Part, Report, read, short_name
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.presets import (
    FluxCLIPConfig,
    PreprocessConfig,
    TextConfig,
    VideoTowerConfig,
)
from fluxclip.model.weights import load_strictly
from fluxclip.text.encoder import load_encoder
from fluxclip.text.encoders.open_clip_tower import OpenCLIPTower, mobileclip_state
from fluxclip.tokens.budget import GridTable


def _size(width: int, depth: int, heads: int) -> VideoTowerConfig:
    return VideoTowerConfig(
        anatomy="internvideo2", width=width, depth=depth, heads=heads, pool_heads=16, pooled=768,
        table_frames=8, table_side=224,
    )  # fmt: skip


SIZES = {"S/14": _size(384, 12, 6), "B/14": _size(768, 12, 12), "L/14": _size(1024, 24, 16)}

_VISION, _TEXT, _ALIGN = "vision_encoder.", "text_encoder.", "vision_align."
_POOL = _VISION + "clip_projector."
# what distillation and fine-tuning leave in a vision base beside the tower
_BASE_ONLY = {
    "clip_decoder.": "decoder of distillation",
    "mae_decoder.": "decoder of distillation",
    "final_clip_decoder.": "decoder of distillation",
    "clip_pos_embed": "positions of a decoder",
    "mae_pos_embed": "positions of a decoder",
    "head.": "classifier of the fine-tuned base",
    "fc_norm.": "classifier of the fine-tuned base",
}
# the four maps of the pooling: their norms and biases are alike in unrelated weights too
_MAPS = tuple(f"{_POOL}cross_attn.{part}.weight" for part in ("q", "k", "v", "proj"))
# Unrelated matrices of D x D have a cosine within 5 / D of 0 (five standard deviations: 0.013 for
# S/14); weights that were trained on from these keep far more, whatever weight decay did to their
# length. So 0.1 parts the two with room on both sides.
_RELATED = 0.1


def from_internvideo2_clip(
    *, complete: str | Path | None = None, bases: Sequence[str | Path] = (),
    text: str | Path | None = None, overlay: str | Path | None = None,
    gelu: Literal["tanh", "erf"] | None = None, video: VideoTowerConfig | None = None,
    text_tower: str = "MobileCLIP-B",
) -> Converted:  # fmt: skip
    """A model from one complete file, or from a vision base, MobileCLIP's text and the overlay.

    bases: one, or several of which the nearest to the overlay is taken. gelu: of the vision tower;
    by default "erf" for a complete file, which was published so, and "tanh" otherwise, which the
    published scores belong to. video, text_tower: settings of a size that was not published, and
    the open_clip configuration of its text tower. Every tensor must be used or be known to belong
    to something else; ValueError in one line names what is missing, left over or misshapen.
    """
    if complete is not None:
        if bases or text or overlay:
            raise ValueError(
                "a complete file needs no base, text or overlay: give one or the other"
            )
        state, part = read(complete).part("complete", lambda name: None)
        parts, source = [part], str(complete)
        notes: list[str] = []
        _refuse_partial(state, source)
    else:
        state, parts, notes = _compose(bases, text, overlay)
        source = " + ".join(part.name for part in parts)
    gelu = gelu or ("erf" if complete is not None else "tanh")
    notes.append(f"GELU of the vision tower: {gelu}.")
    model = _model(state, source, gelu=gelu, video=video, text_tower=text_tower)
    about = "InternVideo2-CLIP with MobileCLIP's text tower, as published."
    return Converted(model, Report(about, tuple(parts), notes=tuple(notes)))


def _refuse_partial(state: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError for the file that holds only what the last training changed."""
    if any(name.startswith(_ALIGN) for name in state) and not any(
        name.startswith(_VISION + "blocks.") for name in state
    ):
        raise ValueError(
            f"{source} is only an overlay, {len(state)} tensors: give a vision base and the "
            f"MobileCLIP text file with it (--base, --text, --overlay)"
        )


def _compose(
    bases: Sequence[str | Path], text: str | Path | None, overlay: str | Path | None
) -> tuple[dict[str, Tensor], list[Part], list[str]]:
    """The wrapper's tensors from three files, in the order base, text, overlay."""
    given = {"--base": bases, "--text": text, "--overlay": overlay}
    if absent := [option for option, value in given.items() if not value]:
        raise ValueError(
            f"InternVideo2-CLIP is made of a vision base, MobileCLIP's text and an overlay, which "
            f"is no model alone: {' and '.join(absent)} missing"
        )
    assert text is not None and overlay is not None
    over, over_part = read(overlay).part("overlay", lambda name: None)
    if not set(_MAPS) <= over.keys() or _VISION + "cls_token" in over:
        raise ValueError(
            f"{overlay} is no overlay: it should hold {_POOL}*, {_ALIGN}* and temp, and no more"
        )
    base, base_part, notes = _nearest([read(path) for path in bases], over)
    words, text_part = read(text).part(
        "text", lambda name: None if name.startswith(_TEXT) else "not of the text tower"
    )
    if not words:
        raise ValueError(
            f"{text} is no MobileCLIP file: none of its tensors is named {_TEXT}* (wanted: "
            f"mobileclip_blt.pt as Apple publishes it)"
        )
    return {**base, **words, **over}, [base_part, text_part, over_part], notes


def _nearest(
    candidates: Sequence[Checkpoint], overlay: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Part, list[str]]:
    """The base whose pooling the overlay's was trained from, and how near each candidate is.

    The overlay's pooling started as that of the right base, so that no data are needed to tell.
    """
    found = []
    for base in candidates:
        state, part = base.part("vision base", _why_not_of_base)
        state = {_VISION + name: x for name, x in state.items()}
        found.append((_cosine(state, overlay, str(base.path)), state, part, base.path))
    notes = [
        f"Pooling of the overlay against {short_name(path)}: cosine {cosine:.4f}; "
        f"relative distance {_distances(state, overlay)}."
        for cosine, state, _, path in found
    ]
    cosine, state, part, path = max(found, key=lambda entry: entry[0])
    if cosine < _RELATED:
        raise ValueError(
            f"the overlay was not trained from {path}: the maps of their poolings have a cosine of "
            f"{cosine:.3f}, as unrelated weights have; give the base it belongs to (--base may be "
            f"repeated)"
        )
    if len(candidates) > 1:
        notes.append(f"Base taken: {part.name}, the nearest.")
    return state, part, notes


def _why_not_of_base(name: str) -> str | None:
    return next((why for prefix, why in _BASE_ONLY.items() if name.startswith(prefix)), None)


def _cosine(base: Mapping[str, Tensor], overlay: Mapping[str, Tensor], source: str) -> float:
    for name in _MAPS:
        if name not in base:
            raise ValueError(f"{source} is no vision base: it has no {name.removeprefix(_VISION)}")
        if base[name].shape != overlay[name].shape:
            raise ValueError(
                f"{source} is a base of another size: {name.removeprefix(_VISION)} is "
                f"{tuple(base[name].shape)}, in the overlay {tuple(overlay[name].shape)}"
            )
    a, b = (torch.cat([state[name].flatten() for name in _MAPS]) for state in (base, overlay))
    return float(F.cosine_similarity(a, b, dim=0))


def _distances(base: Mapping[str, Tensor], overlay: Mapping[str, Tensor]) -> str:
    """|overlay - base| / |base| of each tensor of the pooling."""
    shared = [name for name in overlay if name.startswith(_POOL) and name in base]
    values = {
        name.removeprefix(_POOL): float((overlay[name] - base[name]).norm() / base[name].norm())
        for name in shared
        if base[name].shape == overlay[name].shape
    }
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _model(
    state: Mapping[str, Tensor], source: str, *, gelu: Literal["tanh", "erf"],
    video: VideoTowerConfig | None, text_tower: str,
) -> FluxCLIP:  # fmt: skip
    """The model of a complete set of wrapper tensors, loaded strictly."""
    head, temperature = state.get(f"{_ALIGN}1.weight"), state.get("temp")
    if head is None or temperature is None:
        raise ValueError(f"{source} is no InternVideo2-CLIP: it has no {_ALIGN}1.weight or no temp")
    video = replace(video or _known_size(state, source), gelu=gelu)
    config = FluxCLIPConfig(
        video=video,
        grids=GridTable((video.table_frames, video.table_side)),
        text=TextConfig(
            "open_clip_tower", text_tower, weights="stored", max_tokens=77, projection="none"
        ),
        preprocess=PreprocessConfig(fit="squash"),
        dim=len(head),
    )
    tower = load_encoder("open_clip_tower", text_tower, max_tokens=77)
    assert isinstance(tower, OpenCLIPTower)
    words = {name: x for name, x in state.items() if name.startswith(_TEXT)}
    theirs = {name: x for name, x in state.items() if name.startswith(_VISION)}
    ours = names.vision(
        {name.removeprefix(_VISION): x for name, x in theirs.items()}, video, tower="video."
    )
    # stored as bf16, 0.01 is a little more; below it the scale would pass its own limit
    ours["log_scale"] = (1 / temperature).log().clamp(max=math.log(100))
    rest = {name: x for name, x in state.items() if name not in words and name not in theirs}
    del rest["temp"]
    # what is left over keeps its name, and is named by the check below
    ours |= {name.replace(_ALIGN, "video_projection.", 1): x for name, x in rest.items()}
    try:
        text = mobileclip_state(words, tower.tower)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    ours |= {f"text.tower.{name}": x for name, x in text.items()}
    model = FluxCLIP(config, tower)
    load_strictly(model, ours, source=source, expected=model.state_dict())
    return model.eval()


def _known_size(state: Mapping[str, Tensor], source: str) -> VideoTowerConfig:
    width = names.width(state.get(_VISION + "cls_token"))
    depth = names.depth(name.removeprefix(_VISION) for name in state)
    for size in SIZES.values():
        if (size.width, size.depth) == (width, depth):
            return size
    known = ", ".join(f"{name} ({c.width}, {c.depth})" for name, c in SIZES.items())
    raise ValueError(
        f"{source} has a vision tower of width {width} with {depth} blocks; known are {known}"
    )
