"""Videos through PyAV, whose wheel carries FFmpeg: nothing to install, the same on every machine.

Only what is needed is decoded: from the keyframe before a wanted time up to that time. Only frames
that are returned are scaled and converted to RGB. A file that does not state where it ends (.mpg,
some recordings) is read through once more, without decoding, each time it is opened.
"""

import io
import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.filter import Graph
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from fluxclip.stages import each, stage
from fluxclip.video.clip import FaultKind, VideoError, VideoInfo
from fluxclip.video.framing import Framing

# FFmpeg's messages do not go to the terminal; a VideoError says what went wrong.
av.logging.set_level(None)

# Bicubic, with the kernel widened when the picture shrinks (no aliasing). Without the other flags
# white comes out as 253 and chroma at half resolution; with them frames agree with Pillow's bicubic
# to about 0.25 grey levels on average, so clips and stills look alike to the model.
_SCALING = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
)

TIME_SLACK_S = 1e-6  # finer than the clock of any container, coarser than the rounding in i / fps

# Where no index says where the keyframes are, a seek is tried for times further ahead than this.
_BLIND_SEEK_S = 5.0

# MPEG program streams (.mpg) carry few times: after a seek, and at the end, they are guessed wrong.
_PROGRAM_STREAM = "mpeg"
_TRANSPORT_STREAM = "mpegts"

_H264_NEW_START = 5  # the type of a picture after which none refers to what was before it

# How many frames before a wanted time every frame is decoded: the one on screen, and one to spare.
_SKIM_FRAMES = 2
_NEVER = -(2**63)

# What bytes in memory may reach for: nothing. A playlist among them could name files and addresses.
_NOTHING_ELSE = {"protocol_whitelist": "data"}

# Tags in other encodings than UTF-8 are no reason to refuse a file. PyAV 19 has no such argument
# and never refuses.
OPEN_OPTIONS: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)


@dataclass(frozen=True)
class Timeline:
    """What other libraries' pictures are held to.

    Attributes:
        pts: int64 (N,), ascending: when each picture comes on screen, on the file's clock.
        origin_pts: that of the first picture that can be decoded, from which times count.
        tick: the unit of both in seconds.
        quarter_turns: counterclockwise, what sets the stored picture upright.
        is_subsampled: whether a sample of colour is that of two pixels in a row or a column.
        has_alpha: whether pictures can be transparent.
        starts_anew: whether no picture after a keyframe refers to one before it.
        is_indexed: whether the container says where in the file a keyframe is.
    """

    pts: npt.NDArray[np.int64]
    origin_pts: int
    tick: Fraction
    quarter_turns: int
    is_subsampled: bool
    has_alpha: bool
    starts_anew: bool
    is_indexed: bool

    @property
    def times_s(self) -> npt.NDArray[np.float64]:
        """(N,) seconds from the first picture that can be decoded: below 0 for those before it."""
        return (self.pts - self.origin_pts) * self.tick.numerator / self.tick.denominator


@contextmanager
def open_video(path: Path, content: bytes | None = None) -> Iterator["PyavVideo"]:
    """Open a video file, or bytes of that name. Raises VideoError for what FFmpeg cannot decode."""
    video = PyavVideo(path, content)
    try:
        yield video
    finally:
        video.close()


