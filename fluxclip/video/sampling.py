"""Which instants, and which part of the picture, are looked at: arithmetic on numbers only.

Intervals are [start_s, end_s) in seconds. Boxes are (top, left, bottom, right) as fractions of the
picture in [0, 1].
"""

import math

import numpy as np
import numpy.typing as npt


def evenly_spread(start_s: float, end_s: float, num_frames: int) -> npt.NDArray[np.float64]:
    """The midpoints of `num_frames` equal parts of [start_s, end_s): float64 (num_frames,).

    Raises ValueError for an empty interval or fewer than one frame.
    """
    return _within_parts(start_s, end_s, num_frames, 0.5)


def random_per_part(
    start_s: float, end_s: float, num_frames: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """One uniform draw in each of `num_frames` equal parts of [start_s, end_s), ascending.

    The segment sampling of TSN (Wang et al. 2016, https://arxiv.org/abs/1608.00859, section 3.1).
    Raises ValueError for an empty interval or fewer than one frame.
    """
    _check(start_s, end_s, num_frames)
    return _within_parts(start_s, end_s, num_frames, rng.random(num_frames))


def _within_parts(
    start_s: float, end_s: float, num_frames: int, place: float | npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    _check(start_s, end_s, num_frames)
    times_s = start_s + (np.arange(num_frames) + place) * ((end_s - start_s) / num_frames)
    # Rounding may carry a draw just below the end onto the end, which is outside.
    return np.clip(times_s, start_s, np.nextafter(end_s, start_s))


def _check(start_s: float, end_s: float, num_frames: int) -> None:
    if not (math.isfinite(start_s) and math.isfinite(end_s) and start_s < end_s):
        raise ValueError(f"[start_s, end_s) must be finite and not empty, not [{start_s}, {end_s})")
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, not {num_frames}")


def random_crop(
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    aspect: float = 1.0,
) -> tuple[float, float, float, float]:
    """A random box for random-resized-crop: (top, left, bottom, right), fractions of the picture.

    Args:
        scale: least and greatest share of the picture's area, 0 < least <= greatest <= 1.
        ratio: least and greatest width / height of the box in pixels, drawn evenly on a log scale.
        aspect: width / height of the picture in pixels.

    Inception cropping (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842, section 6). When ten
    draws do not fit into the picture, the box is the largest centred one whose shape is in `ratio`.
    Raises ValueError for ranges that are not as above.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be (least, greatest) within (0, 1], not {scale}")
    if not 0 < ratio[0] <= ratio[1] < math.inf or not 0 < aspect < math.inf:
        raise ValueError(f"ratio {ratio} and aspect {aspect} must be positive, least ratio first")
    for _ in range(10):
        area = rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = math.sqrt(area * shape / aspect), math.sqrt(area * aspect / shape)
        if width <= 1 and height <= 1:
            left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
            return top, left, min(top + height, 1.0), min(left + width, 1.0)
    shape = min(max(aspect, ratio[0]), ratio[1])
    width, height = min(1.0, shape / aspect), min(1.0, aspect / shape)
    return (1 - height) / 2, (1 - width) / 2, (1 + height) / 2, (1 + width) / 2
