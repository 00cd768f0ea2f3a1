"""Frames to an mp4 that is quick to seek in: H.264, small, short closed groups, the same times.

    with pyav.open_video(path) as video, io.BytesIO() as file:
        size = scaled_size(video.info.width, video.info.height, side=288)
        end = round(video.info.duration_s / video.tick)
        encode(file, video.walk(0.0), end_ticks=end, tick=video.tick, size=size, gop=15)

The same frames give the same bytes: one thread, and no draws.
"""

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import IO

import av
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from fluxclip.video.decoders.pyav import open_video, over_white, quarter_turns

# Constant quality, high enough that where the cuts are does not matter (40 dB between two ways).
# Without CABAC, deblocking and frames that refer forward, decoding takes half as long for a tenth
# more bytes; mp4 also cannot state exactly when a video of uneven rate ends that has such frames.
CODING = {"crf": "16", "preset": "veryfast", "tune": "fastdecode", "bf": "0", "sc_threshold": "0"}

# Filters that set a picture upright, by counterclockwise quarter turns.
_TURNS: dict[int, list[str]] = {0: [], 1: ["cclock"], 2: ["clock", "clock"], 3: ["clock"]}
_SCALING = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"

# Whatever colours are made of in the source: what readers take for granted in small pictures.
_COLOURS = "out_color_matrix=bt601:out_range=tv"
_BT601 = 6  # SMPTE 170M, in FFmpeg's list of matrices


class EncodingError(ValueError):
    """Frames that cannot be made into a video; one line says why, not of which file."""


def scaled_size(width: int, height: int, *, side: int) -> tuple[int, int]:
    """(width, height) whose shorter is `side`, never larger than given, both even as yuv420p is."""
    scale = min(1.0, side / min(width, height))
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def encode(
    file: IO[bytes],
    frames: Iterable[tuple[int, av.VideoFrame]],
    *,
    end_ticks: int,
    tick: Fraction,
    size: tuple[int, int],
    gop: int,
    sound: Iterable[av.AudioFrame] = (),
) -> list[int]:
    """Write frames as an mp4, upright and opaque; returns their ticks as given.

    Args:
        file: open, can be sought in. What writing to it raises is raised.
        frames: ticks, strictly ascending, and frames as `PyavVideo.walk` gives them. The first is
            at time 0 of the mp4 and all others keep their distance to it exactly.
        end_ticks: when the last frame ends.
        tick: the unit of ticks in seconds.
        size: (width, height) in pixels of the upright picture, even.
        gop: every so many frames is a keyframe that no frame refers beyond.
        sound: all of one rate and layout, with times from 0 of the mp4; coded as AAC. Without any
            the mp4 has no sound.

    Raises EncodingError for no frames, for frames that change size on the way, and where the
    encoder refuses them.
    """
    ticks: list[int] = []

    def noted() -> Iterable[tuple[int, av.VideoFrame | None]]:
        for pair in frames:
            ticks.append(pair[0])
            yield pair

    kept = _File(file)
    try:
        with av.open(kept, "w", format="mp4") as container:
            _write(container, chain(noted(), [(end_ticks, None)]), tick, size, gop, sound)
    except av.FFmpegError as error:
        if kept.error is None:
            raise EncodingError(f"cannot be encoded ({error.strerror})") from error
    if kept.error is not None:
        raise kept.error
    return ticks


