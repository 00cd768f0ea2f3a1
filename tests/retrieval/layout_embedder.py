"""A small embedder for these tests: where the colours are in a clip, which words are in a text."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fluxclip.video import Clip, read_clip


class LayoutEmbedder:
    """The mean colour of each of cells x cells parts of the picture; a random vector per word.

    It keeps the contract of an Embedder: unit float32 vectors, each of its own clip alone.
    """

    fit: Literal["crop", "squash"] = "squash"
    logit_scale = 10.0

    def __init__(self, name: str = "layout", *, cells: int = 4, contrast: float = 1.0) -> None:
        self.name = name
        self.dim = 3 * cells * cells
        self.fingerprint = hashlib.sha256(f"{cells} {contrast}".encode()).hexdigest()
        self._cells, self._contrast = cells, contrast

    def num_tokens(self, num_frames: int, side: int) -> int:
        return num_frames * (side // 8) ** 2

    def grid(self, token_budget: int | None) -> tuple[int, int]:
        side = 32
        return (4 if token_budget is None else max(1, token_budget // 16)), side

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> np.ndarray:
        return np.stack([self._layout(video, token_budget) for video in videos])

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        vectors = [sum(map(self._word, text.lower().split())) for text in texts]
        return np.stack([v / np.linalg.norm(v) for v in vectors]).astype(np.float32)

    def _layout(self, video: str | Path | Clip, token_budget: int | None) -> np.ndarray:
        if not isinstance(video, Clip):
            num_frames, side = self.grid(token_budget)
            video = read_clip(video, num_frames=num_frames, side=side, fit=self.fit)
        frames = video.frames_THWC / 127.5 - 1
        t, side, _, _ = frames.shape
        cell = side // self._cells
        parts = frames.reshape(t, self._cells, cell, self._cells, cell, 3).mean((0, 2, 4)).ravel()
        parts = np.sign(parts) * np.abs(parts) ** self._contrast
        return (parts / np.linalg.norm(parts)).astype(np.float32)

    def _word(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        return np.random.default_rng(seed).normal(size=self.dim)
