"""Synthetic pairs: a shape that moves, drawn when asked for, and a sentence that tells it.

`annotations = "1000"` is a thousand of them and needs no file: for a first run before there is
data, and for measuring what a run does when data cost nothing. Every pair follows from
(seed, number), and its sentence is true, so that there is something to learn.

Shape legend: T frames, H W pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fluxclip.data.sources import Record, Records, split_settings
from fluxclip.stages import stage
from fluxclip.video import Box, Clip, Fit, VideoError, VideoInfo, evenly_spread
from fluxclip.video.framing import Framing, pixel_span

Floats = npt.NDArray[np.floating[Any]]

_FPS = 8.0
_COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 230), "yellow": (240, 220, 40),
    "orange": (240, 130, 20), "purple": (130, 40, 170), "pink": (250, 140, 190),
    "turquoise": (50, 200, 200),
}  # fmt: skip
_GROUNDS = {"black": (0, 0, 0), "grey": (128, 128, 128), "white": (255, 255, 255)}
# how far (x, y) lies inside a shape of radius about 1, y downwards; below 0 outside
_SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": lambda x, y: 1 - np.hypot(x, y),
    "ring": lambda x, y: 0.25 - np.abs(np.hypot(x, y) - 0.75),
    "square": lambda x, y: 0.85 - np.maximum(np.abs(x), np.abs(y)),
    "diamond": lambda x, y: 0.75 - (np.abs(x) + np.abs(y)) / 2**0.5,
    "triangle": lambda x, y: np.minimum(0.5 - y, 0.5 + y / 2 - 3**0.5 / 2 * np.abs(x)),
    "cross": lambda x, y: np.maximum(
        np.minimum(0.3 - np.abs(x), 0.9 - np.abs(y)), np.minimum(0.9 - np.abs(x), 0.3 - np.abs(y))
    ),
}
# across, down, growth: shares of the picture, and of the shape's radius, over the whole clip
_MOTIONS = {
    "moves left": (-0.5, 0.0, 0.0), "moves right": (0.5, 0.0, 0.0), "moves up": (0.0, -0.5, 0.0),
    "moves down": (0.0, 0.5, 0.0), "grows": (0.0, 0.0, 1.0), "shrinks": (0.0, 0.0, -1.0),
    "stands still": (0.0, 0.0, 0.0),
}  # fmt: skip
_NAMES = [list(table) for table in (_COLOURS, _GROUNDS, _SHAPES, _MOTIONS)]
_KEYS = ("frames", "side", "seed", "stills")


class _Scene(NamedTuple):
    """What a pair shows; x, y, radius: of the shape halfway through, shares of the picture."""

    colour: str
    ground: str
    shape: str
    motion: str
    x: float
    y: float
    radius: float


def files(name: str) -> list[Path]:
    """None: there is nothing to read."""
    return []


def read(path: str | Path, *, check_files: bool = True) -> Records:
    """So many pairs as `path` says: "1000" or "1000?frames=16&side=128&seed=0&stills=0.25".

    frames: of a clip, 8 a second. side: pixels of its picture, when nobody asks for others. stills:
    the share of the pairs that are pictures. Raises ValueError for anything else.
    """
    number, given = split_settings(str(path), known=_KEYS)
    try:
        size = int(number)
        frames, side, seed = (
            int(given.get(key, default))
            for key, default in (("frames", 16), ("side", 128), ("seed", 0))
        )
        stills = float(given.get("stills", 0))
        if min(size, frames, side) < 1 or seed < 0 or not 0 <= stills <= 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"a synthetic source is called by its number of pairs, as in 1000 or "
            f"1000?frames=16&side=128&seed=0&stills=0.25, got {path}"
        ) from None
    return _Drawn(size, num_frames=frames, side=side, seed=seed, stills=stills)


class _Drawn(Records):
    """Pairs that are drawn; as if each were a file of one picture size, frame rate and length."""

    def __init__(self, size: int, *, num_frames: int, side: int, seed: int, stills: float) -> None:
        self.size, self.num_frames, self.side = size, num_frames, side
        self.seed, self.stills = seed, stills

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return super().__getitem__(index)
        index = range(self.size)[index]
        scene, is_still = self._scene(index)
        what = f"a {scene.colour} {scene.shape}"
        does = "" if is_still else f" {scene.motion}"
        captions = (f"{what}{does}", f"on {scene.ground} ground, {what}{does}")
        return Record(Path(f"synthetic-{index}.{'png' if is_still else 'mp4'}"), captions, None)

    def is_there(self, index: int) -> Literal[True]:
        """There is nothing that could be missing."""
        return True

    def info(self, index: int) -> VideoInfo:
        """Duration and size of a pair's video."""
        record = self[index]
        num_frames, fps = (1, 0.0) if record.is_still else (self.num_frames, _FPS)
        duration_s = 0.0 if record.is_still else num_frames / fps
        return VideoInfo(
            record.video, duration_s, num_frames, self.side, self.side, fps, record.is_still
        )

    def clip(self, index: int, **wanted: Any) -> Clip:
        """Frames of a pair's video, chosen as for `read_clip`; no decoder is needed."""
        return self._clip(index, **wanted)

    def _clip(
        self, index: int, *, num_frames: int | None = None,
        times_s: Sequence[float] | npt.NDArray[np.float64] | None = None,
        start_s: float = 0.0, end_s: float | None = None, side: int | None = None,
        fit: Fit = "crop", crop: Box | None = None, decoder: str = "",
    ) -> Clip:  # fmt: skip
        if (num_frames is None) == (times_s is None):
            raise ValueError("give either num_frames or times_s")
        info = self.info(index)
        if info.is_image:
            frame_T = np.zeros(1)
        else:
            if num_frames is not None:
                end_s = info.duration_s if end_s is None else min(end_s, info.duration_s)
                times_s = evenly_spread(start_s, end_s, num_frames)
            assert times_s is not None
            frame_T = np.floor(np.asarray(times_s) * info.fps)
            if frame_T[-1] >= self.num_frames:
                reason = f"no frame at {times_s[-1]:g} s, it lasts {info.duration_s:g} s"
                raise VideoError(info.path, reason)
        # a picture of any part, at any size, is drawn as such
        top, left, bottom, right = Framing(side, fit, crop).box(self.side, self.side)
        height = side or np.ptp(pixel_span(top, bottom, self.side))
        width = side or np.ptp(pixel_span(left, right, self.side))
        with stage("decode"):
            y_H = top + (np.arange(height, dtype=np.float32) + 0.5) * ((bottom - top) / height)
            x_W = left + (np.arange(width, dtype=np.float32) + 0.5) * ((right - left) / width)
            frames_THWC = _drawn(self._scene(index)[0], frame_T, self.num_frames, y_H, x_W)
        return Clip(frames_THWC, frame_T / (info.fps or 1.0))

    def _scene(self, index: int) -> tuple[_Scene, bool]:
        """What a pair shows, and whether it is a picture."""
        drawn = np.random.default_rng([self.seed, index]).random(8).tolist()
        colour, ground, shape, motion = (
            names[int(share * len(names))] for names, share in zip(_NAMES, drawn[:4], strict=True)
        )
        x, y, radius = 0.4 + 0.2 * drawn[4], 0.4 + 0.2 * drawn[5], 0.12 + 0.08 * drawn[6]
        return _Scene(colour, ground, shape, motion, x, y, radius), drawn[7] < self.stills


