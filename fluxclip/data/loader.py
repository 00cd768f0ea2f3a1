"""Captions and files to batches, one per training step.

Everything about a step (which pairs, crops, flips, frame times) is a function of (seed, step)
alone: any number of workers, and a run taken up again at any step, see the same tensors.

Shape legend: B clips, T frames, H W pixels.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from fluxclip import plugins, stages
from fluxclip.data.batch import Batch, Step, mixed
from fluxclip.data.faults import HOPELESS, Fault, fault_of, lack_of
from fluxclip.data.order import grouped_epoch, place_in_epoch
from fluxclip.data.sources import Records
from fluxclip.data.teacher import TeacherFeatures
from fluxclip.settings import settings
from fluxclip.tokens.budget import Draw, FluxSampling
from fluxclip.video import Clip, VideoInfo
from fluxclip.video.framing import pixel_span
from fluxclip.video.sampling import evenly_spread, random_crop, random_per_part
from fluxclip.video.transforms import flip, resize

# words that a mirrored picture would turn into a lie
_SIDED = re.compile(r"\b(left|right)(wards?)?\b|\b(anti|counter)?clockwise\b", re.IGNORECASE)
_INFOS_KEPT = 20_000  # in each worker: half a KB each
_FILES_COUNTED = 100_000  # records among which some of one file are told from others: a second
_MOST_PASSED = 1_000  # files in a row that a sample passes over: then it is hardly the files
_MIXING = 1  # keeps what is drawn for boxes apart from what is drawn for samples
_giving_up = threading.Lock()  # of the module, since steps travel to worker processes


Share = Annotated[float, Field(gt=0, le=1)]


@settings
class Augment:
    """One crop per clip: its share of the picture's area and range of aspect; flips left-right.

    Captions that say left or right are never flipped. vary_time draws each frame within its part
    of the clip instead of at its middle.
    """

    crop_area: tuple[Share, Share] = (0.5, 1.0)
    crop_aspect: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.333)
    flip: bool = True
    vary_time: bool = True


@dataclass
class Source:
    """Pairs that give `batch` of every step; with cache_frames above 0, clips stay in memory.

    teacher: feature maps of the same records, to be learned from. decoder: what reads their videos,
    see `read_clip`; ValueError for one that cannot be loaded.
    """

    records: Records
    batch: int
    captions: Literal["one", "first"] = "one"
    cache_frames: int = 0
    cache_side: int = 128
    teacher: TeacherFeatures | None = None
    decoder: str = "pyav"
    _cache: dict[int, Clip] = field(default_factory=dict, repr=False)
    _infos: dict[int, VideoInfo] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        plugins.load("fluxclip.video.decoders", self.decoder)  # now, and not in the first step

    def info(self, index: int) -> VideoInfo:
        """Duration and size of a record's file."""
        info = self._infos.get(index)
        if info is None:
            info = self.records.info(index)
            if len(self._infos) < _INFOS_KEPT:
                self._infos[index] = info
        return info

    def clip(self, index: int) -> Clip | None:
        """The cached clip of a record, read on first use; None without a cache."""
        if not self.cache_frames:
            return None
        if index not in self._cache:
            self._cache[index] = self.records.clip(
                index, num_frames=self.cache_frames, side=self.cache_side, fit="squash",
                decoder=self.decoder,
            )  # fmt: skip
        return self._cache[index]


class View(NamedTuple):
    """What is drawn of a record: a caption, a box of the picture, a mirror, and when (0-1)."""

    caption: str
    crop: tuple[float, float, float, float]
    mirror: bool
    shares_T: npt.NDArray[np.float64]


class Sample(NamedTuple):
    """One pair: its frames, the caption drawn, its name, and the teacher's features if any."""

    frames_THWC: Tensor
    caption: str
    name: str
    teacher_LC: Tensor | None


