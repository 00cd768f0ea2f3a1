"""Names of InternVideo2's video towers, of which FluxViT is one, as ours."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from fluxclip.model.presets import VideoTowerConfig

# official name -> ours, by the longest prefix; what follows the prefix is kept
_OUTER = {
    "patch_embed.": "patch_embed.",
    "gpe_proj.depthwise_conv.weight": "positions.scale",
    "gpe_proj.depthwise_conv.bias": "positions.shift",
    "cls_token": "class_token",
}
_BLOCK = {
    "attn.lpe.depthwise_conv.weight": "attn.lpe_scale",
    "attn.lpe.depthwise_conv.bias": "attn.lpe_shift",
    "ls1.gamma": "ls1",
    "ls2.gamma": "ls2",
}
_POOL = {
    "norm1_": "norm_", "cross_attn.q_bias": "q.bias", "cross_attn.k_bias": "k.bias",
    "cross_attn.v_bias": "v.bias", "cross_attn.": "",
}  # fmt: skip


def vision(
    state: Mapping[str, Tensor], config: VideoTowerConfig, *, tower: str = "tower."
) -> dict[str, Tensor]:
    """The tower's tensors as fp32 under our names, after the prefix `tower`; others as they are.

    Raises ValueError for a position table of another size.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.float()
        if name == "pos_embed":
            _check_table(tensor, config)
            side = config.table_side // config.patch
            renamed[tower + "class_position"] = tensor[0, 0]
            renamed[tower + "positions.table"] = tensor[0, 1:].view(-1, side, side, config.width)
        elif name == "patch_embed.proj.weight" and tensor.ndim == 5:
            # Conv3d (D, 3, t, y, x) -> Linear over pixels ordered (t, y, x, channel)
            renamed[tower + name] = tensor.permute(0, 2, 3, 4, 1).flatten(1)
        else:
            ours = _ours(name)
            if tensor.ndim == 5 or name == "cls_token":
                tensor = tensor.flatten()
            renamed[name if ours is None else tower + ours] = tensor
    return renamed


def depth(names: Iterable[str]) -> int:
    """Number of blocks in a state dict of these official names."""
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def width(class_token: Tensor | None) -> int:
    """Channels of a tower by its class token, whatever its shape; 0 without one."""
    return 0 if class_token is None else class_token.numel()


def replace_prefix(name: str, table: Mapping[str, str]) -> str:
    """The name with its longest prefix in the table replaced by what the table has for it."""
    prefix = max((p for p in table if name.startswith(p)), key=len, default=None)
    return name if prefix is None else table[prefix] + name.removeprefix(prefix)


def _check_table(table: Tensor, config: VideoTowerConfig) -> None:
    positions = config.num_tokens(config.table_frames, config.table_side)
    wanted = (1, 1 + positions, config.width)
    if table.shape != wanted:
        raise ValueError(
            f"pos_embed has shape {tuple(table.shape)}, not {wanted}, that of a class token and "
            f"{config.table_frames} frames of {config.table_side} pixels in a tower of width "
            f"{config.width}"
        )


def _ours(name: str) -> str | None:
    """Our name of a tower's tensor; None for one that is not of the tower."""
    part, _, rest = name.partition(".")
    if part == "blocks":
        index, _, rest = rest.partition(".")
        return f"blocks.{index}.{replace_prefix(rest, _BLOCK)}"
    if part == "clip_projector":
        # one per budget in FluxViT, a single one, which has no index, in InternVideo2
        index, _, inner = rest.partition(".")
        if not index.isdecimal():
            index, inner = "0", rest
        return f"pools.{index}.{replace_prefix(inner, _POOL)}"
    ours = replace_prefix(name, _OUTER)
    return None if ours == name and part != "patch_embed" else ours
