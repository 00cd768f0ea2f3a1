"""For libraries that give whole pictures by number: all else that a `Video` does.

What is in the file and when each picture is on screen comes from PyAV, which reads the file through
once without decoding. A library only turns numbers into pictures, and is held to those times: where
it counts or times pictures otherwise, that is an error, and never another picture. Cutting is
by the same pixels as in `pyav`; scaling is Pillow's, which `pyav` agrees with.
"""

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from fluxclip.stages import stage
from fluxclip.video.clip import FaultKind, VideoError
from fluxclip.video.decoders.pyav import TIME_SLACK_S, PyavVideo
from fluxclip.video.framing import Framing


class Library(Protocol):
    """A file that a library has open."""

    name: str
    errors: tuple[type[Exception], ...]  # what it raises for what it cannot decode

    def open(self, source: str | bytes) -> int:
        """Open a path or the bytes of a file; the number of pictures that the library finds."""
        ...

    def picture(self, number: int) -> tuple[npt.NDArray[np.uint8], float]:
        """A picture, upright RGB (H, W, 3), and its seconds from the first one, as it says."""
        ...


class NumberedVideo:
    """A file open in a library: see `fluxclip.video.decoders.Video`."""

    def __init__(self, path: Path, content: bytes | None, library: Library) -> None:
        self._path, self._library = path, library
        video = PyavVideo(path, content)
        try:
            self.info = video.info
            with stage("read"):
                self._timeline = video.timeline()
        finally:
            video.close()
        self._times_s = self._timeline.times_s
        if self._timeline.has_alpha:
            raise self._refusal("does not say what is transparent in it")
        if not self._timeline.is_indexed:
            raise self._refusal("finds wrong pictures in a container without an index")
        if not self._timeline.starts_anew:
            raise self._refusal("finds wrong pictures where they refer to ones before a keyframe")
        try:
            with stage("read"):
                # absolute: a name like "http:x" is no address
                num_found = library.open(str(path.absolute()) if content is None else content)
        except library.errors as error:
            raise self._refusal("cannot open it") from error
        if num_found != len(self._times_s):
            raise self._refusal(f"finds {num_found} of its {len(self._times_s)} pictures")

    def read(
        self, times_s: npt.NDArray[np.float64], framing: Framing
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
        """The frames on screen at ascending times."""
        numbers = np.searchsorted(self._times_s, times_s + TIME_SLACK_S, side="right") - 1
        pictures: list[npt.NDArray[np.uint8]] = []
        for i, number in enumerate(numbers.tolist()):
            stays = i > 0 and number == numbers[i - 1]
            pictures.append(pictures[-1] if stays else self._framed(number, framing))
        return np.stack(pictures), self._times_s[numbers]

    def _framed(self, number: int, framing: Framing) -> npt.NDArray[np.uint8]:
        upright = self._picture(number)
        if upright.shape[:2] != (self.info.height, self.info.width):
            raise self._refusal("gives its pictures another size")
        turns = self._timeline.quarter_turns
        with stage("crop"):
            rows, columns = framing.spans(self.info.width, self.info.height, quarter_turns=turns)
            if self._timeline.is_subsampled:
                rows, columns = _from_even(rows), _from_even(columns)
            part = np.rot90(upright, -turns)[slice(*rows), slice(*columns)]
            if framing.side is not None:
                size = (framing.side, framing.side)
                scaled = Image.fromarray(part).resize(size, Image.Resampling.BICUBIC)
                part = np.asarray(scaled)
            return np.rot90(part, turns)

    def _picture(self, number: int) -> npt.NDArray[np.uint8]:
        since_first_s = float(self._times_s[number] - self._times_s[0])
        try:
            with stage("decode"):
                picture, at_s = self._library.picture(number)
        except self._library.errors as error:
            reason = f"cannot decode the picture at {self._times_s[number]:.2f} s"
            raise self._refusal(reason, kind="damaged") from error
        if abs(at_s - since_first_s) > 1e-5 + 2e-7 * since_first_s:  # some count in float32
            raise self._refusal(
                f"has the picture of {at_s:.3f} s where that of {since_first_s:.3f} s was wanted"
            )
        return picture

    def _refusal(self, reason: str, *, kind: FaultKind = "not readable") -> VideoError:
        reason = f"{self._library.name} {reason}: read it with pyav"
        return VideoError(self._path, reason, kind=kind)


def _from_even(span: tuple[int, int]) -> tuple[int, int]:
    """Where colour is stored at a lower resolution, a part begins where a sample of it does."""
    return span[0] - span[0] % 2, span[1] - span[0] % 2
