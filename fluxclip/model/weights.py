"""Weights in and out: model folders. Checkpoints of other systems: fluxclip/model/checkpoints.

A model folder holds config.json (architecture, preprocessing, grids of budgets, text encoder),
model.safetensors and README.md, the card. Everything is loaded strictly: a missing, unexpected
or misshapen tensor is a ValueError that names it.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.presets import FluxCLIPConfig
from fluxclip.settings import parse
from fluxclip.text.encoder import load_encoder

FORMAT = 1
# what a model hub reads of a card
CARD_HEADER = "---\nlibrary_name: fluxclip\ntags:\n- video-text-retrieval\n---\n\n"
OWN_TEXT = "./text"  # a text tower's source that lies in the model folder


def build(config: FluxCLIPConfig) -> FluxCLIP:
    """A model with fresh video weights and the text encoder that its config refers to."""
    text = config.text
    encoder = load_encoder(text.encoder, text.source, max_tokens=text.max_tokens)
    if encoder.is_fresh and text.weights == "reference":
        raise ValueError(
            f"text encoder {text.encoder} of {text.source!r} starts from random weights, which no "
            f'other load would find again: set text.weights = "stored"'
        )
    return FluxCLIP(config, encoder)


def save(
    model: FluxCLIP, folder: str | Path, *, card: str, dtype: torch.dtype = torch.float32
) -> None:
    """Write a model folder; floating weights are stored as `dtype`, the card as README.md.

    Weights of a text tower that is only referred to are left out; beside those that are stored,
    under `text/`, lies what else its source holds, such as a vocabulary.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in own_state(model).items()
    }
    # each file replaces the old one whole, so that a full disk or a kill leaves a loadable folder
    config, files = model.config, model.text.files() if model.text_is_stored else {}
    if files:
        config = replace(config, text=replace(config.text, source=OWN_TEXT))
        (folder / "text").mkdir(exist_ok=True)
    for name, content in files.items():
        _replace(folder / "text" / name, content)
    write_config(config, folder)
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial)
    # safetensors writes files that only their owner may read
    partial.chmod((folder / "config.json").stat().st_mode)
    partial.replace(folder / "model.safetensors")
    _replace(folder / "README.md", card)


def load(folder: str | Path, *, config: FluxCLIPConfig | None = None) -> FluxCLIP:
    """Read a model folder, weights as fp32, in eval mode.

    config: what `read_config` gives of the folder, with changes that need no other weights.
    """
    folder = Path(folder)
    config = config or read_config(folder)
    if config.text.source == OWN_TEXT:
        config = replace(config, text=replace(config.text, source=str(folder / "text")))
    model = build(config)
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


def with_video(config: FluxCLIPConfig, changes: Mapping[str, Any]) -> FluxCLIPConfig:
    """The config with other settings of the video tower, of those that need no other weights.

    changes: of scorer, filter, filter_settings, pool_by_length, drop_path. Without a filter among
    them, the settings are changes of the filter that is there.
    """
    changes = dict(changes)
    if "filter" not in changes and "filter_settings" in changes:
        changes["filter_settings"] = config.video.filter_settings | changes["filter_settings"]
    return replace(config, video=replace(config.video, **changes))


def write_config(config: FluxCLIPConfig, folder: str | Path) -> None:
    """Write the config.json of a model folder; an old one is replaced whole."""
    values = {"format": FORMAT, **config.to_dict()}
    _replace(Path(folder) / "config.json", json.dumps(values, indent=2) + "\n")


def own_state(model: FluxCLIP) -> dict[str, Tensor]:
    """The tensors that a model folder holds: all but those of a referred text tower."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if model.text_is_stored or not name.startswith("text.")
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


def _replace(path: Path, content: str | bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
