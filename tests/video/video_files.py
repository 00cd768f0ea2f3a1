"""Small videos with known pictures at known times, and the slow reader as an oracle."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation

# The scaler of the decoder under test; the oracle shares it to be compared bit by bit.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)


def level_of(index: int) -> int:
    """The grey level that marks frame `index`: neighbours differ by far more than coding noise."""
    return 20 + 37 * index % 216


def grey_pictures(num_frames: int, *, width: int = 64, height: int = 48) -> list[np.ndarray]:
    return [np.full((height, width, 3), level_of(i), np.uint8) for i in range(num_frames)]


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    times_s: Sequence[float] | None = None,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    coding: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
    tick: Fraction = Fraction(1, 1000),
    rotation: int | None = None,
    sound_s: float = 0.0,
) -> Path:
    """Write RGB pictures (H, W, 3), one every 1/25 s or at the given times."""
    if times_s is None:
        times_s = [i / 25 for i in range(len(pictures))]
    with av.open(str(path), "w", options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=25, options=coding or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.time_base = tick
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("libopus", rate=48000) if sound_s else None
        for time_s, picture in zip(times_s, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = round(time_s / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            silence = np.zeros((1, round(48000 * sound_s)), np.float32)
            samples = av.AudioFrame.from_ndarray(silence, format="flt", layout="mono")
            samples.sample_rate, samples.pts = 48000, 0
            container.mux(sound.encode(samples))
            container.mux(sound.encode())
    return path


def remux(source: Path, path: Path, *, shift_s: float = 0.0, **muxing: str) -> Path:
    """Copy the coded pictures of a video into another file, without coding them again."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=muxing) as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        shift = round(shift_s / stream.time_base)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.stream = target
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                new.mux(packet)
    return path


def decode_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: every frame from first to last, (T, H, W, 3) as stored, and their times (T,)."""
    pictures, ticks = [], []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        time_base = stream.time_base
        for frame in container.decode(stream):
            rgb = frame.reformat(format="rgb24", interpolation=EXACT, threads=1)
            pictures.append(rgb.to_ndarray().copy())
            ticks.append(frame.pts)
    return np.stack(pictures), np.array([float((tick - ticks[0]) * time_base) for tick in ticks])


def on_screen(times_s: np.ndarray, wanted_s: np.ndarray) -> np.ndarray:
    """Index of the last frame at or before each wanted time."""
    return np.searchsorted(times_s, wanted_s, side="right") - 1
