"""What a recipe calls its data: paths from its own folder, other names as they are, to the end."""

import json
from pathlib import Path

import pytest
from small_run import DEMO, QUIET, metrics, read

from fluxclip.training import recipe as recipes
from fluxclip.training.forward import RECORDS_READ, Forward
from fluxclip.training.loop import dataset, train

SYNTHETIC = ["data.0.source=synthetic", "data.0.annotations=40", "data.0.cache_frames=0"]


def test_paths_count_from_the_recipe_and_other_names_stay() -> None:
    names = {
        "set.csv?video=path&caption=text": f"{DEMO.parent}/set.csv?video=path&caption=text",
        "../set.json": f"{DEMO.parent.parent}/set.json",
        "/set.jsonl": "/set.jsonl",
        "hf://datasets/org/name?split=train": "hf://datasets/org/name?split=train",
    }
    for name, wanted in names.items():
        recipe = recipes.read(DEMO, [f"data.0.annotations={json.dumps(name)}"])
        assert recipe.data[0].annotations == wanted
    assert recipes.read(DEMO, SYNTHETIC).data[0].annotations == "40"
    with pytest.raises(ValueError, match="unknown source 'sythetic' .*did you mean 'synthetic'"):
        recipes.read(DEMO, ["data.0.source=sythetic"])


def test_a_run_on_synthetic_pairs_goes_on_with_its_own_only(
    changes: list[str], tmp_path: Path
) -> None:
    short = [*changes, *SYNTHETIC, "validation.every=2", "optimizer.warmup_steps=1"]
    train(read([*short, "optimizer.steps=2"]), console=QUIET)
    assert len([row for row in metrics(tmp_path / "run") if row.get("loss", 0) > 0]) == 2
    other = [*short, "optimizer.steps=2", "data.0.annotations=41"]
    with pytest.raises(ValueError, match="the file of data.0.annotations has changed"):
        train(read(other), resume=True, console=QUIET)


@pytest.mark.parametrize("number", [5000, RECORDS_READ + 1])
def test_captions_of_large_sets_are_not_looked_up(changes: list[str], number: int) -> None:
    """Few distinct captions among many records are; who asks for all names is told."""
    recipe = read([*changes, *SYNTHETIC, f"data.0.annotations={number}", "negatives=step"])
    few = number <= RECORDS_READ
    made = Forward(recipe.build(), dataset(recipe).sources, recipe)
    assert bool(made.rows) is few
    assert made.names == {}
    if not few:
        recipe = read([*changes, *SYNTHETIC, f"data.0.annotations={number}", "negatives=all"])
        with pytest.raises(ValueError, match="at most 200,000 captions, and these have more"):
            Forward(recipe.build(), dataset(recipe).sources, recipe)
