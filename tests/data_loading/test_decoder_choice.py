"""A source's videos are read by the decoder that a recipe names."""

from pathlib import Path

import pytest
import torch

from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.sources import Records
from fluxclip.data.sources.annotations import read
from fluxclip.tokens.budget import FluxSampling
from fluxclip.training import recipe as recipes
from fluxclip.training.loop import dataset

SAMPLING = FluxSampling((2, 2, 1), (56, 56, 28), (4, 64), (16, 8))
NEGATIVE = """
from contextlib import contextmanager
from fluxclip.video.decoders import pyav

class Negative:
    def __init__(self, video):
        self.video, self.info = video, video.info

    def read(self, times_s, framing):
        frames, shown_s = self.video.read(times_s, framing)
        return 255 - frames, shown_s

@contextmanager
def open_video(path, content=None):
    with pyav.open_video(path, content) as video:
        yield Negative(video)
"""


@pytest.mark.parametrize("cache_frames", [0, 4])
def test_a_decoder_from_outside_reads_the_clips(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_frames: int
) -> None:
    (tmp_path / "my_decoders").mkdir()
    (tmp_path / "my_decoders" / "negative.py").write_text(NEGATIVE)
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = Augment(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))

    def frames(decoder: str) -> torch.Tensor:
        records = Records(read(emoji / "train.json")[:3])
        source = Source(records, 3, cache_frames=cache_frames, decoder=decoder)
        return Steps([source], SAMPLING, whole, seed=0)[0].batches[0].frames_BTHWC

    difference = frames("pyav").int() + frames("my_decoders.negative").int() - 255
    assert difference.abs().max() <= 1  # of rounding, where cached frames are scaled once more


def test_an_unknown_decoder_is_refused_before_the_first_step(emoji: Path) -> None:
    demo = emoji.parents[1] / "configs" / "demo.toml"
    recipe = recipes.read(demo, ["data.0.decoder=pyaw"])
    with pytest.raises(ValueError, match="unknown decoder 'pyaw'.*did you mean 'pyav'"):
        dataset(recipe)
