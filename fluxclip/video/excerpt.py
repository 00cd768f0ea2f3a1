"""A part of a video as a video of its own: [start_s, end_s) exactly, coded anew, sound and all."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import IO, Literal

import av
from av.container import InputContainer
from av.filter import Graph

from fluxclip.video import chunks, encoder
from fluxclip.video.clip import VideoError, VideoInfo
from fluxclip.video.decoders.pyav import OPEN_OPTIONS, open_video
from fluxclip.video.reader import probe, read_clip

GOP = 24  # every so many frames is a keyframe, so that players seek in about a second
_SOUND_RATE = 48_000
_EARLIER_S = 1.0  # where sound is sought: its packets may begin before the wanted time
_STILL_TICK = Fraction(1, 1000)

_Frames = Generator[tuple[int, av.VideoFrame], None, None]


def write_excerpt(
    path: str | Path,
    file: IO[bytes],
    *,
    start_s: float,
    end_s: float,
    side: int | None = None,
    sound: Literal["keep", "drop"] = "keep",
) -> None:
    """Write [start_s, end_s) of a video as an mp4 that browsers play: H.264, and AAC if it sounds.

    The frame on screen at `start_s` is the first, at time 0; all later ones before `end_s` follow
    at their distance to it, to a tick of the source's clock. Pictures are upright. A still is shown
    for `end_s` - `start_s` seconds.

    Args:
        path: a video, a still or a folder of chunks, which has no sound.
        file: open for writing, can be sought in.
        start_s, end_s: seconds from the first frame; what is beyond the video's end is left out.
        side: pixels of the longer side at most; None keeps the size, made even.
        sound: "keep" has it in stereo, or in mono where there is one channel, at 48 kHz.

    Raises FileNotFoundError for a missing file, VideoError for one that cannot be read or does not
    reach `start_s`, and OSError where `file` cannot be written.
    """
    path = Path(path)
    info = probe(path)
    last_s = end_s if info.is_image else min(end_s, info.duration_s)
    if not 0 <= start_s < last_s:
        reason = f"has nothing in [{start_s:g}, {end_s:g}) s: it lasts {info.duration_s:g} s"
        raise VideoError(path, reason)
    if info.is_image:
        start_s, last_s = 0.0, last_s - start_s
    with _opened(path, info, start_s) as (tick, frames, origin_s):
        heard: Iterable[av.AudioFrame] = ()
        if sound == "keep" and origin_s is not None:
            heard = _sound(path, origin_s + start_s, origin_s + last_s)
        start_ticks = round(start_s / tick)
        end_ticks = max(round(last_s / tick), start_ticks + 1)
        try:
            with closing(_inside(frames, start_ticks, end_ticks)) as inside:
                encoder.encode(
                    file,
                    inside,
                    end_ticks=end_ticks,
                    tick=tick,
                    size=_size(info, side),
                    gop=GOP,
                    sound=heard,
                )
        except encoder.EncodingError as error:
            raise VideoError(path, str(error)) from error


def _size(info: VideoInfo, side: int | None) -> tuple[int, int]:
    shorter, longer = sorted((info.width, info.height))
    if side is not None and side < longer:
        shorter = max(1, round(shorter * side / longer))
    return encoder.scaled_size(info.width, info.height, side=shorter)


@contextmanager
def _opened(
    path: Path, info: VideoInfo, start_s: float
) -> Iterator[tuple[Fraction, Iterable[tuple[int, av.VideoFrame]], float | None]]:
    """The unit of ticks, frames as `PyavVideo.walk` gives them, and where its sound has time 0."""
    if info.is_image:
        picture_HWC = read_clip(path, num_frames=1).frames_THWC[0]
        yield _STILL_TICK, [(0, av.VideoFrame.from_ndarray(picture_HWC))], None
    elif chunks.is_folder_of_chunks(path):
        yield chunks.contents(path).tick, _of_chunks(path, start_s), None
    else:
        with open_video(path) as video:
            yield video.tick, video.walk(start_s), video.origin_s


def _inside(
    frames: Iterable[tuple[int, av.VideoFrame]], start_ticks: int, end_ticks: int
) -> _Frames:
    """Those on screen in [start, end); what is on screen at the start begins there."""
    first: av.VideoFrame | None = None
    for ticks, frame in frames:
        if ticks >= end_ticks:
            break
        if ticks <= start_ticks:
            first = frame
            continue
        if first is not None:
            yield start_ticks, first
            first = None
        yield ticks, frame
    if first is not None:
        yield start_ticks, first


def _of_chunks(folder: Path, start_s: float) -> _Frames:
    """As `PyavVideo.walk`, from chunk to chunk, in ticks of the source."""
    table = chunks.contents(folder)
    ends = [chunk.first_ticks for chunk in table.chunks[1:]]
    for chunk, end_ticks in zip(table.chunks, [*ends, None], strict=True):
        if end_ticks is not None and chunks.seconds_of(end_ticks, table.tick) <= start_s:
            continue
        begin_s = start_s - chunks.seconds_of(chunk.first_ticks, table.tick)
        with open_video(folder / chunk.file) as video:
            for ticks, frame in video.walk(max(0.0, begin_s)):
                yield chunk.first_ticks + round(ticks * video.tick / table.tick), frame


def _sound(path: Path, start_s: float, end_s: float) -> Iterator[av.AudioFrame]:
    """The samples of [start_s, end_s) of the file's clock, times from 0; none without a track.

    Where the track has none, in gaps, where it is damaged and before it begins, there is silence.
    """
    graph: Graph | None = None
    try:
        with av.open(f"file:{path}", **OPEN_OPTIONS) as container:
            for frame in _heard(container, start_s, end_s):
                graph = graph or _trimming(frame, start_s, end_s)
                graph.push(frame)
                yield from _ready(graph)
        if graph is not None:
            graph.push(None)
            yield from _ready(graph)
    except av.FFmpegError as error:
        raise VideoError(path, f"its sound cannot be decoded ({error.strerror})") from error


def _heard(container: InputContainer, start_s: float, end_s: float) -> Iterator[av.AudioFrame]:
    """Frames that sound in [start_s, end_s); a damaged one is left out."""
    stream = container.streams.best("audio")
    if stream is None or stream.time_base is None:
        return
    tick = Fraction(stream.time_base.numerator, stream.time_base.denominator)
    if start_s > _EARLIER_S:
        container.seek(int((start_s - _EARLIER_S) / tick), stream=stream)
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        for frame in frames:
            assert isinstance(frame, av.AudioFrame)
            if frame.time is None or frame.time + frame.samples / frame.sample_rate <= start_s:
                continue
            if frame.time >= end_s:
                return
            yield frame


def _trimming(first: av.AudioFrame, start_s: float, end_s: float) -> Graph:
    graph, layout = Graph(), "mono" if first.layout.nb_channels == 1 else "stereo"
    graph.threads = 1
    nodes = [
        graph.add_abuffer(
            sample_rate=first.sample_rate,
            format=first.format.name,
            layout=first.layout.name,
            time_base=first.time_base,
        ),
        graph.add("atrim", f"start={start_s:.6f}:end={end_s:.6f}"),
        graph.add("asetpts", f"PTS-{start_s:.6f}/TB"),
        graph.add("aresample", f"{_SOUND_RATE}:async=1:first_pts=0"),
        graph.add("aformat", f"sample_fmts=fltp:channel_layouts={layout}"),
        graph.add("abuffersink"),
    ]
    for one, following in pairwise(nodes):
        one.link_to(following)
    graph.configure()
    return graph


def _ready(graph: Graph) -> Iterator[av.AudioFrame]:
    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        assert isinstance(frame, av.AudioFrame)
        yield frame