class PyavVideo:
    """An open file and a place in it: the frame that was on screen at the last time asked for."""

    info: VideoInfo

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        self._path, self._content = path, content
        self._scaler = VideoReformatter()
        self._cutter_key: tuple[object, ...] = ()
        self._may_skim = True
        self._container, self._stream = _open(path, content)
        self._following: av.VideoFrame | None = None
        try:
            self._on_screen = self._start()
            # Times count from the first frame that can be decoded. What a container calls its start
            # may be earlier: a stream can begin with frames that refer to others that were cut off.
            self._origin_pts = self._pts(self._on_screen)
            self.info = self._describe()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free all that the file holds; there is nothing left to read or to know."""
        self._frames.close()  # it refers back to this object: a cycle
        self._container.close()
        vars(self).clear()  # an error that is kept keeps this object, but not pictures and decoder

    def read(
        self, times_s: npt.NDArray[np.float64], framing: Framing
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
        """The frames on screen at ascending times: see `fluxclip.video.decoders.Video`."""
        pictures: list[npt.NDArray[np.uint8]] = []
        shown_s: list[float] = []
        for time_s in times_s.tolist():
            frame = self._frame_at(time_s)
            at_s = self._time_s(frame)
            # A frame that stays on screen is converted once.
            stays = bool(shown_s) and shown_s[-1] == at_s
            with stage("crop"):
                pictures.append(pictures[-1] if stays else self._picture(frame, framing))
            shown_s.append(at_s)
        if len({picture.shape for picture in pictures}) > 1:
            raise VideoError(self._path, "its pictures change size on the way; give a side")
        return np.stack(pictures), np.array(shown_s)

    @property
    def tick(self) -> Fraction:
        """The unit of the file's clock in seconds."""
        return self._tick

    @property
    def origin_s(self) -> float:
        """When the first picture comes on screen, on the file's clock, which its sound goes by."""
        return float(self._origin_pts * self._tick)

    def walk(self, start_s: float) -> Iterator[tuple[int, av.VideoFrame]]:
        """Every frame from the one on screen at `start_s` to the last, upright by `quarter_turns`.

        With each come its ticks from the first frame of the video, strictly ascending: of frames
        with one time the last is given, which is the one on screen. Raises VideoError for what
        cannot be decoded, at the end also if the file ends before it says. `read` is over then.
        """
        frame = self._frame_at(start_s)
        while True:
            yield self._pts(frame) - self._origin_pts, frame
            self._following = self._following or next(self._frames, None)
            if self._following is None:
                return
            self._walk_to(self._time_s(self._following))
            frame = self._on_screen

    def timeline(self) -> "Timeline":
        """When every picture is on screen, from reading the file to its end without decoding.

        Leaves nothing to read. Raises VideoError for what has no such times, or is cut short.
        """
        first = self._on_screen
        self._container.close()
        self._container, self._stream = _open(self._path, self._content)
        self._reached_s = -math.inf
        pts, keyframe_pts, starts_anew = [], _NEVER, True
        with _refusing_damage(self._path):
            for packet in self._packets():
                if not packet.size or packet.is_discard:
                    continue
                if packet.pts is None:
                    reason = "some of its pictures have no times: read it with pyav"
                    raise VideoError(self._path, reason)
                if packet.is_keyframe:
                    keyframe_pts = packet.pts
                    starts_anew = starts_anew and _starts_anew(packet, self._stream)
                starts_anew = starts_anew and packet.pts >= keyframe_pts
                pts.append(packet.pts)
        return Timeline(
            pts=np.sort(np.array(pts, np.int64)),
            origin_pts=self._origin_pts,
            tick=self._tick,
            quarter_turns=quarter_turns(first),
            is_subsampled=_is_subsampled(first),
            has_alpha=_has_alpha(first),
            starts_anew=starts_anew,
            is_indexed=self._container.format.name not in (_PROGRAM_STREAM, _TRANSPORT_STREAM),
        )

    def _start(self) -> av.VideoFrame:
        """Decode the first frame of the file, which has just been opened."""
        self._frames = self._decode()
        # One thread: whoever reads many files does so from as many workers as there are cores, and
        # threads of one file only pay when it is read from end to end.
        self._stream.codec_context.thread_count = 1
        self._tick = _tick(self._stream)
        self._stated_end_s, self._is_own_end = _stated_end(
            self._path, self._content, self._container, self._stream
        )
        self._can_seek = self._container.format.name != _PROGRAM_STREAM
        self._reached_s = -math.inf
        self._skim_until_pts = self._skimmed_pts = _NEVER
        first = next(self._frames, None)
        if first is None:
            raise VideoError(self._path, "no picture in it can be decoded", kind="no frames")
        return first

    def _decode(self) -> Generator[av.VideoFrame, None, None]:
        """Frames in the order they are shown, from where the container stands."""
        started = False
        with _refusing_damage(self._path):
            for packet in self._packets():
                if packet.size:
                    self._skim_or_decode(packet)
                try:
                    with stage("decode"):
                        frames = self._stream.decode(packet)
                except av.error.InvalidDataError:
                    if self._lacks_pictures():
                        raise self._cut_short() from None
                    if started or self._is_own_end:
                        raise
                    continue  # recordings begin anywhere; pictures come with the first keyframe
                started = started or packet.is_keyframe
                for frame in frames:
                    if frame.is_corrupt:  # patched up by the decoder, and what refers to it is too
                        raise VideoError(self._path, "damaged: a picture cannot be decoded")
                    yield frame

    def _packets(self) -> Iterator[av.Packet]:
        """The pictures as coded, from where the container stands; one of 0 bytes ends them."""
        for packet in each("demux", self._container.demux()):
            is_last = packet.size == 0 and packet.dts is None
            if packet.stream.index != self._stream.index:
                if not self._is_own_end and not is_last:
                    self._reached_s = max(self._reached_s, _end_s(packet, _tick(packet)))
                continue
            if is_last:
                self._refuse_if_cut_short()
            elif packet.size == 0:  # AVI: "the picture stays"; decoding it would end the stream
                continue
            else:
                self._reached_s = max(self._reached_s, _end_s(packet, self._tick))
            yield packet

    def _skim_or_decode(self, packet: av.Packet) -> None:
        """Let the decoder drop a frame long before the wanted time if no other refers to it.

        The frames that are left are the same; half of a typical video need not be decoded. Whether
        a dropped frame was on screen after all (held for long) is seen once the time is reached.
        """
        if packet.pts is not None and packet.pts < self._skim_until_pts:
            self._stream.codec_context.skip_frame = "NONREF"
            self._skimmed_pts = max(self._skimmed_pts, packet.pts)
        else:
            self._stream.codec_context.skip_frame = "DEFAULT"

    def _refuse_if_cut_short(self) -> None:
        """At the end of the data: is this the end that the file stated?

        The picture before a cut must not pass for what comes after it. Sample tables (mp4, mov,
        avi) and Matroska's tags state the end of the video track exactly: half a frame is for
        rounding. Elsewhere the end is that of the whole file, which its sound may be what reaches,
        and writers round it. An index also tells of pictures that were coded last but are not the
        last on screen.
        """
        slack_s = 0.5 / _fps(self._stream) if self._is_own_end else 1.0
        if self._lacks_pictures() or self._reached_s + slack_s < self._stated_end_s:
            raise self._cut_short()

    def _lacks_pictures(self) -> bool:
        """Whether the file ends before a picture that its index tells of."""
        index = self._stream.index_entries
        return len(index) > 0 and index[-1].pos + index[-1].size > self._container.size

    def _cut_short(self) -> VideoError:
        reason = f"cut short: its data ends before the {self._stated_end_s:.2f} s that it states"
        return VideoError(self._path, reason, kind="truncated")

    def _frame_at(self, time_s: float) -> av.VideoFrame:
        """The frame on screen at a time not before that of the previous call."""
        if self._may_skim:
            self._skim_until_pts = self._to_pts(time_s - _SKIM_FRAMES / _fps(self._stream))
        if self._is_keyframe_between(time_s):
            self._seek(time_s)
        self._walk_to(time_s)
        if self._pts(self._on_screen) <= self._skimmed_pts:  # once more, without dropping any
            self._may_skim = False
            self._skim_until_pts = self._skimmed_pts = _NEVER
            self._seek(time_s)
            self._walk_to(time_s)
        return self._on_screen

    def _walk_to(self, time_s: float) -> None:
        """Decode until the frame on screen is the last one at or before `time_s`."""
        while True:
            self._following = self._following or next(self._frames, None)
            if self._following is None or self._time_s(self._following) > time_s + TIME_SLACK_S:
                return
            if self._pts(self._following) < self._pts(self._on_screen):
                raise VideoError(
                    self._path, f"its clock runs backwards at {self._time_s(self._on_screen):.2f} s"
                )
            self._on_screen, self._following = self._following, None

    def _is_keyframe_between(self, time_s: float) -> bool:
        """Whether decoding can go on at a keyframe nearer to `time_s` than the frame on screen."""
        if not self._can_seek:
            return False
        entries, target_pts = self._stream.index_entries, self._to_pts(time_s)
        if len(entries) > 0 and entries[-1].timestamp >= target_pts:
            found = entries.search_timestamp(target_pts)
            return found >= 0 and entries[found].timestamp > self._pts(self._on_screen)
        return time_s - self._time_s(self._on_screen) > _BLIND_SEEK_S

    def _seek(self, time_s: float) -> None:
        """Go on decoding at a keyframe that is shown at or before `time_s`."""
        back_s = 0.0 if self._can_seek else math.inf
        while back_s <= time_s:
            try:
                with stage("demux"):
                    self._container.seek(self._to_pts(time_s - back_s), stream=self._stream)
                if self._is_at_keyframe_before(time_s):
                    return
            except (av.FFmpegError, VideoError):
                pass  # some containers end up behind their last frame, or cannot seek at all
            back_s = max(1.0, 2 * back_s)
        self._container.close()
        self._container, self._stream = _open(self._path, self._content)
        self._on_screen, self._following = self._start(), None

    def _is_at_keyframe_before(self, time_s: float) -> bool:
        """After a seek: put the first keyframe on screen, if it is shown early enough."""
        self._frames = self._decode()
        for frame in self._frames:
            if self._time_s(frame) > time_s + TIME_SLACK_S:
                return False  # containers index by decoding time
            # Frames shown before the keyframe may refer to ones before it, and be broken.
            if frame.key_frame:
                self._on_screen, self._following = frame, None
                return True
        return False

    def _picture(self, frame: av.VideoFrame, framing: Framing) -> npt.NDArray[np.uint8]:
        """The upright RGB picture (H, W, 3) of a frame, as `framing` says."""
        width, height = _upright_size(frame)
        turns = quarter_turns(frame)
        rows, columns = framing.spans(width, height, quarter_turns=turns)
        # Cut, then scale and convert in one pass: the other way round, pixels of the scaled picture
        # would be too coarse to cut at, and a small part would scale up all the rest.
        side, has_alpha = framing.side, _has_alpha(frame)
        colours = "rgba" if has_alpha else "rgb24"
        try:
            part = self._cut(frame, rows, columns)
            scaled = self._scaler.reformat(
                part, side, side, colours, interpolation=_SCALING, threads=1
            ).to_ndarray()
        except av.FFmpegError as error:
            reason = f"its pictures ({frame.format.name}) cannot be converted ({error.strerror})"
            raise VideoError(self._path, reason) from error
        rgb = over_white(scaled) if has_alpha else scaled.astype(np.uint8, copy=False)
        return np.rot90(rgb, turns)

    def _cut(
        self, frame: av.VideoFrame, rows: tuple[int, int], columns: tuple[int, int]
    ) -> av.VideoFrame:
        """[start, stop) rows and columns of a frame, without copying them.

        Where colour is stored at a lower resolution, the part begins at an even row and column, one
        to the left or above if need be: at an odd one FFmpeg mixes up the bytes of the colours.
        """
        size = columns[1] - columns[0], rows[1] - rows[0]
        if size == (frame.width, frame.height):
            return frame
        step = 2 if _is_subsampled(frame) else 1
        x, y = (start - start % step for start in (columns[0], rows[0]))
        key = (frame.width, frame.height, frame.format.name, size, x, y)
        if key != self._cutter_key:
            self._cutter_key, self._cutter = key, Graph()
            self._cutter.threads = 1
            source = self._cutter.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=self._tick
            )
            where = f"w={size[0]}:h={size[1]}:x={x}:y={y}:exact=1"
            self._cutter.link_nodes(
                source, self._cutter.add("crop", where), self._cutter.add("buffersink")
            ).configure()
        self._cutter.vpush(frame)
        return self._cutter.vpull()

    def _pts(self, frame: av.VideoFrame) -> int:
        """When a frame comes on screen, on the file's clock."""
        pts = frame.pts if frame.pts is not None else frame.dts
        if pts is None:
            raise VideoError(self._path, "its frames carry no times; put it in a container (mp4)")
        return pts

    def _time_s(self, frame: av.VideoFrame) -> float:
        ticks = self._pts(frame) - self._origin_pts
        return ticks * self._tick.numerator / self._tick.denominator

    def _to_pts(self, time_s: float) -> int:
        return self._origin_pts + math.floor((time_s + TIME_SLACK_S) / self._tick)

    def _describe(self) -> VideoInfo:
        stream = self._stream
        # A recording can begin with pictures that cannot be decoded; they are not part of it.
        begin_pts = (stream.start_time or 0) if self._is_own_end else self._origin_pts
        duration_s = self._stated_end_s - float(begin_pts * self._tick)
        width, height = _upright_size(self._on_screen)
        return VideoInfo(
            self._path,
            duration_s if duration_s > 0 else 1 / _fps(stream),
            num_frames=stream.frames or None,
            width=width,
            height=height,
            fps=float(stream.average_rate or 0),
            is_image=False,
        )


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """What FFmpeg stumbles over inside is a VideoError."""
    try:
        yield
    except av.FFmpegError as error:
        raise VideoError(path, f"damaged or cut short ({error.strerror})") from error


