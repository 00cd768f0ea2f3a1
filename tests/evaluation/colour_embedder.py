"""A small honest embedder for the tests of this folder: it knows colours and nothing else."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxclip.video import Clip, read_clip

RGB = {
    "red": (230, 30, 60),
    "orange": (255, 130, 40),
    "yellow": (255, 210, 50),
    "green": (50, 190, 60),
    "blue": (30, 140, 230),
    "purple": (140, 80, 220),
    "brown": (140, 80, 60),
    "black": (60, 55, 65),
    "white": (240, 240, 240),
}


class ColourEmbedder:
    """Knows colours only: a clip is its mean hue off white, a text the colour it names.

    One token is one 56-pixel square of a frame; a budget takes the first tokens of the grid.
    """

    name = "colours"
    fingerprint = "c0105" * 8
    dim = 4
    logit_scale = 10.0
    fit = "crop"

    def num_tokens(self, num_frames: int, side: int) -> int:
        return num_frames * (side // 56) ** 2

    def grid(self, token_budget: int | None = None) -> tuple[int, int]:
        return (4, 112) if token_budget is None or token_budget > 8 else (2, 112)

    def macs(self, num_frames: int, side: int, token_budget: int | None = None) -> int:
        return num_frames * side * side * 3 + (token_budget or self.num_tokens(num_frames, side))

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> npt.NDArray[np.float32]:
        num_frames, side = self.grid(token_budget)
        rows = []
        for video in videos:
            clip = video if isinstance(video, Clip) else read_clip(video, num_frames=num_frames)
            squares = clip.frames_THWC.reshape(-1, side // 56, 56, side // 56, 56, 3)
            tokens = squares.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 56 * 56, 3)[:token_budget]
            pixels = tokens.reshape(-1, 3).astype(np.float64)
            drawn = pixels[pixels.min(axis=1) < 225]
            rows.append(drawn.mean(axis=0) if len(drawn) else np.full(3, 240.0))
        return self._unit(np.array(rows))

    def embed_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        grey = (128, 128, 128)
        named = ([RGB[word] for word in text.split() if word in RGB] or [grey] for text in texts)
        return self._unit(np.array([colours[0] for colours in named], dtype=np.float64))

    def _unit(self, rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Hue and brightness on a sphere, so that black, grey and white stay apart."""
        x = np.concatenate([rgb / 128 - 1, np.full((len(rgb), 1), 0.5)], axis=1)
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
