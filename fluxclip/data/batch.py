"""What one training step sees: its pairs, as tensors.

Shape legend: B clips, T frames, H W pixels, L tokens, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fluxclip import stages
from fluxclip.data.faults import Fault
from fluxclip.tokens.budget import Draw
from fluxclip.video.transforms import to_float


@dataclass(frozen=True)
class Batch:
    """Pairs of one step whose clips have equal shapes.

    frames_BTHWC: uint8 0-255. captions: one per clip. names: the first caption of each record:
    pairs of equal name show the same thing, so they are no negatives of each other.
    places: where each stands in the step, a number that no other pair of it has.
    teacher_BLC: float16, what a teacher's features are at each of the L tokens, if there is one.
    """

    frames_BTHWC: Tensor
    captions: tuple[str, ...]
    names: tuple[str, ...]
    places: tuple[int, ...]
    teacher_BLC: Tensor | None = None

    def pin_memory(self) -> "Batch":
        """Tensors where a GPU can fetch them while the CPU goes on."""
        teacher = None if self.teacher_BLC is None else self.teacher_BLC.pin_memory()
        return replace(self, frames_BTHWC=self.frames_BTHWC.pin_memory(), teacher_BLC=teacher)

    def split(self, pieces: int) -> list["Batch"]:
        """Consecutive parts, as equal as can be, none of them empty."""
        spans = [span for span in np.array_split(range(len(self.captions)), pieces) if len(span)]
        return [
            Batch(
                self.frames_BTHWC[s[0] : s[-1] + 1], self.captions[s[0] : s[-1] + 1],
                self.names[s[0] : s[-1] + 1], self.places[s[0] : s[-1] + 1],
                None if self.teacher_BLC is None else self.teacher_BLC[s[0] : s[-1] + 1],
            )
            for s in spans
        ]  # fmt: skip

    def to_float(
        self, device: torch.device, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Tensor:
        """The frames as normalised float on the device; they travel there as bytes."""
        with stages.stage("copy"):
            frames_BTHWC = self.frames_BTHWC.to(device, non_blocking=True)
        return to_float(frames_BTHWC, mean=mean, std=std)


@dataclass(frozen=True)
class Step:
    """What one training step sees: its draw, and one batch per shape (stills have one frame).

    unreadable: path -> why, of files that another record stood in for. part: which one it is,
    where a step has been split. seconds: by stage, what it took to make, if `Steps.timed`.
    """

    number: int
    draw: Draw
    batches: tuple[Batch, ...]
    unreadable: Mapping[str, Fault]
    part: int = 0
    seconds: Mapping[stages.Stage, float] = field(default_factory=dict)

    def pin_memory(self) -> "Step":
        return replace(self, batches=tuple(batch.pin_memory() for batch in self.batches))

    def split(self, pieces: int) -> list["Step"]:
        """Parts of a step that together have its pairs; fewer where it has fewer pairs."""
        parts: list[list[Batch]] = [[] for _ in range(pieces)]
        for batch in self.batches:
            for part, piece in zip(parts, batch.split(pieces), strict=False):
                part.append(piece)
        return [
            replace(self, batches=tuple(batches), part=number)
            for number, batches in enumerate(filter(None, parts))
        ]

    @property
    def num_pairs(self) -> int:
        return sum(len(batch.captions) for batch in self.batches)


def mixed(batch: Batch, *, share: float, patch: int, rng: np.random.Generator) -> Batch:
    """The batch, `share` of its clips with a box replaced by that of another one; features alike.

    CutMix (arXiv 1905.04899) in whole patches, for learning from a teacher alone, since captions
    are no longer true: what the teacher says of a place is nearly what it says of the same pixels
    beside others, so that few clips give many pictures and are not learned by heart. The box is the
    same in all frames, its area drawn evenly from 0 to 1, cut off where it leaves the picture.
    A batch without a teacher's features stays as it is.
    """
    b, _, height, width, _ = batch.frames_BTHWC.shape
    if batch.teacher_BLC is None or b == 1:
        return batch
    rows, columns = height // patch, width // patch
    half_B1 = np.sqrt(rng.random((b, 1))) / 2
    row_B1, column_B1 = rng.random((b, 1)) * rows, rng.random((b, 1)) * columns
    in_row_BR = np.abs(np.arange(rows) + 0.5 - row_B1) < half_B1 * rows
    in_column_BC = np.abs(np.arange(columns) + 0.5 - column_B1) < half_B1 * columns
    taken_B11 = (rng.random(b) < share)[:, None, None]
    box_BRC = torch.from_numpy(taken_B11 & in_row_BR[:, :, None] & in_column_BC[:, None])
    pixels_BHW = box_BRC.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    steps = batch.teacher_BLC.shape[1] // (rows * columns)
    tokens_BL = box_BRC.flatten(1).repeat(1, steps)
    other_B = (torch.arange(b) + int(rng.integers(1, b))) % b
    frames, teacher = batch.frames_BTHWC, batch.teacher_BLC
    return replace(
        batch,
        frames_BTHWC=torch.where(pixels_BHW[:, None, :, :, None], frames[other_B], frames),
        teacher_BLC=torch.where(tokens_BL[..., None], teacher[other_B], teacher),
    )