def _open(path: Path, content: bytes | None) -> tuple[InputContainer, VideoStream]:
    try:
        # "file:" keeps a name like "http:x" from being taken for an address, and a playlist that
        # claims to be an mp4 from reaching for anything but local files.
        with stage("read"):
            if content is None:
                container = av.open(f"file:{path}", **OPEN_OPTIONS)
            else:
                file = io.BytesIO(content)  # which copies nothing
                container = av.open(file, options=_NOTHING_ELSE, **OPEN_OPTIONS)
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        reason = "not a video that FFmpeg can read, or its head or end is missing"
        kind: FaultKind = "truncated" if _begins_as_mp4(path, content) else "not a video"
        raise VideoError(path, reason, kind=kind) from error
    except av.FFmpegError as error:
        reason = f"cannot be opened ({error.strerror})"
        raise VideoError(path, reason, kind="not readable") from error
    stream = container.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:  # the cover of a song
        container.close()
        raise VideoError(path, "has no video in it", kind="not a video")
    if stream.codec_context is None:
        container.close()
        raise VideoError(path, "its video is coded in a way that this FFmpeg cannot decode")
    return container, stream


def _begins_as_mp4(path: Path, content: bytes | None) -> bool:
    """Whether these are the first bytes of an mp4: its table of contents may be at the end."""
    if content is None:
        with path.open("rb") as file:
            content = file.read(8)
    return content[4:8] == b"ftyp"


