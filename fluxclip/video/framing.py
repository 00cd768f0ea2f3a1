"""Which part of a picture is kept and at what size: arithmetic shared by decoders and stills."""

import math
from dataclasses import dataclass
from typing import Literal

Box = tuple[float, float, float, float]
Fit = Literal["crop", "squash"]
Span = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class Framing:
    """How a picture becomes a frame of a clip.

    Attributes:
        side: the frame is side x side pixels; None keeps the size that the kept part has.
        fit: how a picture becomes square without `crop`: "crop" keeps the largest centred square,
            "squash" keeps the whole picture and not its aspect. Without a side it changes nothing.
        crop: (top, left, bottom, right) as fractions of the upright picture, 0 <= top < bottom <= 1
            and 0 <= left < right <= 1; takes the place of `fit`.

    Raises ValueError for anything else.
    """

    side: int | None = None
    fit: Fit = "crop"
    crop: Box | None = None

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise ValueError(f"side must be at least 1 pixel, not {self.side}")
        if self.fit not in ("crop", "squash"):
            raise ValueError(f"fit must be 'crop' or 'squash', not {self.fit!r}")
        if self.crop is not None:
            if len(self.crop) != 4:
                raise ValueError(f"crop must be (top, left, bottom, right), not {self.crop}")
            top, left, bottom, right = self.crop
            if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
                raise ValueError(
                    "crop must be (top, left, bottom, right) as fractions in [0, 1] with "
                    f"top < bottom and left < right, not {self.crop}"
                )

    def box(self, width: int, height: int) -> Box:
        """The kept part of a picture of that many pixels: (top, left, bottom, right), fractions."""
        if self.crop is not None:
            return self.crop
        if self.side is None or self.fit == "squash":
            return 0.0, 0.0, 1.0, 1.0
        square = min(width, height)
        down, across = (height - square) / (2 * height), (width - square) / (2 * width)
        return down, across, 1 - down, 1 - across

    def spans(self, width: int, height: int, *, quarter_turns: int = 0) -> tuple[Span, Span]:
        """Rows and columns of the kept part, in a picture as it is stored.

        quarter_turns, counterclockwise, set that picture upright, width x height pixels.
        """
        top, left, bottom, right = self.box(width, height)
        rows, columns = pixel_span(top, bottom, height), pixel_span(left, right, width)
        for _ in range(quarter_turns):  # from the upright picture back to the stored one
            rows, columns = columns, (height - rows[1], height - rows[0])
            height, width = width, height
        return rows, columns


def pixel_span(low: float, high: float, size: int) -> Span:
    """The fractions [low, high) of `size` pixels as [start, stop), rounded, at least one pixel."""
    start = min(math.floor(low * size + 0.5), size - 1)
    return start, max(math.floor(high * size + 0.5), start + 1)
