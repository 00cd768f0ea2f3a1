"""How a long video is cut into pieces [start_s, end_s) that are embedded one by one."""

import math
from dataclasses import dataclass


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
