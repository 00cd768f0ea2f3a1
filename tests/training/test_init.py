"""Runs that start from a model: any anatomy, any tower settings; what such a recipe may not say."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import QUIET, metrics, read
from typer.testing import CliRunner

from fluxclip import load_model
from fluxclip.cli import app
from fluxclip.model import weights
from fluxclip.model.presets import FluxCLIPConfig, preset
from fluxclip.tokens.budget import GridTable
from fluxclip.training import recipe as recipes
from fluxclip.training.loop import train

SHORT = ["optimizer.steps=3", "optimizer.warmup_steps=1", "validation.every=3", "flux.grids=[]"]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model folder as `fluxclip convert open-clip` writes them: no preset has its parts."""
    video = dataclasses.replace(preset("tiny", depth=2), anatomy="clip", pooled=192)
    torch.manual_seed(0)
    model = weights.build(FluxCLIPConfig(video=video, grids=GridTable((4, 56)), dim=48))
    weights.save(model, tmp_path / "foreign", card="card")
    return tmp_path / "foreign"


@pytest.fixture
def from_model(changes: list[str]) -> list[str]:
    """The small run without what the demo's recipe says of a fresh model."""
    return [*changes, *SHORT, "model={}", "text={}"]


def test_a_run_starts_from_the_weights_and_learns(from_model: list[str], foreign: Path) -> None:
    recipe = read([*from_model, f"init={foreign}", "model.drop_path=0.1"])
    stored = weights.load(foreign)
    start = recipe.build()
    assert start.training
    assert start.config.video == dataclasses.replace(stored.config.video, drop_path=0.1)
    assert start.config.grids == stored.config.grids
    for name, tensor in stored.state_dict().items():
        assert torch.equal(start.state_dict()[name], tensor), name
    folder = train(recipe, console=QUIET)
    assert np.isfinite([row["loss"] for row in metrics(folder) if "loss" in row]).all()
    trained = load_model(folder / "last").model.state_dict()
    same = [
        name
        for name, tensor in weights.own_state(stored).items()
        if torch.equal(trained[name], tensor)
    ]
    assert same == []
    assert f"started from `{foreign}`" in (folder / "last" / "README.md").read_text()
    assert recipes.read(folder / "recipe.toml") == recipe


def test_the_model_s_tower_may_be_set_and_its_grids_replaced(from_model: list[str]) -> None:
    init = "init=emoji-tiny?filter=run_length,threshold=0.05,pool_by_length=true"
    recipe = read([*from_model, init, "flux.grids=[[16,4,56]]"])
    video = recipe.build().config.video
    assert (video.filter, video.filter_settings) == ("run_length", {"threshold": 0.05})
    assert video.pool_by_length
    assert recipe.model_config().grids == GridTable((4, 56), ((16, 4, 56),))


def test_a_folder_counts_from_the_recipe_s(tmp_path: Path, foreign: Path) -> None:
    text = f"""
    output = "{tmp_path / "run"}"
    init = "../foreign?scorer=uniform"
    flux = {{frames = [2, 4, 2], sides = [28, 56, 28], tokens = [4, 64], budgets = [16]}}
    optimizer = {{steps = 3, warmup_steps = 1}}
    data = [{{annotations = "a.json", batch = 4}}]
    validation = {{annotations = "b.json"}}
    """
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "mine.toml"
    path.write_text(text)
    recipe = recipes.read(path)
    assert recipe.init == f"{foreign}?scorer=uniform"
    assert recipe.video_tower().scorer == "uniform"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["init=emoji-tiny", "model.dim=64"], "leave out model.dim: with init, the model emoji-ti"),
        (["init=emoji-tiny", "text.max_tokens=8"], r"leave out \[text\]: with init"),
        (["init=no-such-model"], "unknown model 'no-such-model'"),
        (["init=open_clip:ViT-B-32/openai"], "weights of open_clip, not a model folder"),
        (["init=emoji-tiny?depth"], "what follows the . of a model is key=value, got 'depth'"),
        (["init=emoji-tiny?filter=x"], "unknown filter 'x'"),
        (["init=emoji-tiny", "flux.sides=[20,40,20]"], "14"),
        ([], "flux.grids needs at least one row"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    from_model: list[str], wrong: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(read([*from_model, *wrong]), console=QUIET)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_command_takes_a_folder_of_where_it_runs(
    from_model: list[str], foreign: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "elsewhere.toml"
    path.write_text(recipes.to_toml(read([*from_model, "init=emoji-tiny"])))
    sets = [part for key in ("output=other",) for part in ("--set", key)]
    done = CliRunner().invoke(app, ["train", str(path), "--init", "foreign", *sets])
    assert done.exit_code == 0, done.output
    assert recipes.read(tmp_path / "other" / "recipe.toml").init == str(foreign)
