"""The work of a step is what torch counts, and computing some of it again changes no gradient."""

from pathlib import Path

import pytest
import torch
from small_run import QUIET, metrics, read
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fluxclip.data.batch import Step
from fluxclip.text.encoders import sentencepiece_transformer
from fluxclip.training import gradient_cache
from fluxclip.training.flops import matrix_peak, passes
from fluxclip.training.forward import Forward
from fluxclip.training.loop import dataset, train
from fluxclip.training.monitor import Monitor
from fluxclip.training.plan import kept_for_backward

RANDOM = ["model.drop_path=0.3", "model.scorer=random_drop", "flux.tokens=[64,64]"]


@pytest.fixture
def trained_text(tmp_path: Path) -> list[str]:
    """Changes for a text tower that is trained."""
    source = sentencepiece_transformer.example(tmp_path)
    return [
        "text.encoder=sentencepiece_transformer", f"text.source={source}", "text.weights=stored",
        "text.max_tokens=24", "negatives=step",
    ]  # fmt: skip


def forward_of(changes: list[str]) -> tuple[Forward, Step]:
    recipe = read(changes)
    torch.manual_seed(0)
    data = dataset(recipe)
    return Forward(recipe.build(), data.sources, recipe), data[0]


def gradients(changes: list[str], *, pieces: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    forward, step = forward_of(changes)
    _, parts = gradient_cache.backward(forward, step, pieces=pieces)
    return parts, {n: p.grad for n, p in forward.named_parameters() if p.grad is not None}


def test_the_work_of_a_step_is_what_torch_counts(
    changes: list[str], trained_text: list[str]
) -> None:
    """Three forward passes where both towers are trained; one where neither is, but for heads."""
    forward, step = forward_of([*changes, *RANDOM, *trained_text])
    features = forward.encode(step)
    with FlopCounterMode(display=False) as counter:
        forward.encode(step)
    assert features.flops == pytest.approx(3 * counter.get_total_flops(), rel=0.02)
    video_only = forward_of([*changes, *RANDOM])[0].encode(step).flops
    assert 0 < video_only < features.flops
    forward.model.requires_grad_(False)
    assert forward.encode(step).flops == pytest.approx(features.flops / 3)
    forward.model.requires_grad_(True)
    forward.model.video.requires_grad_(False)
    text_only = features.flops - video_only
    assert forward.encode(step).flops == pytest.approx(text_only + video_only / 3)


def test_a_tower_that_is_trained_in_part_counts_by_that_part() -> None:
    tower = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    assert passes(tower) == 3
    tower[0].requires_grad_(False)
    assert passes(tower) == 2
    tower.requires_grad_(False)
    assert passes(tower) == 1


def test_recomputed_blocks_have_the_same_gradients_and_no_more_work(
    changes: list[str], trained_text: list[str]
) -> None:
    """With drop path, two views, stills, a trained text tower; in one piece and in three."""
    own = [*changes, *RANDOM, *trained_text]
    parts, expected = gradients(own, pieces=1)
    for pieces, bound in ((1, 1e-6), (3, 1e-5)):
        again, found = gradients([*own, "activation_checkpointing=true"], pieces=pieces)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm()
            # a key's bias changes no softmax: its gradient is nothing but rounding
            assert error <= bound * gradient.norm() + 1e-8, (pieces, name)
        # captions of a piece are padded to the longest of it, not of the step
        assert again["flops"] == pytest.approx(parts["flops"], rel=0.01)


def test_a_plan_knows_what_recomputed_blocks_keep(changes: list[str]) -> None:
    recipes = [read([*changes, f"activation_checkpointing={on}"]) for on in ("false", "true")]
    whole, less = (kept_for_backward(recipe.build(), recipe) for recipe in recipes)
    assert 0.1 * whole < less <= 0.45 * whole


def test_a_run_may_be_resumed_with_recomputed_blocks(changes: list[str], tmp_path: Path) -> None:
    """It is a way of computing: the weights do not know of it, and the losses are the same."""
    short = [*changes, "optimizer.steps=4", "optimizer.warmup_steps=1", "validation.every=2"]
    losses = []
    for on in ("false", "true"):
        way = [f"output={tmp_path / on}", f"activation_checkpointing={on}"]
        folder = train(read([*short, *way]), console=QUIET)
        losses.append([row["loss"] for row in metrics(folder) if "loss" in row])
        assert all("mfu" not in row for row in metrics(folder))  # no GPU
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    configs = [(tmp_path / on / "last" / "config.json").read_text() for on in ("false", "true")]
    assert configs[0] == configs[1]
    for state in sorted((tmp_path / "false" / "state").iterdir())[1:]:
        for file in state.iterdir():
            file.unlink()
        state.rmdir()
    way = [f"output={tmp_path / 'false'}", "activation_checkpointing=true"]
    folder = train(read([*short, *way]), console=QUIET, resume=True)
    assert [row["loss"] for row in metrics(folder) if "loss" in row] == pytest.approx(losses[0])


def test_compiling_without_a_compiler_is_one_line(
    changes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs the C.. compiler no-such-compiler"):
        forward_of([*changes, "compile=true"])


def test_a_line_of_the_log_says_what_share_of_the_peak_a_step_reached(tmp_path: Path) -> None:
    with Monitor(tmp_path, steps=2, console=QUIET, peak_flops=2e9) as monitor:
        for number in range(2):
            monitor.step(number, pairs=4, tokens=9, flops=1e7, loss=1.0)
    row = metrics(tmp_path)[1]
    assert row["mfu"] == pytest.approx(1e7 * row["clips_per_s"] / 4 / 2e9)


def test_large_matrix_products_take_time() -> None:
    """Between what a processor of the last century and one of the next did."""
    assert 1e8 < matrix_peak("cpu", bf16=False, seconds=0) < 1e14
