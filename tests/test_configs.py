"""The recipes that ship: each reads, Flux-CLIP's are the paper's, and each phase trains."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_cli import fluxclip

from fluxclip.model import weights
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.presets import FluxCLIPConfig, preset
from fluxclip.text.encoder import load_encoder
from fluxclip.tokens.budget import GridTable
from fluxclip.training import recipe as recipes
from fluxclip.training.freeze import set_trained
from fluxclip.training.recipe import Recipe

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SIZES = {"small": "s", "base": "b"}

# frames x sides that the paper's ranges and threshold admit
GRIDS = {
    8: (224, 252), 10: (224, 252), 12: (196, 224, 252), 14: (196, 224), 16: (168, 196, 224),
    18: (168, 196), 20: (168, 196), 22: (168,), 24: (168,),
}  # fmt: skip


def start_config(size: str) -> FluxCLIPConfig:
    """That of `fluxclip convert fluxvit --projector 2048`, with a text tower that is installed."""
    return FluxCLIPConfig(video=preset(size), grids=GridTable((8, 224)), dim=512)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, where commands run; of the models they start from, the configs."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    for size, letter in SIZES.items():
        for name in (f"models/fluxvit-{letter}", f"runs/flux-clip-{size}-phase1/best"):
            (tmp_path / name).mkdir(parents=True)
            weights.write_config(start_config(size), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(place: Path, name: str) -> Recipe:
    return recipes.read(place / "configs" / f"{name}.toml")


def test_every_recipe_reads(place: Path) -> None:
    for path in (place / "configs").glob("*.toml"):
        recipe = recipes.read(path)
        again = place / "again.toml"
        again.write_text(recipes.to_toml(recipe))
        assert recipes.read(again) == recipe


@pytest.mark.parametrize("size", SIZES)
def test_flux_clip_s_values_are_the_paper_s(place: Path, size: str) -> None:
    """Tables 16 and 17 of arXiv 2503.14237; an epoch is as many pairs as there are visuals."""
    first, second = (read(place, f"flux-clip-{size}-phase{phase}") for phase in (1, 2))
    for recipe in (first, second):
        assert set(recipe.sampling().admissible) == {(t, s) for t in GRIDS for s in GRIDS[t]}
        assert recipe.augment.crop_area == (0.5, 1.0)
        o = recipe.optimizer
        assert (o.betas, o.weight_decay, o.muon) == ((0.9, 0.98), 0.02, 0)
    videos, *images = (source.batch for source in first.data)
    assert videos == sum(images) == 4096
    assert first.optimizer.lr == 4e-4
    assert first.optimizer.steps == pytest.approx(3 * 25.68e6 / 8192, abs=1)
    assert first.optimizer.warmup_steps == pytest.approx(0.6 * 25.68e6 / 8192, abs=1)
    batch = sum(source.batch for source in second.data)
    assert batch == {"small": 4096, "base": 2048}[size]
    assert (second.optimizer.lr, second.optimizer.warmup_steps) == (2e-5, 0)
    assert second.optimizer.steps == 2.56e6 / batch
    assert first.init.endswith(f"models/fluxvit-{SIZES[size]}")
    assert second.init == str(place / first.output / "best")


# of the official classes, less two of the three poolings, the aligners and the classifiers
@pytest.mark.parametrize(("size", "size_of_tower"), [("small", 25_254_348), ("base", 97_717_836)])
def test_what_flux_clip_trains(place: Path, size: str, size_of_tower: int) -> None:
    """Phase 1 the pooling, projection and temperature, as InternVideo2-CLIP; phase 2 the tower."""
    for phase, wanted in ((1, ["video.pools."]), (2, ["video."])):
        recipe = read(place, f"flux-clip-{size}-phase{phase}")
        config = recipe.model_config()
        text = config.text
        encoder = load_encoder(text.encoder, text.source, max_tokens=text.max_tokens)
        with torch.device("meta"):  # no memory for base
            model = FluxCLIP(config, encoder)
        set_trained(model, recipe.freeze)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        starts = (*wanted, "video_projection.", "log_scale")
        assert trained == {n for n, _ in model.named_parameters() if n.startswith(starts)}
        assert sum(p.numel() for p in model.video.parameters()) == size_of_tower


def test_a_dry_run_lists_the_corpora_that_are_missing(place: Path) -> None:
    save_start(place / "models" / "fluxvit-s", "small")
    done = fluxclip("train", "configs/flux-clip-small-phase1.toml", "--dry-run")
    assert done.returncode == 2
    assert "listed above, not found" in done.stderr and "7 files" in done.stderr
    names = ["webvid-10m", "cc12m", "cc3m", "sbu", "coco", "visual-genome", "validation"]
    assert done.stdout.splitlines()[-7:] == [str(place / "data" / f"{name}.json") for name in names]
    assert "trained: " in done.stdout and "frozen: " in done.stdout
    shutil.rmtree(place / "models")
    done = fluxclip("train", "configs/flux-clip-small-phase1.toml", "--dry-run")
    assert done.returncode == 2
    assert "init = '../models/fluxvit-s': there is no such folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def save_start(folder: Path, size: str) -> None:
    shutil.rmtree(folder)
    weights.save(weights.build(start_config(size)), folder, card="card")


def test_both_phases_train_one_after_the_other(place: Path, emoji: Path) -> None:
    """The shipped files as they are, on a few clips, at a size that a test has time for."""
    save_start(place / "models" / "fluxvit-s", "tiny")
    (place / "data").mkdir()
    for corpus in ("webvid-10m", "internvid-2m", "s-mit", "validation"):
        write_annotations(emoji / "train.json", place / "data" / f"{corpus}.json")
    for corpus in ("cc12m", "cc3m", "sbu", "coco", "visual-genome"):
        write_annotations(emoji / "stills.json", place / "data" / f"{corpus}.json")
    small = [
        "workers=0", "optimizer.steps=2", "validation.every=2",
        "flux.frames=[2,4,2]", "flux.sides=[28,56,28]", "flux.tokens=[4,64]",
        "flux.budgets=[32,16,8]", "data.0.batch=4", "data.1.batch=2", "data.2.batch=2",
    ]  # fmt: skip
    images = [f"data.{i}.batch=1" for i in (3, 4, 5)]
    first = [*small, *images, "flux.grids=[[64,4,56]]", "optimizer.warmup_steps=1"]
    shutil.rmtree(place / "runs")
    for phase, changes in ((1, first), (2, small)):
        name = f"flux-clip-small-phase{phase}"
        sets = [part for change in changes for part in ("--set", change)]
        done = fluxclip("train", f"configs/{name}.toml", *sets)
        assert done.returncode == 0, done.stderr
        log = (place / "runs" / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in log]
        assert [row["step"] for row in rows if "loss" in row] == [0, 1]
    start, middle, end = (
        weights.load(folder).video.state_dict()
        for folder in (
            place / "models" / "fluxvit-s",
            *(place / "runs" / f"flux-clip-small-phase{phase}" / "last" for phase in (1, 2)),
        )
    )
    for name in start:
        assert torch.equal(start[name], middle[name]) == (not name.startswith("pools.")), name
        assert not torch.equal(middle[name], end[name]), name


def write_annotations(source: Path, path: Path, count: int = 8) -> None:
    records = json.loads(source.read_text())[:count]
    for record in records:
        record["video"] = str(source.parent / record["video"])
    path.write_text(json.dumps(records))
