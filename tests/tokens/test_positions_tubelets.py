"""Patch vectors and positions: order, shapes, interpolation, caching."""

import pytest
import torch
import torch.nn.functional as F

from fluxclip.tokens.positions import GlobalPositions, sincos_3d
from fluxclip.tokens.tubelets import PatchEmbedding, tubelets
from fluxclip.training import optimizer


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_tubelets_hold_the_pixels_of_their_place(tubelet: int, num_frames: int) -> None:
    frames = torch.randn(2, num_frames, 28, 42, 3)
    x = tubelets(frames, patch=14, tubelet=tubelet)
    steps = -(-num_frames // tubelet)
    assert x.shape == (2, steps, 6, tubelet * 14 * 14 * 3)
    for n, place in ((0, 0), (steps - 1, 4)):
        row, column = divmod(place, 3)
        parts = [
            frames[1, min(n * tubelet + i, num_frames - 1),
                   row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
            for i in range(tubelet)
        ]  # fmt: skip
        assert torch.equal(x[1, n, place], torch.stack(parts).flatten())


def test_sides_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="30 x 28 pixels"):
        tubelets(torch.zeros(1, 1, 30, 28, 3), patch=14)
    with pytest.raises(ValueError, match="at least one frame"):
        tubelets(torch.zeros(1, 0, 28, 28, 3), patch=14)


def test_patch_vectors_ignore_brightness_scale() -> None:
    """The norm before the projection: a patch times a constant is the same patch."""
    embed = PatchEmbedding(32)
    frames = torch.randn(1, 2, 28, 28, 3)
    x_BNLP = tubelets(frames, patch=14)
    torch.testing.assert_close(embed(x_BNLP), embed(3 * x_BNLP), atol=1e-5, rtol=1e-4)


def test_positions_at_the_table_s_own_grid_are_the_table() -> None:
    positions = GlobalPositions(4, 3, 32)
    torch.testing.assert_close(positions(4, 3, 3), sincos_3d(4, 3, 3, 32).flatten(0, 2))


def test_time_is_interpolated_linearly_then_space_bicubically() -> None:
    positions = GlobalPositions(4, 6, 32)
    torch.nn.init.normal_(positions.table)
    torch.nn.init.normal_(positions.scale)
    torch.nn.init.normal_(positions.shift)
    table = (positions.table * positions.scale + positions.shift).permute(3, 0, 1, 2)[None]
    over_time = F.interpolate(table, size=(7, 6, 6), mode="trilinear", align_corners=False)
    over_space = F.interpolate(
        over_time[0].transpose(0, 1), size=(4, 8), mode="bicubic", align_corners=False
    )
    expected = over_space.permute(0, 2, 3, 1).reshape(-1, 32)
    torch.testing.assert_close(positions(7, 4, 8), expected, atol=1e-5, rtol=1e-5)


def test_a_grid_with_as_many_entries_but_another_shape_is_interpolated() -> None:
    positions = GlobalPositions(4, 4, 32)
    assert not torch.allclose(positions(1, 8, 8), positions(4, 4, 4))


def test_the_cache_follows_a_fused_optimizer() -> None:
    """Which changes parameters without telling PyTorch's version counter."""
    positions = GlobalPositions(4, 3, 32)
    adamw = optimizer.build(positions, lr=0.1, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(2):
        positions.eval()
        with torch.no_grad():
            torch.testing.assert_close(positions(2, 3, 3), positions._interpolate(2, 3, 3))
        positions.train()(2, 3, 3).square().sum().backward()
        adamw.step()


def test_a_model_made_for_inference_only_works() -> None:
    with torch.inference_mode():
        assert GlobalPositions(4, 3, 32).eval()(2, 3, 3).shape == (18, 32)


def test_the_cache_follows_the_parameters() -> None:
    positions = GlobalPositions(4, 3, 32).eval()
    with torch.no_grad():
        before = positions(2, 3, 3)
        assert positions(2, 3, 3) is before
        positions.shift += 1
        torch.testing.assert_close(positions(2, 3, 3), before + 1)
        positions.load_state_dict({**positions.state_dict(), "shift": torch.full((32,), 5.0)})
        torch.testing.assert_close(positions(2, 3, 3), before + 5)
        positions.double()
        assert positions(2, 3, 3).dtype == torch.float64
