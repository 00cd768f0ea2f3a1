"""Recipes: what is read, what is refused and how, and that they can be written and read again."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_run import QUIET, read, small_run

from fluxclip.model import weights
from fluxclip.training import recipe as recipes
from fluxclip.training.loop import train

# those of data that ship; the others: tests/test_configs.py
CONFIGS = [Path(__file__).parents[2] / "configs" / f"{name}.toml" for name in ("demo", "emoji")]
SMALL = """
output = "runs/x"
[flux]
frames = [2, 4, 2]
sides = [28, 56, 28]
tokens = [4, 64]
budgets = [16, 8]
grids = [[64, 4, 56]]
[optimizer]
steps = 10
warmup_steps = 2
[[data]]
annotations = "a.json"
batch = 4
[validation]
annotations = "b.json"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_right(config: Path) -> None:
    recipe = recipes.read(config)
    files = [*(source.annotations for source in recipe.data), recipe.validation.annotations]
    root = config.parents[1].resolve()
    for file in (Path(file).resolve().relative_to(root) for file in files):
        if file.parts[0] == "runs":  # made by scripts that the recipe names
            assert f"scripts/build_{file.parts[1].replace('-', '_')}.py" in config.read_text()
        else:
            assert (root / file).is_file()
    assert not any("test" in Path(file).name for file in files)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_resolved_recipe_reads_as_the_same(config: Path, tmp_path: Path) -> None:
    recipe = recipes.read(config)
    copy = tmp_path / "resolved.toml"
    copy.write_text(recipes.to_toml(recipe))
    assert recipes.read(copy) == recipe


def test_a_filter_and_its_settings_reach_the_tower(path: Path, tmp_path: Path) -> None:
    changes = ["model.filter=run_length", "model.filter_settings.threshold=0.05"]
    recipe = recipes.read(path, [*changes, "model.filter_settings.anchor=last_kept"])
    tower = recipe.video_tower()
    assert tower.filter == "run_length"
    assert tower.filter_settings == {"threshold": 0.05, "anchor": "last_kept"}
    copy = tmp_path / "resolved.toml"
    copy.write_text(recipes.to_toml(recipe))
    assert recipes.read(copy) == recipe


def test_data_paths_count_from_the_recipe_s_folder(path: Path) -> None:
    recipe = recipes.read(path)
    assert recipe.data[0].annotations == str(path.parent / "a.json")
    assert recipe.output == "runs/x"


