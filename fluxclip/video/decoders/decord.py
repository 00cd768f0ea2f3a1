"""Videos through decord2, the maintained fork of decord: both are the module `decord`.

Whole pictures are converted to RGB before they are cut and scaled. Pictures that FFmpeg patched up
after damage are taken for whole, which `pyav` refuses; a file that is cut short is refused as a
whole. See `_by_number`.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxclip.video.decoders._by_number import NumberedVideo

try:
    import decord
except (ImportError, OSError, RuntimeError) as error:
    raise ImportError("decord cannot be loaded: pip install 'fluxclip[decord]'") from error

# FFmpeg's messages do not go to the terminal; a VideoError says what went wrong.
decord.logging.set_level(decord.logging.QUIET)


@contextmanager
def open_video(path: Path, content: bytes | None = None) -> Iterator[NumberedVideo]:
    """Open a video file, or bytes of that name. VideoError for what cannot be decoded."""
    yield NumberedVideo(path, content, _Decord())


class _Decord:
    name = "decord"
    errors: tuple[type[Exception], ...] = (
        decord.DECORDError,
        RuntimeError,
        AssertionError,
        IndexError,
    )

    def open(self, source: str | bytes) -> int:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        self._reader = decord.VideoReader(file, num_threads=1)
        num_pictures = len(self._reader)
        self._times_s = self._reader.get_frame_timestamp(range(num_pictures))[:, 0]
        return num_pictures

    def picture(self, number: int) -> tuple[npt.NDArray[np.uint8], float]:
        # One by one: get_batch would hold all whole pictures at once, and is known to hang.
        picture = self._reader[number].asnumpy()
        return picture, float(self._times_s[number] - self._times_s[0])
