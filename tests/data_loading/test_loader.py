"""Steps of training data: the same from any number of workers, true to their clips and captions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fluxclip.data.batch import Batch, mixed
from fluxclip.data.loader import Augment, Source, Steps, _says_side
from fluxclip.data.sources import Record, Records
from fluxclip.data.sources.annotations import read
from fluxclip.data.workers import steps
from fluxclip.tokens.budget import FluxSampling
from fluxclip.video import read_clip

SAMPLING = FluxSampling((2, 4, 1), (28, 56, 28), (4, 64), (16, 8))
PLAIN = Augment(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=False, vary_time=False)


def sources(emoji: Path, **changes: object) -> list[Source]:
    clips = Records(read(emoji / "train.json")[:6])
    stills = Records(read(emoji / "stills.json")[:5])
    return [Source(clips, 4, **changes), Source(stills, 3, **changes)]  # type: ignore[arg-type]


def equal(a: list[object], b: list[object]) -> bool:
    return all(
        x.draw == y.draw
        and [batch.captions for batch in x.batches] == [batch.captions for batch in y.batches]
        and all(
            torch.equal(p.frames_BTHWC, q.frames_BTHWC)
            for p, q in zip(x.batches, y.batches, strict=True)
        )
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("cache_frames", [0, 6])
def test_a_step_is_bytes_of_clips_and_stills_with_their_captions(
    emoji: Path, cache_frames: int
) -> None:
    data = Steps(sources(emoji, cache_frames=cache_frames), SAMPLING, Augment(), seed=0)
    captions_of = {r.captions[0]: r.captions for s in data.sources for r in s.records}
    for number in range(3):
        step = data[number]
        assert step.draw == SAMPLING.draw(0, number)
        assert step.num_pairs == 7
        clips, stills = step.batches
        side = step.draw.side
        assert clips.frames_BTHWC.shape == (4, step.draw.num_frames, side, side, 3)
        assert stills.frames_BTHWC.shape == (3, 1, side, side, 3)
        for batch in step.batches:
            assert batch.frames_BTHWC.dtype == torch.uint8
            for name, caption in zip(batch.names, batch.captions, strict=True):
                assert caption in captions_of[name]


def test_steps_do_not_depend_on_workers_or_on_where_a_run_starts(emoji: Path) -> None:
    data = Steps(sources(emoji), SAMPLING, Augment(), seed=3)
    alone = list(steps(data, start=0, stop=4, workers=0))
    assert equal(alone, list(steps(data, start=0, stop=4, workers=2)))
    assert equal(alone[2:], list(steps(data, start=2, stop=4, workers=0)))
    other = list(steps(Steps(sources(emoji), SAMPLING, Augment(), seed=4), start=0, stop=4,
                       workers=0))  # fmt: skip
    assert not equal(alone, other)


def test_every_record_comes_once_an_epoch_in_a_new_order(emoji: Path) -> None:
    data = Steps(sources(emoji), SAMPLING, Augment(), seed=0)
    order = [index for step in range(30) for index in data.order(0, step)]
    epochs = [tuple(order[i : i + 6]) for i in range(0, 120, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len(set(epochs)) > 15


def test_without_augmentation_frames_are_those_of_the_clip(emoji: Path) -> None:
    data = Steps(sources(emoji, captions="first"), SAMPLING, PLAIN, seed=0)
    step = data[0]
    frames = step.batches[0].frames_BTHWC
    for slot, index in enumerate(data.order(0, 0)):
        record = data.sources[0].records[index]
        clip = read_clip(record.video, num_frames=step.draw.num_frames, side=step.draw.side)
        difference = frames[slot].numpy().astype(int) - clip.frames_THWC
        assert np.abs(difference).mean() < 1
        assert step.batches[0].captions[slot] == record.captions[0]


def test_cached_frames_are_those_of_the_clip(emoji: Path) -> None:
    data = Steps(sources(emoji, cache_frames=48, cache_side=112), SAMPLING, PLAIN, seed=0)
    step = data[1]
    for slot, index in enumerate(data.order(0, 1)):
        record = data.sources[0].records[index]
        clip = read_clip(record.video, num_frames=step.draw.num_frames, side=step.draw.side)
        frames = step.batches[0].frames_BTHWC[slot].numpy()
        # neighbouring frames of a cache differ a little in time, none in order
        assert np.abs(frames.astype(int) - clip.frames_THWC).mean() < 6


@pytest.mark.parametrize("cache_frames", [0, 1])
def test_crops_of_a_wide_picture_are_square(tmp_path: Path, cache_frames: int) -> None:
    """A disc stays a disc: the aspect of a crop is one of pixels, not of shares."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (320, 120))
    for x in range(0, 320, 40):
        for y in range(0, 120, 40):
            ImageDraw.Draw(picture).ellipse((x + 4, y + 4, x + 36, y + 36), fill="white")
    picture.save(tmp_path / "discs.png")
    augment = Augment(crop_area=(0.3, 0.3), crop_aspect=(1.0, 1.0), flip=False)
    source = Source(Records([Record(tmp_path / "discs.png", ("discs",), None)]), 1,
                    cache_frames=cache_frames, cache_side=256)  # fmt: skip
    frame = Steps([source], SAMPLING, augment, seed=0)[0].batches[0].frames_BTHWC[0, 0]
    bright = (frame.float().mean(-1) > 128).float()
    # as many edges across as down, where a crop of equal shares would have 2.7 times as many
    across = (bright.diff(dim=1) != 0).sum() / bright.shape[0]
    down = (bright.diff(dim=0) != 0).sum() / bright.shape[1]
    assert 0.75 < across / down < 1.33


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_named_and_replaced(
    emoji: Path, tmp_path: Path, workers: int
) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    records = Records([Record(bad, ("bad",), None), *read(emoji / "train.json")[:2]])
    data = Steps([Source(records, 3)], SAMPLING, Augment(), seed=0)
    (step,) = steps(data, start=0, stop=1, workers=workers)
    assert list(step.unreadable) == [str(bad)]
    assert step.unreadable[str(bad)].kind == "not a video"
    assert step.num_pairs == 3
    assert "bad" not in step.batches[0].names
    with pytest.raises(ValueError, match="no file of a source can be read"):
        _ = Steps([Source(Records(records[:1]), 3)], SAMPLING, Augment(), seed=0)[0]


