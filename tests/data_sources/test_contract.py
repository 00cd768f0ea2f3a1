"""What every source promises: the same tensors from any number of workers and after any stop."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxclip.data import sources
from fluxclip.data.batch import Step
from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.sources import Records, annotations
from fluxclip.data.workers import steps
from fluxclip.tokens.budget import FluxSampling

SAMPLING = FluxSampling((2, 4, 1), (28, 56, 28), (4, 64), (16, 8))


def _csv(emoji: Path, folder: Path) -> tuple[str, str]:
    lines = [
        f"{record.video},{caption.replace(',', ' ')}"
        for name in ("train.json", "stills.json")
        for record in annotations.read(emoji / name)[:6]
        for caption in record.captions
    ]
    (folder / "set.csv").write_text("\n".join(["file,text", *lines]), "utf-8")
    return "annotations", f"{folder / 'set.csv'}?video=file&caption=text"


def _synthetic(emoji: Path, folder: Path) -> tuple[str, str]:
    return "synthetic", "11?stills=0.4&side=64"


@pytest.fixture(params=[_csv, _synthetic])
def named(
    request: pytest.FixtureRequest, emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """Kind and name of a source with stills and clips."""
    monkeypatch.setenv("FLUXCLIP_CACHE", str(tmp_path / "cache"))
    make: Callable[[Path, Path], tuple[str, str]] = request.param
    return make(emoji, tmp_path)


def equal(a: Step, b: Step) -> bool:
    return len(a.batches) == len(b.batches) and all(
        x.captions == y.captions and torch.equal(x.frames_BTHWC, y.frames_BTHWC)
        for x, y in zip(a.batches, b.batches, strict=True)
    )


def test_records_and_their_clips(named: tuple[str, str]) -> None:
    records = sources.read(*named)
    assert isinstance(records, Records)
    assert len(records) == len(list(records)) > 10
    assert records[-1] == records[len(records) - 1]
    assert records[2:4] == (records[2], records[3])
    again = pickle.loads(pickle.dumps(records))
    assert list(again) == list(records)
    assert {record.is_still for record in records} == {True, False}
    for index, record in enumerate(records):
        assert record.captions and all(caption.strip() for caption in record.captions)
        info = records.info(index)
        assert info.is_image == record.is_still
        assert records.is_there(index)
        if not record.is_still:
            times_s = np.array([0.0, info.duration_s / 2])
            clip = again.clip(index, times_s=times_s, side=20, crop=(0.0, 0.0, 0.5, 0.5))
            assert clip.frames_THWC.shape == (2, 20, 20, 3)
            assert (clip.times_s <= times_s).all()
            assert (clip.times_s > times_s - 0.5).all()


def test_any_number_of_workers_and_a_stop_anywhere_give_the_same_tensors(
    named: tuple[str, str],
) -> None:
    data = Steps([Source(sources.read(*named), 4)], SAMPLING, Augment(), seed=3)
    alone = list(steps(data, start=0, stop=6, workers=0))
    for start, workers in ((0, 2), (3, 0), (5, 0)):
        others = list(steps(data, start=start, stop=6, workers=workers))
        assert all(map(equal, alone[start:], others))
        assert len(others) == 6 - start
    assert not equal(alone[0], alone[1])


def test_every_epoch_has_all_records_in_another_order(named: tuple[str, str]) -> None:
    records = sources.read(*named)
    data = Steps([Source(records, 4)], SAMPLING, Augment(), seed=0)
    size = len(records)
    order = [index for step in range(5 * size) for index in data.order(0, step)]
    epochs = [tuple(order[i : i + size]) for i in range(0, 20 * size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len(set(epochs)) == 20


def test_a_name_that_is_a_path_counts_from_a_folder(named: tuple[str, str], tmp_path: Path) -> None:
    kind, name = named
    plain, mark, settings = name.partition("?")
    if sources.files(kind, name):
        relative = f"{Path(plain).relative_to(tmp_path)}{mark}{settings}"
        assert sources.located(kind, relative, folder=tmp_path) == name
    else:
        assert sources.located(kind, name, folder=tmp_path) == name