def _drawn(
    scene: _Scene, frame_T: npt.NDArray[np.float64], num_frames: int,
    y_H: npt.NDArray[np.float64], x_W: npt.NDArray[np.float64],
) -> npt.NDArray[np.uint8]:  # fmt: skip
    """uint8 (T, H, W, 3): a scene at some frames, its picture at some rows and columns, 0-1."""
    across, down, growth = _MOTIONS[scene.motion]
    since_T11 = ((frame_T + 0.5) / num_frames - 0.5).astype(np.float32)[:, None, None]
    radius_T11 = scene.radius * (1 + growth * since_T11)
    x_TW = (x_W.astype(np.float32) - scene.x - across * since_T11) / radius_T11
    y_TH = (y_H.astype(np.float32)[:, None] - scene.y - down * since_T11) / radius_T11
    inside_THW = _SHAPES[scene.shape](x_TW, y_TH) * radius_T11
    pixel = max(np.ptp(y_H) / len(y_H), np.ptp(x_W) / len(x_W), 1e-6)
    share_THW1 = np.clip(inside_THW / pixel + 0.5, 0, 1)[..., None]
    ground, colour = (
        np.array(table[name], np.float32)
        for table, name in ((_GROUNDS, scene.ground), (_COLOURS, scene.colour))
    )
    return (ground + share_THW1 * (colour - ground) + 0.5).astype(np.uint8)
