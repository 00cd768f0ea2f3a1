"""Text encoder `open_clip_tower`: the text half of any open_clip configuration.

Shape legend: B captions, L tokens, D width of the shared space of the configuration.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from fluxclip.text import open_clip_models
from fluxclip.text.encoder import TextEncoder

# open_clip builds a text tower only together with an image tower: the least it takes
_NO_IMAGES = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1, "head_width": 64}


class OpenCLIPTower(TextEncoder):
    """The tower as open_clip computes it, with its own tokenizer and its own text projection.

    tower: open_clip's module; the state dicts of others go into it. configuration: its name, which
    says more than its weights do, such as the kind of GELU. context: ids per caption, which
    is fixed: a caption is padded to it, and cut at `max_tokens` where that is less.
    """

    def __init__(
        self, name: str, tower: nn.Module, *, width: int, max_tokens: int, is_fresh: bool
    ) -> None:
        super().__init__()
        import open_clip  # costs seconds to import: only who uses it pays

        self.tower, self.configuration = tower, name
        try:
            self.tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # some come from the hub
            raise ValueError(f"cannot load the tokenizer of {name}: {_reason(error)}") from error
        self.context: int = self.tokenizer.context_length
        self.max_tokens = min(max_tokens, self.context)
        self.width = width
        self.is_fresh = is_fresh
        # CLIP's own byte pairs pad with 0, transformers' tokenizers as they say
        self.pad_id: int = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", 0)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, context), whatever `max_tokens` is: positions behind it are padding."""
        ids_BL: Tensor = self.tokenizer(list(texts), context_length=self.max_tokens)
        return F.pad(ids_BL, (0, self.context - self.max_tokens), value=self.pad_id)

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        return open_clip_models.are_cut(self.tokenizer, texts, limit=self.max_tokens)

    def recompute_blocks(self) -> None:
        # not all of the kinds of towers that open_clip knows have the switch
        switch = getattr(self.tower, "set_grad_checkpointing", None)
        if switch is not None:
            switch(True)

    def forward(self, ids_BL: Tensor) -> Tensor:
        features_BD = self.tower(ids_BL)
        # CoCa's tower also returns its tokens
        return features_BD[0] if isinstance(features_BD, tuple) else features_BD


def load(source: str, *, max_tokens: int) -> OpenCLIPTower:
    """The text tower at `source`: "NAME", "NAME/TAG" or "NAME/FILE".

    NAME, an open_clip configuration, alone gives random weights: to train, or to load a state dict
    into. TAG is one that open_clip knows (fetched on first use), FILE a file with the weights of
    both towers, read without pickled code; the image tower is dropped. Raises ValueError or
    FileNotFoundError in one line.
    """
    import open_clip

    name, _, pretrained = source.partition("/")
    config = open_clip_models.config(name)
    if pretrained:
        clip = open_clip_models.load(name, pretrained, force_custom_text=True)
    else:
        try:
            clip = open_clip.CustomTextCLIP(
                embed_dim=config["embed_dim"],
                vision_cfg=_NO_IMAGES,
                text_cfg={**config["text_cfg"], "hf_model_pretrained": False},
                quick_gelu=config.get("quick_gelu", False),
            )
        except Exception as error:  # some text towers come from the hub
            raise ValueError(
                f"open_clip_tower {source!r} does not load: {_reason(error)}"
            ) from error
    return OpenCLIPTower(
        name, clip.text, width=config["embed_dim"], max_tokens=max_tokens, is_fresh=not pretrained
    )


def example(folder: Path) -> str:
    """A small configuration that open_clip's package holds; writes nothing."""
    return "ViT-S-32-alt"


# published MobileCLIP name -> open_clip's; in a layer, what follows "transformer.N."
_OUTER = {
    "embedding_layer.weight": "token_embedding.weight",
    "positional_embedding.pos_embed.pos_embed": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "projection_layer": "text_projection",
}
_LAYER = {
    "pre_norm_mha.0.weight": "ln_1.weight",
    "pre_norm_mha.0.bias": "ln_1.bias",
    "pre_norm_mha.1.qkv_proj.weight": "attn.in_proj_weight",
    "pre_norm_mha.1.qkv_proj.bias": "attn.in_proj_bias",
    "pre_norm_mha.1.out_proj.weight": "attn.out_proj.weight",
    "pre_norm_mha.1.out_proj.bias": "attn.out_proj.bias",
    "pre_norm_ffn.0.weight": "ln_2.weight",
    "pre_norm_ffn.0.bias": "ln_2.bias",
    "pre_norm_ffn.1.weight": "mlp.c_fc.weight",
    "pre_norm_ffn.1.bias": "mlp.c_fc.bias",
    "pre_norm_ffn.4.weight": "mlp.c_proj.weight",
    "pre_norm_ffn.4.bias": "mlp.c_proj.bias",
}
_PREFIX = "text_encoder."


def mobileclip_state(official: Mapping[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
    """MobileCLIP text weights under the names that `tower`, open_clip's MobileCLIP-B, has for them.

    official: the published text tensors, with or without "text_encoder." before their names, and
    nothing else. tower: gives depth and shapes. The result, fp32, is what `tower` loads strictly.
    Raises ValueError naming the tensors that are missing, unexpected or misshapen.
    """
    wanted = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    names = dict(_OUTER)
    blocks = "transformer.resblocks."
    for layer in {name.split(".")[2] for name in wanted if name.startswith(blocks)}:
        for theirs, ours in _LAYER.items():
            names[f"transformer.{layer}.{theirs}"] = f"{blocks}{layer}.{ours}"
    if set(names.values()) != wanted.keys():
        raise ValueError("this tower is not built as MobileCLIP-B's: its weights are named apart")
    given = {name.removeprefix(_PREFIX): tensor for name, tensor in official.items()}
    wrong = [f"missing {name}" for name in sorted(names.keys() - given.keys())]
    wrong += [f"unexpected {name}" for name in sorted(given.keys() - names.keys())]
    state = {names[name]: tensor.float() for name, tensor in given.items() if name in names}
    table = state.get("positional_embedding")
    if table is not None and table.ndim == 4:  # (1, 1, L, D) there, (L, D) here
        state["positional_embedding"] = table.flatten(0, 2)
    wrong += [
        f"{name} has shape {tuple(state[ours].shape)}, not {tuple(wanted[ours])}"
        for name, ours in names.items()
        if ours in state and state[ours].shape != wanted[ours]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"these are no MobileCLIP text weights: {'; '.join(wrong[:3])}{more}")
    return state


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