def test_changes_are_applied_and_typed(path: Path) -> None:
    changes = ["optimizer.lr=3e-4", "data.0.batch=7", "output=runs/other", "flux.budgets=[8]"]
    recipe = recipes.read(path, changes)
    assert recipe.optimizer.lr == 3e-4
    assert recipe.data[0].batch == 7
    assert recipe.output == "runs/other"
    assert recipe.flux.budgets == (8,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.learning_rate=1", "unknown key 'optimizer.learning_rate'"),
        ("optimizer.warmup_step=1", "did you mean 'optimizer.warmup_steps'?"),
        ("flux.budget=[1]", "did you mean 'flux.budgets'?"),
        ("data.0.bach=3", r"did you mean 'data\.0\.batch'\?"),
        ("seeds=1", "did you mean 'seed'?"),
        ("optimizer.steps=many", "optimizer.steps: .*integer.*got 'many'"),
        ("optimizer.steps=2.5", "optimizer.steps: .*integer"),
        ("optimizer.lr=[1]", "optimizer.lr: .*number"),
        ("optimizer.lr=-1", "optimizer.lr: .*greater than 0, got -1"),
        ('optimizer.lr="1e-3"', "optimizer.lr: .*number, got '1e-3'"),
        ("optimizer.lr=nan", "optimizer.lr: "),
        ("optimizer.steps=true", "optimizer.steps: .*integer"),
        ("augment.crop_area=[0.5, 2]", "augment.crop_area.1: .*less than or equal to 1"),
        ("validation.every=0", "validation.every: .*greater than 0"),
        ("flux.grids=[[256, 8, 100]]", "multiples of 14"),
        ("distillation_steps=3", r"distillation_steps needs a teacher in one of the \[\[data\]\]"),
        ("distillation_mix=0.5", "distillation_mix needs distillation_steps: captions would"),
        ("flux.sides=[20, 40, 20]", r"small\.toml: flux\.sides must be multiples of the patch"),
        ("data.0.cache_frames=-1", "data.0.cache_frames: "),
        ("data.batch=4", "data is a list of 1, write its number, as in data.0.batch"),
        ("output.a.b=1", "'output' is no section"),
        ("precision=fp8", "precision: .*'fp32'.*got 'fp8'"),
        ("model.preset=huge", "unknown preset 'huge'"),
        ("flux.budgets=[0]", "flux.budgets must be token counts of 1 or more"),
        ("flux.tokens=[1, 2]", "widen flux.tokens"),
        ("data=[]", r"at least one \[\[data\]\]"),
        ("optimizer.warmup_steps=99", "warmup_steps must be below steps"),
        ("nonsense", "looks like optimizer.lr=1e-4"),
        ("data.x.batch=1", "data is a list of 1, write its number"),
        ("data.9.batch=1", "data is a list of 1, write its number"),
        ("seed.x=1", "is no section"),
    ],
)
def test_mistakes_are_one_line_that_names_them(path: Path, change: str, message: str) -> None:
    if change == "seed.x=1":
        path.write_text("seed = 1\n" + SMALL)
    with pytest.raises(ValueError, match=message) as error:
        recipes.read(path, [change])
    assert "\n" not in str(error.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe .*gone\.toml"):
        recipes.read(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(ValueError, match=r"bad\.toml is no TOML: .*line 1"):
        recipes.read(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ValueError, match="missing key 'output'"):
        recipes.read(tmp_path / "empty.toml")


def test_the_shipped_recipes_are_right_whatever_files_are_there() -> None:
    for path in CONFIGS:
        recipe = recipes.read(path)
        assert Path(recipe.data[0].annotations).is_file()
        recipe.model_config()


def test_projectors_are_one_for_all_budgets_or_one_for_each(path: Path) -> None:
    assert recipes.read(path).video_tower().projector_budgets == ()
    each = recipes.read(path, ["model.projectors=per_budget", "flux.budgets=[8, 16, 8]"])
    assert each.model_config().video.projector_budgets == (16, 8)
    with pytest.raises(ValueError, match="model.projectors: .*'per_budget', got 'each'"):
        recipes.read(path, ["model.projectors=each"])


def test_a_view_trains_the_projector_of_its_budget_alone(path: Path) -> None:
    recipe = recipes.read(path, ["model.projectors=per_budget"])
    torch.manual_seed(0)
    model = weights.build(recipe.model_config()).train()
    frames = torch.randn(3, 4, 56, 56, 3)
    # a picture of four tokens has one view, nearer to the smaller budget
    for clips, projectors in ((frames, [0, 1]), (frames[:, :1, :28, :28], [1, 1])):
        views = model.encode_video_views(clips, [16, 8])
        for own, view in zip(projectors, views, strict=True):
            model.zero_grad()
            view.vector_BD[:, 0].sum().backward(retain_graph=True)
            got = [
                any(p.grad is not None and bool(p.grad.any()) for p in pool.parameters())
                for pool in model.video.pools
            ]
            assert got == [own == 0, own == 1]
    assert model.video.pools[0] is not model.video.pools[1]


def test_a_run_of_an_older_version_may_be_resumed(tmp_path: Path, emoji: Path) -> None:
    """Its recipe.toml lacks the fields that came later: they have their defaults."""
    changes = [
        *small_run(tmp_path, emoji), "optimizer.steps=2", "optimizer.warmup_steps=1",
        "flux.budgets=[8]",
    ]  # fmt: skip
    said = io.StringIO()
    run = train(read(changes), console=Console(file=said, soft_wrap=True))
    # 2 and 4 frames of 28 and 56 pixels
    grids = (
        "2 x 28 px (8 tokens), 2 x 56 px (32 tokens), 4 x 28 px (16 tokens), 4 x 56 px (64 tokens)"
    )
    assert f"grids: {grids}; budgets 8\n" in said.getvalue()
    written = (run / "recipe.toml").read_text()
    older = [line for line in written.splitlines() if not line.startswith("projectors")]
    assert len(older) == len(written.splitlines()) - 1
    (run / "recipe.toml").write_text("\n".join(older))
    assert train(read(changes), resume=True, console=QUIET) == run
    with pytest.raises(ValueError, match="model.projectors was 'shared' and is 'per_budget'"):
        train(read([*changes, "model.projectors=per_budget"]), resume=True, console=QUIET)
