"""FluxCLIP: a video tower and a text tower that meet in one space. Tensors in, tensors out.

Shape legend: B clips or captions, T frames, H W pixels, L text tokens, D shared width.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxclip.model.presets import FluxCLIPConfig, PreprocessConfig
from fluxclip.model.video_tower import VideoTower
from fluxclip.text.encoder import TextEncoder
from fluxclip.tokens.draws import Draws
from fluxclip.tokens.selection import Selection, check_budget


@dataclass(frozen=True)
class View:
    """Clips at one token budget: unit vectors, what they were projected from, and the tokens.

    All fp32, under autocast too: losses are. tokens_SW: the blocks' output (W their width) for the
    selected patches of all clips.
    """

    vector_BD: Tensor
    pooled_BP: Tensor
    tokens_SW: Tensor
    selection: Selection


class FluxCLIP(nn.Module):
    """Contrastive video-text model; both encoders return unit vectors (B, D).

    text_encoder: an object as in fluxclip/text/encoder.py. With weights "reference" it is frozen
    and left out of the saved weights. A tower none of whose weights require a gradient is run
    without a graph and stays in eval mode: nothing in it is random.
    """

    def __init__(self, config: FluxCLIPConfig, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.config = config
        self.video = VideoTower(config.video)
        self.video_projection = _video_projection(config)
        self.text = text_encoder
        self.text_projection = _text_projection(config, text_encoder.width)
        # CLIP's start, temperature 0.07; kept below 100 by clamp_scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if not self.text_is_stored:
            self.text.requires_grad_(False)
        self.train(self.training)

    @property
    def text_is_stored(self) -> bool:
        """Whether the text tower's weights are saved with the model; else they are referred to."""
        return self.config.text.weights == "stored"

    @property
    def text_is_frozen(self) -> bool:
        """Whether no weight of the text tower is trained."""
        return _is_frozen(self.text)

    @property
    def video_is_frozen(self) -> bool:
        """Whether no weight of the video tower is trained; its projection is not part of it."""
        return _is_frozen(self.video)

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied by before the softmax, 1 / temperature: at most 100."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keep the scale within [1, 100], as CLIP does; called after each optimizer step."""
        self.log_scale.clamp_(0, math.log(100))

    def train(self, mode: bool = True) -> "FluxCLIP":
        super().train(mode)
        for tower in (self.video, self.text):
            if _is_frozen(tower):
                tower.eval()
        return self

    def recompute_blocks(self) -> None:
        """Keep only the inputs of both towers' blocks for the backward pass.

        It computes the blocks again: the same gradients in less memory, for about a third more
        time. A tower that is frozen keeps nothing anyway.
        """
        self.video.recompute = True
        self.text.recompute_blocks()

    @property
    def dim(self) -> int:
        return self.config.dim

    @property
    def preprocess(self) -> PreprocessConfig:
        return self.config.preprocess

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Captions to ids (B, L) for `encode_text`."""
        return self.text.tokenize(texts)

    @property
    def text_limit(self) -> int:
        """Text tokens that are read; a longer caption is cut."""
        return self.text.max_tokens

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which captions are longer than `text_limit`."""
        return self.text.are_cut(texts)

    @property
    def scorer(self) -> str:
        """What chooses the tokens that a budget keeps."""
        return self.config.video.scorer

    def num_tokens(self, num_frames: int, side: int) -> int:
        """Tokens of a grid, class token not counted."""
        return self.config.video.num_tokens(num_frames, side)

    def grid(self, token_budget: int | None = None) -> tuple[int, int]:
        """(num_frames, side) that the model's table gives for a budget."""
        check_budget(token_budget)
        return self.config.grids.grid(token_budget)

    def macs(self, num_frames: int, side: int, token_budget: int | None = None) -> int:
        """Multiply-accumulates per clip, the embedding of discarded tokens included."""
        check_budget(token_budget)
        num_tokens = self.num_tokens(num_frames, side)
        return self.video.macs(num_tokens, min(num_tokens, token_budget or num_tokens))

    def clip_costs(self, frames_BTHWC: Tensor, budget: int | None = None) -> list[tuple[int, int]]:
        """(tokens encoded, multiply-accumulates) of each clip; a filter makes them differ."""
        check_budget(budget)
        counts = self.video.count(frames_BTHWC, budget)
        return [(kept, self.video.macs(embedded, kept)) for embedded, kept in counts]

    @property
    def filter(self) -> str | None:
        """The pixel filter with its settings; None without one."""
        video = self.config.video
        given = ", ".join(f"{name}={value}" for name, value in video.filter_settings.items())
        return f"{video.filter}({given})" if video.filter else None

    def encode_video(self, frames_BTHWC: Tensor, budget: int | None = None) -> Tensor:
        """Unit vectors (B, D) of normalised frames, from at most `budget` tokens per clip."""
        return self.encode_clips([frames_BTHWC], budget)

    def encode_clips(self, groups_BTHWC: Sequence[Tensor], budget: int | None = None) -> Tensor:
        """Unit vectors (sum of B, D) of groups of clips, each group of one shape, in this order.

        They go through the blocks together, packed by their tokens, without padding.
        """
        groups = []
        for frames_BTHWC in groups_BTHWC:
            patches = self.video.embed(frames_BTHWC)
            groups.append((patches, self.video.select(patches, budget)))
        return self.project_video(self.video.pool(self.video.encode_packed(groups)))

    def encode_video_views(
        self, frames_BTHWC: Tensor, budgets: Sequence[int], *,
        draws: Draws | None = None,
    ) -> list[View]:  # fmt: skip
        """One view per budget; the patches are embedded once for all.

        Budgets that no clip has tokens for (a still has few) share one pass. draws: of the clips,
        for what is random in training.
        """
        with _graph_of(self.video):
            patches = self.video.embed(frames_BTHWC)
        # where a filter decides how many tokens clips have, sharing a pass would make the draws
        # of a clip depend on the others of its batch
        most = patches.most_tokens if draws is None or patches.kept is None else max(budgets)
        views: dict[int, View] = {}
        for budget in dict.fromkeys(min(budget, most) for budget in budgets):
            own = draws and draws.at(budget)
            with _graph_of(self.video):
                selection = self.video.select(patches, budget, draws=own)
                encoded = self.video.encode(patches, selection, draws=own)
                pooled_BP = self.video.pool(encoded)
            views[budget] = View(
                self.project_video(pooled_BP),
                pooled_BP.float(),
                encoded.patches_SD.float(),
                selection,
            )
        return [views[min(budget, most)] for budget in budgets]

    def encode_text(self, ids_BL: Tensor) -> Tensor:
        """Unit vectors (B, D) of captions given as ids from `self.text.tokenize`."""
        return self.project_text(self.text_features(ids_BL))

    def text_features(self, ids_BL: Tensor) -> Tensor:
        """Features (B, width) before the projection; without gradients if the tower is frozen."""
        with _graph_of(self.text):
            features: Tensor = self.text(ids_BL)
        return features

    def project_video(self, pooled_BP: Tensor) -> Tensor:
        return F.normalize(self.video_projection(pooled_BP).float(), dim=-1)

    def project_text(self, features_BW: Tensor) -> Tensor:
        return F.normalize(self.text_projection(features_BW).float(), dim=-1)


