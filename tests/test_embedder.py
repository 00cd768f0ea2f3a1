"""What `load_model` promises: unit vectors that depend on their own clip alone, from any input."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fluxclip import Embedder, load_model
from fluxclip.model import weights
from fluxclip.model.presets import FluxCLIPConfig, preset
from fluxclip.tokens.budget import GridTable
from fluxclip.video import Clip, VideoError, read_clip


@pytest.fixture(scope="module")
def model() -> Embedder:
    torch.manual_seed(0)
    grids = GridTable((8, 56), ((128, 8, 56), (16, 4, 56)))
    config = FluxCLIPConfig(video=preset("tiny", depth=2), dim=48, grids=grids)
    return Embedder(weights.build(config), name="test")


@pytest.fixture(scope="module")
def files(emoji: Path) -> list[Path]:
    return sorted((emoji / "clips").iterdir())[:7]


@pytest.mark.parametrize("budget", [None, 200, 40, 3])
def test_vectors_are_float32_of_unit_length(
    model: Embedder, files: list[Path], budget: int | None
) -> None:
    video = model.embed_video(files, token_budget=budget)
    text = model.embed_text(["a cat", "the sun", "a very long caption about many things"])
    for vectors, count in ((video, len(files)), (text, 3)):
        assert vectors.shape == (count, model.dim)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_vector_depends_on_its_own_clip_alone(
    model: Embedder, files: list[Path], emoji: Path
) -> None:
    still = emoji / "stills" / "00a9-fe0f.webp"
    mixed = [files[0], still, *files[1:4], still, files[5]]
    together = model.embed_video(mixed, token_budget=40)
    for i, path in enumerate(mixed):
        alone = model.embed_video([path], token_budget=40)[0]
        np.testing.assert_allclose(alone, together[i], atol=1e-5)
    np.testing.assert_allclose(together[1], together[5], atol=1e-6)


def test_a_file_and_its_clip_are_the_same(model: Embedder, files: list[Path]) -> None:
    num_frames, side = model.grid(16)
    assert (num_frames, side) == (4, 56)
    clip = read_clip(files[0], num_frames=num_frames, side=side)
    a = model.embed_video([files[0]], token_budget=16)
    assert np.array_equal(a, model.embed_video([clip], token_budget=16))


def test_clips_of_any_size_are_fitted_to_the_grid(model: Embedder, files: list[Path]) -> None:
    native = read_clip(files[0], num_frames=8)
    assert native.frames_THWC.shape[1:3] == (224, 224)
    cosine = model.embed_video([native]) @ model.embed_video([files[0]]).T
    assert cosine.item() > 0.99
    longer = read_clip(files[0], num_frames=24, side=56)
    thinned = Clip(longer.frames_THWC[1::3], longer.times_s[1::3])
    assert np.array_equal(model.embed_video([longer]), model.embed_video([thinned]))
    wide = Clip(np.zeros((3, 20, 90, 3), np.uint8), np.arange(3.0))
    assert np.isfinite(model.embed_video([wide])).all()


def test_nothing_gives_no_vectors(model: Embedder) -> None:
    assert model.embed_video([]).shape == (0, 48)
    assert model.embed_text([]).shape == (0, 48)


def test_cost_falls_with_the_budget(model: Embedder) -> None:
    macs = [model.macs(8, 56, budget) for budget in (8, 32, 128, None)]
    assert macs[0] < macs[1] < macs[2] == macs[3]


def test_mistakes_are_named(model: Embedder, files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 or more, got 0"):
        model.embed_video(files, token_budget=0)
    with pytest.raises(ValueError, match="integer count"):
        model.embed_video(files, token_budget=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a list of files"):
        model.embed_video(files[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a list of texts"):
        model.embed_text("a cat")
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4"):
        model.embed_video([files[0], "gone.mp4"])
    fake = tmp_path / "fake.mp4"
    fake.write_text("not a video")
    with pytest.raises(VideoError, match=r"fake\.mp4"):
        model.embed_video([fake, *files])


@pytest.mark.parametrize("changes", ["filter=run_length", "filter=run_length,pool_by_length=true"])
def test_a_filter_is_asked_for_after_the_name(emoji: Path, files: list[Path], changes: str) -> None:
    plain, filtered = load_model("emoji-tiny"), load_model(f"emoji-tiny?{changes}")
    assert filtered.fingerprint != plain.fingerprint
    assert filtered.name == filtered.source == f"emoji-tiny?{changes}"
    assert (filtered.filter, plain.filter) == ("run_length()", None)
    still = emoji / "stills" / "00a9-fe0f.webp"
    mixed = [files[0], still, *files[1:]]
    together = filtered.embed_video(mixed)
    for i, path in enumerate(mixed):
        np.testing.assert_allclose(filtered.embed_video([path])[0], together[i], atol=1e-5)
    num_frames, side = filtered.grid()
    clips = [read_clip(path, num_frames=num_frames, side=side) for path in files]
    costs = filtered.clip_costs(clips)
    every = filtered.num_tokens(num_frames, side)
    assert all(every // num_frames <= tokens <= every for tokens, _ in costs)
    assert min(tokens for tokens, _ in costs) < every
    assert all(macs <= plain.macs(num_frames, side) for _, macs in costs)
    # a threshold of nothing keeps all that differs at all
    strict = load_model("emoji-tiny?filter=run_length,threshold=0")
    kept = [tokens for tokens, _ in strict.clip_costs(clips)]
    assert all(a >= b for a, (b, _) in zip(kept, costs, strict=True))


def test_mistakes_after_the_name_are_named() -> None:
    for source, message in (
        ("emoji-tiny?filter", "key=value, got 'filter'"),
        ("emoji-tiny?filter=runlength", "unknown filter 'runlength'.*run_length"),
        ("emoji-tiny?scorer=best", "unknown scorer 'best'"),
        ("emoji-tiny?filter=run_length,treshold=1", "did you mean 'threshold'"),
        ("emoji-tiny?threshold=0.1", "need a filter"),
        ("emoji-tiny?pool_by_length=1", "true or false, got '1'"),
        ("open_clip:ViT-B-32/x?filter=run_length", "drops whole frames"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(source)
