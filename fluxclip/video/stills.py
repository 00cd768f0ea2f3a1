"""Single images as clips of one frame.

Pillow reads them, not a video decoder: it knows EXIF orientation, palettes and transparency, and
reads WebP in every build, which FFmpeg's builds do not all. It is not a file of `decoders/` because
what stands there reads videos.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fluxclip.video.clip import Clip, FaultKind, VideoError, VideoInfo
from fluxclip.video.framing import Framing, pixel_span


def probe_still(path: Path, content: bytes | None = None) -> VideoInfo:
    """What is known of an image; its width and height are those of the upright picture.

    content: the bytes of the file, where they are in memory and `path` is but a name.
    """
    with _opened(path, content) as image:
        width, height = image.size
    return VideoInfo(path, 0.0, num_frames=1, width=width, height=height, fps=0.0, is_image=True)


def read_still(path: Path, framing: Framing, content: bytes | None = None) -> Clip:
    """An image, or bytes of that name, as a clip of one frame at time 0.

    Orientation (EXIF) is applied, transparency laid over white, resizing is bicubic with the kernel
    widened when the picture shrinks. Of an animated image the first picture is taken. Grey pictures
    of 32 bits a pixel are taken to hold 8 bits if they fit, else 16. Raises VideoError for what is
    no readable image, or whose range of values is not known (32 bits of which more than 16 are
    used, floats).
    """
    with _opened(path, content) as image:
        picture = _rgb(image, path)
        width, height = picture.size
        top, left, bottom, right = framing.box(width, height)
        if framing.side is None:
            (y0, y1), (x0, x1) = pixel_span(top, bottom, height), pixel_span(left, right, width)
            picture = picture.crop((x0, y0, x1, y1))
        else:
            picture = picture.resize(
                (framing.side, framing.side),
                Image.Resampling.BICUBIC,
                box=(left * width, top * height, right * width, bottom * height),
            )
        return Clip(np.array(picture)[None], np.zeros(1))


@contextmanager
def _opened(path: Path, content: bytes | None) -> Iterator[Image.Image]:
    """The upright image; whatever goes wrong inside is a VideoError."""
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            yield ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise VideoError(path, "not an image that Pillow can read", kind="not a video") from error
    except VideoError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds on damaged files
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of Pillow
            reason = f"cannot be opened ({error.strerror})"
            raise VideoError(path, reason, kind="not readable") from error
        # Pillow has no kind of error for it, and of WebP and AVIF it mostly does not say it.
        kind: FaultKind = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise VideoError(path, f"a damaged image ({error})", kind=kind) from error


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # convert() would clip to 255: nearly all white
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode == "F" or low < 0 or high > 65535:
            reason = (
                f"its values, {low:g} to {high:g}, have no known range; save it with 8 or 16 bits"
            )
            raise VideoError(path, reason)
        if image.mode != "I" or high > 255:
            values = values >> 8
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
