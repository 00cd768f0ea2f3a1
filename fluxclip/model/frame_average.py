"""Any open_clip image-text model over the frames of a clip, averaged: public weights on day one.

Shape legend: B clips or captions, T frames, H W pixels, D width of the shared space.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxclip.model.presets import PreprocessConfig
from fluxclip.text import open_clip_models
from fluxclip.tokens.selection import check_budget

NUM_FRAMES = 8  # of the default grid: what CLIP4Clip-like systems and Perception Encoder use
MAX_FRAMES = 64  # of any grid: what long-video evaluations of such models use, and memory bears


class FrameAverage(nn.Module):
    """Unit image vectors of each frame, averaged, then unit length again.

    name: an open_clip configuration. pretrained: a tag that open_clip knows (fetched from the hub
    on first use), or a local weights file. A token is a patch of a frame, so a token budget chooses
    how many whole frames are seen, from 1 to 64.
    """

    def __init__(self, name: str, pretrained: str) -> None:
        super().__init__()
        import open_clip  # costs seconds to import: only who uses it pays

        self.clip = open_clip_models.load(name, pretrained)
        self.tokenize_one = open_clip.get_tokenizer(name)
        visual: Any = self.clip.visual
        size = visual.image_size
        self.side: int = size if isinstance(size, int) else size[0]
        self.patches_per_frame = _patches(self.clip, self.side)
        settings = visual.preprocess_cfg
        self.preprocess = PreprocessConfig(
            mean=tuple(settings["mean"]),
            std=tuple(settings["std"]),
            fit="squash" if settings.get("resize_mode") == "squash" else "crop",
        )
        # what changes vectors beside the weights: for the fingerprint
        self.architecture = open_clip_models.config(name)
        self._macs_per_frame: int | None = None
        self.eval().requires_grad_(False)
        self.dim: int = self.encode_text(self.tokenize(["a"])).shape[-1]

    @property
    def logit_scale(self) -> Tensor:
        return self.clip.logit_scale.exp()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        ids_BL: Tensor = self.tokenize_one(list(texts))
        return ids_BL

    @property
    def text_limit(self) -> int:
        """Text tokens that are read; a longer text is cut."""
        return self.tokenize(["a"]).shape[-1]

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are longer than `text_limit`."""
        return open_clip_models.are_cut(self.tokenize_one, texts, limit=self.text_limit)

    def num_tokens(self, num_frames: int, side: int) -> int:
        if side != self.side:
            raise ValueError(f"this open_clip model takes frames of {self.side} pixels, not {side}")
        if num_frames < 1:
            raise ValueError(f"a grid has 1 frame or more, got {num_frames}")
        return num_frames * self.patches_per_frame

    def grid(self, token_budget: int | None = None) -> tuple[int, int]:
        """(num_frames, side): as many whole frames as the budget pays for, 8 without one."""
        check_budget(token_budget)
        if token_budget is None:
            return NUM_FRAMES, self.side
        return min(MAX_FRAMES, max(1, token_budget // self.patches_per_frame)), self.side

    def macs(self, num_frames: int, side: int, token_budget: int | None = None) -> int:
        """Multiply-accumulates per clip, counted by running the image tower on one frame."""
        if self._macs_per_frame is None:
            self._macs_per_frame = _count_macs(self.clip, self.side)
        return num_frames * self._macs_per_frame

    @torch.no_grad()
    def encode_video(self, frames_BTHWC: Tensor, budget: int | None = None) -> Tensor:
        """Unit vectors (B, D) of normalised frames; the budget caps the number of frames."""
        b, t = frames_BTHWC.shape[:2]
        check_budget(budget)
        if budget is not None:
            most = max(1, budget // self.patches_per_frame)
            keep = [int((i + 0.5) * t / most) for i in range(most)] if most < t else range(t)
            frames_BTHWC = frames_BTHWC[:, list(keep)]
        images = frames_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)
        features = F.normalize(self.clip.encode_image(images).float(), dim=-1)
        return F.normalize(features.view(b, -1, features.shape[-1]).mean(1), dim=-1)

    def encode_clips(self, groups_BTHWC: Sequence[Tensor], budget: int | None = None) -> Tensor:
        """Unit vectors (sum of B, D) of groups of clips, each group of one shape, in this order."""
        return torch.cat([self.encode_video(frames, budget) for frames in groups_BTHWC])

    @torch.no_grad()
    def encode_text(self, ids_BL: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_text(ids_BL).float(), dim=-1)


def _patches(clip: Any, side: int) -> int:
    """Patches per frame; for towers without a patch grid (ResNets), their 32-pixel cells."""
    visual = clip.visual
    if hasattr(visual, "grid_size"):
        rows, columns = visual.grid_size
        return int(rows * columns)
    embed: Any = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    if hasattr(embed, "num_patches"):
        return int(embed.num_patches)
    return (side // 32) ** 2


def _count_macs(clip: Any, side: int) -> int:
    """Multiply-accumulates of the image tower on one frame."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(clip.parameters()).device
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter cannot see into it
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            clip.encode_image(torch.zeros(1, 3, side, side, device=device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2
