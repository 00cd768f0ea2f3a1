"""Feature maps that a teacher gave for the files of an annotation file, cut as a sample is cut.

The teacher is any picture model; scripts/teacher_features.py writes such a file with one.

Shape legend: N records, F frames the teacher saw of each, R its rows and columns, C channels,
T frames of a sample, L tokens of a frame.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxclip.data.sources import Record


class TeacherFeatures:
    """A safetensors file with `features` (N, F, R, R, C), rows in the order of the records.

    The frames are evenly spread over each clip and show the whole picture. Its metadata `videos`
    is a JSON list of the records' file names. Read from disk record by record. Raises
    FileNotFoundError, or ValueError if the file is not of these records.
    """

    def __init__(self, path: str | Path, records: Sequence[Record]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no teacher features {path}: write them with scripts/teacher_features.py"
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                videos = json.loads((file.metadata() or {}).get("videos", "[]"))
                self.channels = int(file.get_slice("features").get_shape()[-1])
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no teacher features: {error}") from error
        names = (record.video.name for record in records)
        if len(videos) != len(records) or any(
            Path(video).name != name for video, name in zip(videos, names, strict=True)
        ):
            raise ValueError(
                f"{path} holds features of {len(videos)} files that are not the {len(records)} of "
                f"the annotations: write them anew with scripts/teacher_features.py"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "channels": self.channels}

    @cached_property
    def _maps_NFRRC(self) -> Any:
        # opened where it is used: an open file does not travel to worker processes
        return safe_open(str(self.path), framework="pt").get_slice("features")

    def cut(
        self, index: int, *, shares_T: npt.NDArray[np.float64],
        crop: tuple[float, float, float, float], rows: int, mirror: bool,
    ) -> Tensor:  # fmt: skip
        """float16 (T, L, C): features where the tokens of a sample lie, L = rows * rows.

        shares_T: when each frame is, 0-1 of the clip. crop: top, left, bottom, right, 0-1 of the
        picture. mirror: whether the crop was mirrored after it was cut.
        """
        maps_FRRC = self._maps_NFRRC[index].float()
        nearest = (shares_T * len(maps_FRRC)).astype(int).clip(max=len(maps_FRRC) - 1)
        maps_TCRR = maps_FRRC[nearest].permute(0, 3, 1, 2)
        top, left, bottom, right = crop
        middles = (torch.arange(rows) + 0.5) / rows
        y = 2 * (top + middles * (bottom - top)) - 1
        x = 2 * (left + middles * (right - left)) - 1
        x = x.flip(0) if mirror else x
        at_LL2 = torch.stack([x.expand(rows, rows), y[:, None].expand(rows, rows)], dim=-1)
        cut_TCLL = F.grid_sample(
            maps_TCRR, at_LL2.expand(len(nearest), -1, -1, -1), align_corners=False,
            padding_mode="border",
        )  # fmt: skip
        return cut_TCLL.flatten(2).mT.half()
