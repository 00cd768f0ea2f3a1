"""How a long video is cut into pieces [start_s, end_s) that are embedded one by one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

# A shot of less is no moment that anybody looks for: a flash, a fade, or a cut that was none.
SHORTEST_SHOT_S = 0.5

# What says that it is longer, or would be more pieces, is damaged: no list of them is made.
LONGEST_S = 3_600_000.0  # 1,000 hours
MOST_PIECES = 1_000_000


@dataclass(frozen=True)
class Segment:
    """A piece of a video: [start_s, end_s) in seconds, 0 <= start_s <= end_s.

    Only a still, which lasts no time, has start_s == end_s == 0.
    """

    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.start_s <= self.end_s < math.inf:
            raise ValueError(f"a segment needs 0 <= start_s <= end_s, not {self}")


def windows(duration_s: float, length_s: float, stride_s: float | None = None) -> list[Segment]:
    """Windows of `length_s`, one every `stride_s` (default: `length_s`), that cover a video.

    Every instant of [0, duration_s) lies in a window and no window leaves it. A video that is no
    longer than `length_s` is one window. What is left after the last whole window gets

    - a window of `length_s` of its own, moved back to end where the video ends, or
    - when it is shorter than a quarter of `stride_s`, no window: the last one is prolonged to the
      end. Moved back, such a window would repeat the last one but for that quarter, and two nearly
      equal segments cost twice and push a third out of a list of hits.

    So all windows have `length_s` but the last, which may be longer by less than a quarter of
    `stride_s`. A duration of 0 (a still) gives the one segment [0, 0). Raises ValueError for a
    negative duration, for a length that is not positive, and for a stride outside (0, length_s],
    which would leave gaps.
    """
    stride_s = length_s if stride_s is None else stride_s
    if not 0 <= duration_s < math.inf:
        raise ValueError(f"duration_s must be finite and not negative, not {duration_s}")
    if not 0 < length_s < math.inf:
        raise ValueError(f"length_s must be positive, not {length_s}")
    if not 0 < stride_s <= length_s:
        raise ValueError(f"stride_s must be in (0, length_s={length_s}], not {stride_s}")
    if duration_s <= length_s:
        return [Segment(0.0, float(duration_s))]

    # The small term keeps 0.3 / 0.1 = 2.9999999999999996 strides from counting as two.
    num_whole = math.floor((duration_s - length_s) / stride_s + 1e-9) + 1
    pieces = [
        Segment(i * stride_s, min(i * stride_s + length_s, duration_s)) for i in range(num_whole)
    ]
    left_over_s = duration_s - pieces[-1].end_s
    if left_over_s >= stride_s / 4:
        pieces.append(Segment(duration_s - length_s, duration_s))
    elif left_over_s > 0:
        pieces[-1] = Segment(pieces[-1].start_s, duration_s)
    return pieces


def shots(
    duration_s: float,
    cuts_s: Sequence[float],
    *,
    longest_s: float,
    stride_s: float | None = None,
) -> list[Segment]:
    """The pieces of a video between its cuts, long ones in windows of `longest_s` (see `windows`).

    cuts_s: when each shot but the first begins, ascending, in (0, duration_s). A shot of less than
    `SHORTEST_SHOT_S` joins the one after it, the last the one before it. Every instant of
    [0, duration_s) lies in a piece, and no piece reaches over a cut that was kept.
    """
    starts_s = [0.0]
    for cut_s in cuts_s:
        if cut_s - starts_s[-1] >= SHORTEST_SHOT_S:
            starts_s.append(float(cut_s))
    if len(starts_s) > 1 and duration_s - starts_s[-1] < SHORTEST_SHOT_S:
        del starts_s[-1]
    pieces: list[Segment] = []
    for start_s, end_s in pairwise([*starts_s, duration_s]):
        inside = windows(end_s - start_s, longest_s, stride_s)
        pieces += [Segment(start_s + piece.start_s, start_s + piece.end_s) for piece in inside]
        pieces[-1] = Segment(pieces[-1].start_s, end_s)  # not a rounding beside it
    return pieces


@dataclass(frozen=True)
class Cutting:
    """How long videos are cut into the pieces that are embedded one by one.

    Attributes:
        cut: "windows" of equal length, or "shots", found by PySceneDetect (extra `shots`); shots
            longer than `window_s` are cut into windows.
        window_s: the length of a window.
        stride_s: a window begins every so many seconds; None for `window_s`, without overlap.

    Raises ValueError for anything else, and for a stride outside (0, window_s].
    """

    cut: Literal["windows", "shots"] = "windows"
    window_s: float = 10.0
    stride_s: float | None = None

    def __post_init__(self) -> None:
        known = get_args(Cutting.__annotations__["cut"])
        if self.cut not in known:
            raise ValueError(f"cut must be one of {', '.join(map(repr, known))}, not {self.cut!r}")
        if not 0 < self.window_s < math.inf:
            raise ValueError(f"window_s must be more than 0 seconds, got {self.window_s!r}")
        if self.stride_s is not None and not 0 < self.stride_s <= self.window_s:
            raise ValueError(
                f"stride_s must be more than 0 and at most window_s={self.window_s:g}, which "
                f"leaves no gap; got {self.stride_s!r}"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Cutting":
        """From the settings of a collection; what they do not say is as it always was."""
        stated = (part.name for part in fields(cls) if part.name in settings)
        return cls(**{name: settings[name] for name in stated})

    def check_installed(self) -> None:
        """Raise ValueError where what this way of cutting needs is not installed."""
        if self.cut == "shots":
            from fluxclip.video.shots import check_installed

            check_installed()

    def segments(self, path: str | Path, duration_s: float) -> list[Segment]:
        """The pieces of a video of that length, in order, at least one; of a still [0, 0).

        By shots, the video is read from end to end. Raises VideoError for one that says it lasts
        longer than `LONGEST_S` or would be more than `MOST_PIECES`, and what `shots.cut_times_s`
        does.
        """
        stride_s = self.window_s if self.stride_s is None else self.stride_s
        if duration_s > LONGEST_S or duration_s / stride_s > MOST_PIECES:
            from fluxclip.video.clip import VideoError  # imports NumPy

            raise VideoError(
                path,
                f"says it lasts {duration_s:.0f} s, too long for pieces of {self.window_s:g} s, "
                f"one every {stride_s:g} s (most are {LONGEST_S:.0f} s and {MOST_PIECES} pieces)",
            )
        if self.cut == "windows" or duration_s == 0:
            return windows(duration_s, self.window_s, self.stride_s)
        from fluxclip.video.shots import cut_times_s  # imports the reader, and with it NumPy

        cuts_s = cut_times_s(path)
        return shots(duration_s, cuts_s, longest_s=self.window_s, stride_s=self.stride_s)