def test_pictures_are_mirrored_only_where_the_caption_stays_true(tmp_path: Path) -> None:
    assert _says_side(("left arrow",))
    assert _says_side(("fist", "hand, left-facing"))
    assert _says_side(("it turns Left.",))
    assert _says_side(("upwards", "counterclockwise"))
    assert not _says_side(("a bright leftover",))
    from PIL import Image

    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[:, :28] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")

    def left_is_bright(caption: str) -> set[bool]:
        records = Records([Record(tmp_path / "half.png", (caption,), None)])
        augment = Augment(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
        data = Steps([Source(records, 1)], SAMPLING, augment, seed=0)
        frames = [data[number].batches[0].frames_BTHWC[0, 0] for number in range(20)]
        return {bool(f[:, :9].float().mean() > 128) for f in frames}

    assert left_is_bright("a half") == {True, False}
    assert left_is_bright("the left half") == {True}


def test_a_box_of_another_clip_brings_its_features_along() -> None:
    """Each patch shows the number of its clip and place, and the teacher says that number."""
    b, t, rows, patch = 6, 2, 4, 14
    number = torch.arange(b * rows * rows).view(b, 1, rows, rows).expand(-1, t, -1, -1)
    pixels = number.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    batch = Batch(
        pixels[..., None].expand(-1, -1, -1, -1, 3).to(torch.uint8), ("c",) * b, ("n",) * b,
        tuple(range(b)), number.reshape(b, -1, 1).half(),
    )  # fmt: skip
    shares = []
    for seed in range(40):
        found = mixed(batch, share=0.5, patch=patch, rng=np.random.default_rng(seed))
        assert found.teacher_BLC is not None
        corners = found.frames_BTHWC[:, :, ::patch, ::patch, 0].reshape(b, -1)
        assert torch.equal(corners.float(), found.teacher_BLC[..., 0].float())
        whole = corners.view(b, t, rows, rows).repeat_interleave(patch, 2)
        assert torch.equal(found.frames_BTHWC[..., 0], whole.repeat_interleave(patch, 3))
        # the place stays, and the clip is its own or one other, the same for the whole step
        assert torch.equal(corners % rows**2, number.reshape(b, -1) % rows**2)
        shift = (corners // rows**2 - torch.arange(b)[:, None]) % b
        assert len(set(shift.flatten().tolist()) - {0}) <= 1
        shares.append((shift > 0).float().mean().item())
    # half the clips, half of each at most, less what is cut off at the edges
    assert 0.1 < np.mean(shares) < 0.25
    bare = replace(batch, teacher_BLC=None)
    assert mixed(bare, share=1.0, patch=patch, rng=np.random.default_rng(0)) is bare