def _is_frozen(tower: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in tower.parameters())


def _graph_of(tower: nn.Module) -> AbstractContextManager[object]:
    """A context in which a frozen tower leaves no graph behind; a trained one does as outside."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and not _is_frozen(tower))


def _video_projection(config: FluxCLIPConfig) -> nn.Module:
    """Pooled features to the shared space; the identity where the anatomy has no projection."""
    parts, pooled = config.video.parts, config.video.pooled
    if not parts.projection:
        return nn.Identity()
    eps = parts.norm_eps if parts.norm == "layer" else 1e-5
    return nn.Sequential(nn.LayerNorm(pooled, eps), nn.Linear(pooled, config.dim))


def _text_projection(config: FluxCLIPConfig, width: int) -> nn.Module:
    """Text features, `width` channels, to the shared space."""
    if config.text.projection == "none":
        if width != config.dim:
            raise ValueError(
                f"text.projection is none, but the text tower gives {width} channels and dim is "
                f"{config.dim}"
            )
        return nn.Identity()
    projection = nn.Linear(width, config.dim)
    # starts as a rotation (or the nearest thing), so that captions keep the distances that the
    # text tower learned from far more text than a video set has
    nn.init.orthogonal_(projection.weight)
    nn.init.zeros_(projection.bias)
    return projection