def _stated_end(
    path: Path, content: bytes | None, container: InputContainer, stream: VideoStream
) -> tuple[float, bool]:
    """Where the video ends by the file's own account, on its clock; is it the video track's own?"""
    if container.duration is None or container.format.name == _PROGRAM_STREAM:
        return _scanned_end_s(path, content), False
    if stream.duration is not None:
        end = (stream.start_time or 0) + stream.duration
        # Where frames are not counted (transport streams), the duration is an estimate.
        return float(end * _tick(stream)), stream.frames > 0
    end_s = container.duration / 1e6
    try:  # Matroska and WebM: "00:01:15.250000000"
        hours, minutes, seconds = map(float, stream.metadata.get("DURATION", "").split(":"))
    except ValueError:
        return end_s, False
    own_end_s = 3600 * hours + 60 * minutes + seconds
    # A tag that was copied from another file may say anything.
    return (own_end_s, True) if 0 < own_end_s <= end_s + 1.0 else (end_s, False)


def _scanned_end_s(path: Path, content: bytes | None) -> float:
    """Where the video ends, on its clock, from reading all of it without decoding."""
    container, stream = _open(path, content)
    with container, stage("read"):
        tick = _tick(stream)
        return max((_end_s(packet, tick) for packet in container.demux(stream)), default=0.0)