class Steps:
    """The steps of a run, by number. Each epoch of a source is a new order of all its records.

    rank, world_size: of several processes each has an equal part of every source's pairs; together
    they have the pairs, crops and frames that one process alone has. ValueError for a batch that
    cannot be shared evenly.
    mix: share of the clips with a teacher's features that have a box of another one, in the first
    mix_steps steps (see `mixed`); which other one depends on the number of processes.
    timed: whether to measure how long each stage of making a step takes, in whatever process.
    hopeless: path -> why, of files that are passed over unopened. watched: what is open while a
    record is read, given the numbers of its source and its own.
    """

    timed = False

    def __init__(
        self, sources: Sequence[Source], sampling: FluxSampling, augment: Augment, *, seed: int,
        rank: int = 0, world_size: int = 1, mix: float = 0.0, mix_steps: int = 0,
    ) -> None:  # fmt: skip
        self.mix, self.mix_steps = mix, mix_steps
        self.sources, self.sampling, self.augment, self.seed = sources, sampling, augment, seed
        self.rank, self.world_size = rank, world_size
        self.hopeless: Mapping[str, Fault] = {}
        self.watched: Callable[[int, int], AbstractContextManager[object]] = _unwatched
        for number, source in enumerate(sources):
            if source.batch % world_size:
                raise ValueError(
                    f"data.{number}.batch, {source.batch} pairs a step, is not shared evenly by "
                    f"{world_size} processes: make it a multiple of {world_size}"
                )

    @property
    def num_pairs(self) -> int:
        """Pairs of all sources."""
        return sum(len(source.records) for source in self.sources)

    @cached_property
    def num_files(self) -> int:
        """Files of all sources; of many records, each is taken to have one of its own."""
        if self.num_pairs > _FILES_COUNTED:
            return self.num_pairs
        return len({record.video for source in self.sources for record in source.records})

    def __getitem__(self, number: int) -> Step:
        if not self.timed:
            return self._made(number)
        with stages.measured() as seconds, stages.stage("other"):
            step = self._made(number)
        return replace(step, seconds=seconds)

    def _made(self, number: int) -> Step:
        self._expect(number)
        draw = self.sampling.draw(self.seed, number)
        unreadable: dict[str, Fault] = {}
        samples = [
            (
                (s << 32) + slot,
                self._readable_sample(s, index, (self.seed, number, s, slot), draw, unreadable),
            )
            for s in range(len(self.sources))
            for slot, index in self._own(self.order(s, number))
        ]
        by_kind: dict[tuple[int, bool], list[tuple[int, Sample]]] = {}
        for place, sample in samples:
            kind = len(sample.frames_THWC), sample.teacher_LC is not None
            by_kind.setdefault(kind, []).append((place, sample))
        with stages.stage("collate"):
            batches = self._collated(number, sorted(by_kind.items(), reverse=True))
        return Step(number, draw, tuple(batches), unreadable)

    def _collated(
        self, number: int, groups: Sequence[tuple[object, list[tuple[int, Sample]]]]
    ) -> list[Batch]:
        """A batch of each group of equal shapes, mixed where the step is to be."""
        batches = [_batch(group) for _, group in groups]
        if self.mix and number < self.mix_steps:
            rng = np.random.default_rng([self.seed, number, self.rank, 0, _MIXING])
            patch = self.sampling.patch
            batches = [mixed(batch, share=self.mix, patch=patch, rng=rng) for batch in batches]
        return batches

    def _own(self, indices: list[int]) -> list[tuple[int, int]]:
        """(slot, index) of this process's part of a source's records in a step."""
        size = len(indices) // self.world_size
        return list(enumerate(indices))[self.rank * size : (self.rank + 1) * size]

    def order(self, source: int, step: int) -> list[int]:
        """Records of a source that a step uses: consecutive places in the epochs' orders."""
        size, batch = len(self.sources[source].records), self.sources[source].batch
        places = (divmod(place, size) for place in range(step * batch, (step + 1) * batch))
        groups = self.sources[source].records.groups
        return [
            place_in_epoch((self.seed, source, epoch), size, at, groups=groups)
            for epoch, at in places
        ]

    def _expect(self, number: int) -> None:
        """Have fetched meanwhile what is far away and wanted soon after a step."""
        for s, source in enumerate(self.sources):
            if (groups := source.records.groups) is not None:
                epoch, at = divmod((number + 1) * source.batch - 1, len(source.records))
                coming = grouped_epoch((self.seed, s, epoch), groups).coming(at)
                if coming is not None:
                    source.records.expect(coming)

    def _readable_sample(
        self, number: int, index: int, seeds: tuple[int, ...], draw: Draw,
        unreadable: dict[str, Fault],
    ) -> Sample:  # fmt: skip
        """The sample of a record, or of the next one that can be read, drawn by the same seeds."""
        source, last = self.sources[number], None
        records = source.records
        passed: set[str] = set()
        for step in range(len(records)):
            if len(passed) == _MOST_PASSED:
                break
            at = (index + step) % len(records)
            path = records[at].video
            if fault := self.hopeless.get(str(path)):
                unreadable[str(path)] = fault
                passed.add(str(path))
                continue
            records.fetch(at)
            # anew for each, as what was drawn before a file failed depends on what was known of it
            rng = np.random.default_rng(seeds)
            try:
                with self.watched(number, at):
                    view = self._view(source, at, rng, draw)
                    frames_THWC = self._frames(source, at, view.shares_T, draw.side, view.crop)
            except Exception as error:  # decoders raise many kinds
                if lack := lack_of(path, error):
                    raise lack from error
                unreadable[str(path)], last = fault_of(path, error), error
                passed.add(str(path))
            else:
                return self._sample(source, at, view, frames_THWC)
        first = records[index].video
        reason = unreadable[str(first)].reason
        if len(passed) == _MOST_PASSED:
            raise ValueError(
                f"{_MOST_PASSED:,} files in a row cannot be read, the first {first}: {reason}; is "
                f"their disk there? if so, leave them out"
            ) from last
        raise ValueError(f"no file of a source can be read: {first}: {reason}") from last

    def give_up(self, faults: Mapping[str, Fault]) -> None:
        """Pass over those of the files, by path, that hang or crash whoever reads them."""
        hopeless = {path: fault for path, fault in faults.items() if fault.kind in HOPELESS}
        # another mapping: a thread may be sending this one to a worker, or giving up files itself
        with _giving_up:
            self.hopeless = {**self.hopeless, **hopeless}

    def _view(self, source: Source, index: int, rng: np.random.Generator, draw: Draw) -> View:
        record, a = source.records[index], self.augment
        one = source.captions == "one"
        caption = record.captions[rng.integers(len(record.captions)) if one else 0]
        info = source.info(index)
        aspect = info.width / info.height
        crop = random_crop(rng, scale=a.crop_area, ratio=a.crop_aspect, aspect=aspect)
        mirror = a.flip and rng.random() < 0.5 and not _says_side(record.captions)
        spread = random_per_part if a.vary_time else _at_middles
        shares_T = spread(0.0, 1.0, 1 if record.is_still else draw.num_frames, rng)
        return View(caption, crop, mirror, shares_T)

    def _sample(self, source: Source, index: int, view: View, frames_THWC: Tensor) -> Sample:
        if view.mirror:
            with stages.stage("crop"):
                frames_THWC = flip(frames_THWC[None], torch.tensor([True]))[0]
        teacher_LC = None
        if source.teacher:
            tubelets_T = view.shares_T[:: self.sampling.tubelet]
            rows = frames_THWC.shape[1] // self.sampling.patch
            teacher_TLC = source.teacher.cut(
                index, shares_T=tubelets_T, crop=view.crop, rows=rows, mirror=view.mirror
            )
            teacher_LC = teacher_TLC.flatten(0, 1)
        return Sample(frames_THWC, view.caption, source.records[index].captions[0], teacher_LC)

    def _frames(
        self, source: Source, index: int, shares_T: npt.NDArray[np.float64], side: int,
        crop: tuple[float, float, float, float],
    ) -> Tensor:  # fmt: skip
        """uint8 frames (T, side, side, 3) of a record, at those shares of its duration."""
        cached = source.clip(index)
        if cached is None:
            if source.records[index].is_still:
                clip = source.records.clip(index, num_frames=1, side=side, crop=crop)
            else:
                times_s = shares_T * source.info(index).duration_s
                clip = source.records.clip(
                    index, times_s=times_s, side=side, crop=crop, decoder=source.decoder
                )
            return torch.from_numpy(clip.frames_THWC)
        # a cached clip's frames are evenly spread over it, so equal parts of them are of time too
        keep = (shares_T * len(cached.times_s)).astype(int)
        top, left, bottom, right = crop
        size = source.cache_side
        (y0, y1), (x0, x1) = pixel_span(top, bottom, size), pixel_span(left, right, size)
        with stages.stage("crop"):
            cut = cached.frames_THWC[keep, y0:y1, x0:x1]
            return resize(torch.from_numpy(cut)[None], side=side, fit="squash")[0]


def _batch(group: Sequence[tuple[int, Sample]]) -> Batch:
    """Samples of equal shapes as tensors, with their places."""
    samples = [sample for _, sample in group]
    teacher = [sample.teacher_LC for sample in samples if sample.teacher_LC is not None]
    return Batch(
        torch.stack([sample.frames_THWC for sample in samples]),
        tuple(sample.caption for sample in samples),
        tuple(sample.name for sample in samples),
        tuple(place for place, _ in group),
        torch.stack(teacher) if teacher else None,
    )


def _at_middles(
    start_s: float, end_s: float, num_frames: int, rng: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return evenly_spread(start_s, end_s, num_frames)


def _unwatched(source: int, record: int) -> AbstractContextManager[object]:
    return nullcontext()


def _says_side(captions: Sequence[str]) -> bool:
    return any(_SIDED.search(caption) for caption in captions)
