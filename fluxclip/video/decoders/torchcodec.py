"""Videos through torchcodec, with the FFmpeg libraries of the system (versions 4 to 9).

Whole pictures are converted to RGB before they are cut and scaled. Pictures that FFmpeg patched up
after damage are taken for whole, which `pyav` refuses; a file that is cut short is refused as a
whole. See `_by_number`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxclip.video.decoders._by_number import NumberedVideo

try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: no FFmpeg that it can load
    raise ImportError(
        "torchcodec cannot be loaded: pip install 'fluxclip[torchcodec]', and FFmpeg with its "
        "shared libraries (apt-get install ffmpeg); what PyAV brings does not serve it"
    ) from error


@contextmanager
def open_video(path: Path, content: bytes | None = None) -> Iterator[NumberedVideo]:
    """Open a video file, or bytes of that name. VideoError for what cannot be decoded."""
    yield NumberedVideo(path, content, _Torchcodec())


class _Torchcodec:
    name = "torchcodec"
    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, IndexError)

    def open(self, source: str | bytes) -> int:
        # One thread, for the same reason as in pyav.
        self._decoder = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)
        return len(self._decoder)

    def picture(self, number: int) -> tuple[npt.NDArray[np.uint8], float]:
        frame = self._decoder.get_frame_at(number)
        begin_s = self._decoder.metadata.begin_stream_seconds or 0.0
        return frame.data.numpy(), frame.pts_seconds - begin_s