class _File:
    """Keeps what went wrong in writing to a file: FFmpeg says no more than that something did."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None
        self.tell, self.seekable = file.tell, file.seekable

    def write(self, data: bytes) -> int:
        return self._noted(self._file.write, data)

    def seek(self, at: int, whence: int = 0) -> int:  # writes what a buffer holds
        return self._noted(self._file.seek, at, whence)

    def _noted(self, act: Callable[..., int], *arguments: object) -> int:
        try:
            return act(*arguments)
        except OSError as error:
            self.error = self.error or error
            raise


def times_in(path: Path) -> list[Fraction]:
    """Decode a file from end to end: the seconds of its frames from the first, exactly.

    Raises VideoError if any of it cannot be decoded.
    """
    with open_video(path) as video:
        return [ticks * video.tick for ticks, _ in video.walk(0.0)]


def _write(
    container: OutputContainer,
    frames: Iterable[tuple[int, av.VideoFrame | None]],
    tick: Fraction,
    size: tuple[int, int],
    gop: int,
    sound: Iterable[av.AudioFrame],
) -> None:
    stream, picture, origin = container.add_stream("libx264", options=CODING), None, 0
    assert isinstance(stream, VideoStream)
    beside = _Sound(container, sound)
    lasts: dict[int, int] = {}  # the encoder forgets how long a frame is on screen

    def put(packets: list[av.Packet]) -> None:
        for packet in packets:
            assert packet.pts is not None
            packet.duration = lasts.pop(packet.pts)
            container.mux(packet)

    for (at, frame), (following, _) in pairwise(frames):
        assert frame is not None
        if picture is None:
            picture, origin = _Picture(frame, size), at
            _set_up(stream.codec_context, frame, size, tick, gop)
        small = picture.of(frame)
        small.pts, small.time_base = at - origin, tick
        beside.put(until_s=float(small.pts * tick))
        small.pict_type = PictureType.NONE  # what it was in the source is no wish
        lasts[small.pts] = max(1, following - at)
        put(stream.encode(small))
    if picture is None:
        raise EncodingError("no frames to encode")
    put(stream.encode())
    beside.finish()


class _Sound:
    """Codes sound beside the pictures, a little at a time, so that neither waits in memory."""

    def __init__(self, container: OutputContainer, frames: Iterable[av.AudioFrame]) -> None:
        self._container, self._frames = container, iter(frames)
        self._next = next(self._frames, None)
        self._stream: AudioStream | None = None
        if self._next is not None:
            rate, layout = self._next.sample_rate, self._next.layout.name
            self._stream = container.add_stream("aac", rate=rate, layout=layout)

    def put(self, *, until_s: float) -> None:
        while self._stream and self._next is not None:
            if self._next.time is not None and self._next.time > until_s:
                return
            self._container.mux(self._stream.encode(self._next))
            self._next = next(self._frames, None)

    def finish(self) -> None:
        self.put(until_s=math.inf)
        if self._stream:
            self._container.mux(self._stream.encode())


def _set_up(
    codec: VideoCodecContext,
    source: av.VideoFrame,
    size: tuple[int, int],
    tick: Fraction,
    gop: int,
) -> None:
    """State what the pictures are, before the first is encoded."""
    (codec.width, codec.height), codec.pix_fmt = size, "yuv420p"
    codec.time_base, codec.thread_count, codec.gop_size = tick, 1, gop
    codec.colorspace, codec.color_range = _BT601, ColorRange.MPEG
    codec.color_primaries, codec.color_trc = source.color_primaries, source.color_trc


class _Picture:
    """Makes frames upright, opaque, small and yuv420p."""

    def __init__(self, first: av.VideoFrame, size: tuple[int, int]) -> None:
        self._form = _form(first)
        self._has_alpha = any(component.is_alpha for component in first.format.components)
        first = self._opaque(first)
        self._graph = Graph()
        self._graph.threads = 1
        source = self._graph.add_buffer(
            width=first.width,
            height=first.height,
            format=first.format,
            time_base=Fraction(1, 1000),  # times are set by who encodes
        )
        self._graph.link_nodes(
            source,
            *(self._graph.add("transpose", turn) for turn in _TURNS[self._form[-1]]),
            self._graph.add("scale", f"w={size[0]}:h={size[1]}:{_SCALING}:{_COLOURS}"),
            self._graph.add("format", "pix_fmts=yuv420p"),
            self._graph.add("buffersink"),
        ).configure()

    def of(self, frame: av.VideoFrame) -> av.VideoFrame:
        """A frame of its own; the one given stays as it is."""
        if _form(frame) != self._form:
            raise EncodingError("its pictures change size or form on the way")
        self._graph.vpush(self._opaque(frame))
        return self._graph.vpull()

    def _opaque(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Over white, as the reader shows what is transparent."""
        if not self._has_alpha:
            return frame
        rgba_HW4 = frame.reformat(format="rgba", threads=1).to_ndarray()
        return av.VideoFrame.from_ndarray(over_white(rgba_HW4), format="rgb24")


def _form(frame: av.VideoFrame) -> tuple[int, int, str, int]:
    return frame.width, frame.height, frame.format.name, quarter_turns(frame)
