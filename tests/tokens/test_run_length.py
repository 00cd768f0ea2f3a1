"""The run-length filter: the exact criterion, its invariants, and kinds of clips it meets."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxclip import plugins
from fluxclip.settings import parse
from fluxclip.tokens.filters.run_length import Settings, keep

GREY = 1 / (255 * 0.226)  # one grey level in units of the normalised pixels' deviation


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed))


def reference(x: np.ndarray, patch: int, tubelet: int, settings: Settings) -> np.ndarray:
    """The criterion as loops over places and steps: (B, N, L) bool."""
    b, t, height, width, _ = x.shape
    n, rows, columns = -(-t // tubelet), height // patch, width // patch
    mask = np.zeros((b, n, rows * columns), dtype=bool)
    for clip in range(b):
        for place in range(rows * columns):
            i, j = (place // columns) * patch, (place % columns) * patch
            pixels = x[clip, :, i : i + patch, j : j + patch].astype(np.float64)
            anchor = 0
            for k in range(n):
                last = pixels[min(k * tubelet + tubelet - 1, t - 1)]
                change = np.abs(last - pixels[anchor * tubelet])
                change = np.maximum(change - settings.noise_floor, 0).mean()
                mask[clip, k, place] = k == 0 or change > settings.threshold
                if settings.anchor == "previous" or mask[clip, k, place]:
                    anchor = k
    return mask


@pytest.mark.parametrize("num_frames", [1, 4, 5, 8, 16, 32])
@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("anchor", ["previous", "last_kept"])
@pytest.mark.parametrize("noise_floor", [0.0, 0.05])
def test_the_mask_is_the_criterion_bit_for_bit(
    num_frames: int, tubelet: int, anchor: str, noise_floor: float
) -> None:
    # a walk with small steps, so that both answers occur at every threshold
    x = clips(2, num_frames, 28, 42).cumsum(1) * 0.03 + clips(2, 1, 28, 42, seed=1)
    settings = parse(
        Settings,
        {"threshold": 0.06, "anchor": anchor, "noise_floor": noise_floor},
        source="test",
    )
    mask, run_length = keep(x, settings, patch=14, tubelet=tubelet)
    expected = reference(x.numpy(), 14, tubelet, settings)
    assert (mask.numpy() == expected).all()
    assert num_frames < 8 or 0 < mask.float().mean() < 1
    # runs are as long as it takes to the next kept token at the same place, and fill the clip
    assert (run_length[mask] >= 1).all()
    assert (run_length[~mask] == 0).all()
    assert (run_length.sum(1) == mask.shape[1]).all()
    for clip, place in np.ndindex(mask.shape[0], mask.shape[2]):
        kept = [*np.flatnonzero(expected[clip, :, place]), mask.shape[1]]
        found = run_length[clip, :, place][mask[clip, :, place]].tolist()
        assert found == np.diff(kept).tolist()


def rate(frames: Tensor, **settings: object) -> float:
    mask, _ = keep(frames, parse(Settings, settings, source="test"), patch=16, tubelet=2)
    return float(mask.float().mean())


def still(seed: int = 0) -> Tensor:
    return clips(1, 1, 224, 224, seed=seed).expand(1, 16, 224, 224, 3)


def test_a_clip_that_stands_still_keeps_its_first_step() -> None:
    assert rate(still()) == 1 / 8


def test_little_noise_on_a_still_clip_is_left_out() -> None:
    noise = clips(1, 16, 224, 224, seed=2)
    assert rate(still() + 2 * GREY * noise) <= 0.13
    # the cliff: from about six grey levels everything seems to move, but for a noise floor
    assert rate(still() + 6 * GREY * noise) == 1.0
    assert rate(still() + 6 * GREY * noise, noise_floor=0.3) <= 0.13


def test_a_small_thing_that_moves_costs_little() -> None:
    x = still().clone()
    for t in range(16):
        x[:, t, 96:128, 8 * t : 8 * t + 32] = 3.0
    assert 0.125 < rate(x) <= 0.2


def test_white_noise_keeps_everything() -> None:
    assert rate(clips(2, 16, 224, 224)) == 1.0


def test_a_slow_fade_drifts_away_unless_it_is_compared_with_what_was_kept() -> None:
    fade = still() + 1.9 * GREY * torch.arange(16.0)[None, :, None, None, None]
    assert rate(fade) == 1 / 8
    mask, _ = keep(fade, Settings(anchor="last_kept"), patch=16, tubelet=2)
    assert int(mask.sum(1).min()) >= 2


def test_mistakes_in_settings_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'threshold'"):
        parse(Settings, {"treshold": 0.1}, source="filter 'run_length'")
    with pytest.raises(ValueError, match="anchor: .*'first'"):
        parse(Settings, {"anchor": "first"}, source="filter 'run_length'")
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        parse(Settings, {"threshold": -1.0}, source="filter 'run_length'")


@pytest.mark.parametrize("name", plugins.available("fluxclip.tokens.filters"))
@pytest.mark.parametrize("num_frames", [1, 3, 8])
def test_every_filter_keeps_the_first_step_and_fills_the_clip_with_runs(
    name: str, num_frames: int
) -> None:
    module = plugins.load("fluxclip.tokens.filters", name)
    run: Callable[..., tuple[Tensor, Tensor]] = module.keep
    mask, run_length = run(clips(2, num_frames, 28, 42), module.Settings(), patch=14, tubelet=2)
    assert mask.shape == run_length.shape == (2, -(-num_frames // 2), 6)
    assert mask.dtype == torch.bool
    assert run_length.dtype == torch.int64
    assert mask[:, 0].all()
    assert (run_length.sum(1) == mask.shape[1]).all()
    assert ((run_length > 0) == mask).all()