def _end_s(packet: av.Packet, tick: Fraction) -> float:
    """When what a packet holds ends, on the file's clock; minus infinity where it does not say."""
    shown = packet.pts if packet.pts is not None else packet.dts
    if shown is None:
        return -math.inf
    return (shown + (packet.duration or 0)) * tick.numerator / tick.denominator


def _starts_anew(keyframe: av.Packet, stream: VideoStream) -> bool:
    """Whether decoding can begin at a keyframe: in H.264 it may only begin to refresh the picture.

    A packet is a row of units, each after its length or (without an avcC box) a mark; the low five
    bits of its first byte say what it is.
    """
    if stream.codec_context.name != "h264":
        return True
    data, head = bytes(keyframe), stream.codec_context.extradata or b""
    if head[:1] != b"\x01":
        return any(unit[0] & 31 == _H264_NEW_START for unit in data.split(b"\0\0\1")[1:] if unit)
    size_bytes, at = (head[4] & 3) + 1, 0
    while at + size_bytes < len(data):
        if data[at + size_bytes] & 31 == _H264_NEW_START:
            return True
        at += size_bytes + int.from_bytes(data[at : at + size_bytes], "big")
    return False


def _tick(timed: VideoStream | av.Packet) -> Fraction:
    """The unit of times in seconds. PyAV 19 has its own class of fractions."""
    assert timed.time_base is not None
    return Fraction(timed.time_base.numerator, timed.time_base.denominator)


def _fps(stream: VideoStream) -> float:
    """Frames per second for where some are needed to go on: 25 where the file gives none."""
    return float(stream.average_rate or stream.guessed_rate or 25)


def _is_subsampled(frame: av.VideoFrame) -> bool:
    """Whether a sample of colour is that of two pixels in a row or a column."""
    return (frame.format.chroma_width(2), frame.format.chroma_height(2)) != (2, 2)


def _has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def over_white(picture_HWC: np.ndarray) -> npt.NDArray[np.uint8]:
    """RGBA laid over white, as stills are: RGB."""
    alpha_HW1 = picture_HWC[..., 3:].astype(np.float32) / 255
    return np.rint(255 - (255 - picture_HWC[..., :3]) * alpha_HW1).astype(np.uint8)


def quarter_turns(frame: av.VideoFrame) -> int:
    """Counterclockwise quarter turns (0 to 3) that set a frame upright: phones store sideways.

    Mirroring in the display matrix is left out, as is the shape of pixels.
    """
    return round(frame.rotation / 90) % 4


def _upright_size(frame: av.VideoFrame) -> tuple[int, int]:
    """(width, height) in pixels after rotation."""
    is_sideways = quarter_turns(frame) % 2 == 1
    return (frame.height, frame.width) if is_sideways else (frame.width, frame.height)
