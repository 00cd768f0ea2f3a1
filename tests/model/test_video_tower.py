"""The video tower: shapes, budgets, independence of clips, cost, and a slow oracle of attention."""

import pytest
import torch

from fluxclip.model.attention import attend
from fluxclip.model.blocks import Block
from fluxclip.model.presets import preset
from fluxclip.model.video_tower import VideoTower


@pytest.fixture(scope="module")
def tower() -> VideoTower:
    torch.manual_seed(0)
    tower = VideoTower(preset("tiny", depth=2, layer_scale=1.0)).eval()
    # fresh LPE and LayerScale are constants: make every part matter
    for parameter in tower.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return tower


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("height", "width"), [(56, 56), (28, 84)])
@pytest.mark.parametrize("budget", [None, 1, 7, 10_000])
@torch.no_grad()
def test_any_clip_at_any_budget(
    tower: VideoTower, batch: int, num_frames: int, height: int, width: int, budget: int | None
) -> None:
    out = tower(clips(batch, num_frames, height, width), budget)
    assert out.shape == (batch, 256)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("scorer", ["group_dynamic", "uniform", "random_drop"])
@pytest.mark.parametrize("num_frames", [1, 3, 4, 8])
@torch.no_grad()
def test_the_budget_is_kept_exactly(scorer: str, num_frames: int) -> None:
    torch.manual_seed(0)
    tower = VideoTower(preset("tiny", depth=1, scorer=scorer)).eval()
    patches = tower.embed(clips(2, num_frames, 56, 56))
    for budget in range(1, 16 * num_frames + 3, 5):
        assert tower.select(patches, budget).lengths == (min(budget, 16 * num_frames),) * 2


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_refused(tower: VideoTower, budget: int) -> None:
    with pytest.raises(ValueError, match="token budget must be 1 or more"):
        tower(clips(1, 2, 28, 28), budget)


@pytest.mark.parametrize("budget", [None, 20])
@torch.no_grad()
def test_a_clip_s_feature_depends_on_that_clip_alone(tower: VideoTower, budget: int | None) -> None:
    x = clips(5, 4, 56, 56)
    together = tower(x, budget)
    for i in range(5):
        torch.testing.assert_close(tower(x[i : i + 1], budget)[0], together[i], atol=1e-5, rtol=0)
    torch.testing.assert_close(tower(x.flip(0), budget).flip(0), together, atol=1e-5, rtol=0)


def test_no_gradient_reaches_another_clip_s_pixels(tower: VideoTower) -> None:
    x = clips(3, 4, 28, 28).requires_grad_()
    tower(x, 9)[1].sum().backward()
    assert x.grad is not None
    assert x.grad[1].abs().sum() > 0
    assert x.grad[[0, 2]].abs().sum() == 0


@torch.no_grad()
def test_order_of_time_matters(tower: VideoTower) -> None:
    x = clips(1, 4, 28, 28)
    assert not torch.allclose(tower(x), tower(x.flip(1)), atol=1e-3)


def test_attention_equals_the_formula() -> None:
    q, k, v = clips(2, 7, 8), clips(2, 9, 8, seed=1), clips(2, 9, 8, seed=2)
    q, k, v = (x.flatten(2) for x in (q, k, v))
    heads, size = 4, q.shape[-1] // 4
    expected = torch.empty_like(q)
    for b in range(2):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = (q[b, :, part] @ k[b, :, part].T / size**0.5).softmax(-1)
            expected[b, :, part] = weights @ v[b, :, part]
    torch.testing.assert_close(attend(q, k, v, heads=heads), expected, atol=1e-5, rtol=1e-5)


def test_drop_path_keeps_or_loses_a_branch_per_clip() -> None:
    torch.manual_seed(0)
    block = Block(32, 2, mlp_ratio=4, gelu="tanh", layer_scale=1.0, drop_path=0.5)
    x = torch.randn(64, 5, 32)
    out = block.train()(x)
    unchanged = (out == x).all(-1)
    # all tokens of a clip share their fate; about a quarter of the clips lose both branches
    assert (unchanged.all(1) == unchanged.any(1)).all()
    assert 4 <= int(unchanged.all(1).sum()) <= 30
    torch.testing.assert_close(block.eval()(x), block(x))


@pytest.mark.parametrize(
    ("name", "column"),
    [("small", {3072: 153.9, 2048: 83.3, 1024: 32.0, 512: 13.6}),
     ("base", {3072: 440.1, 2048: 254.8, 1024: 108.1, 512: 49.3})],
)  # fmt: skip
def test_multiply_accumulates_are_the_paper_s_column(name: str, column: dict[int, float]) -> None:
    with torch.device("meta"):
        tower = VideoTower(preset(name))
    for kept, giga in column.items():
        assert round(tower.macs(kept, kept) / 1e9, 1) == giga
    # discarded tokens were embedded too: 588 values times the width each
    width = tower.config.width
    assert tower.macs(4096, 2048) - tower.macs(2048, 2048) == 2048 * 588 * width


def test_parameters_of_the_official_sizes() -> None:
    """28,845,948 and 104,560,380 in the official classes, with three pools, heads and aligners."""
    extra = 3 * (768 + 1) * 400 + 2 * (768 * 769 + 2 * 768) + 2 * 768
    for name, official in (("small", 28_845_948), ("base", 104_560_380)):
        with torch.device("meta"):
            tower = VideoTower(preset(name, projector_budgets=(3072, 2048, 1024)))
        assert sum(p.numel() for p in tower.parameters()) + extra == official


def test_the_projector_nearest_in_log_tokens_serves() -> None:
    with torch.device("meta"):
        tower = VideoTower(preset("tiny", projector_budgets=(3072, 2048, 1024)))
    nearest = {9999: 0, 2600: 0, 2048: 1, 1500: 1, 1400: 2, 10: 2}
    assert {n: tower.projector_for(n) for n in nearest} == nearest


def test_mistakes_in_a_preset_are_named() -> None:
    with pytest.raises(ValueError, match="unknown preset 'huge': known are tiny, small, base"):
        preset("huge")
    with pytest.raises(ValueError, match="divisible by heads"):
        preset("tiny", heads=5)
    with pytest.raises(ValueError, match="unknown scorer 'unifrom'.*uniform"):
        VideoTower(preset("tiny", scorer="unifrom"))
    with pytest.raises(ValueError, match="multiples of 14"):
        preset("tiny").num_tokens(8, 100)
