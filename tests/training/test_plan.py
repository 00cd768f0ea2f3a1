"""Dry runs: what is printed is what a run does, and every missing file is named."""

import json
from pathlib import Path

import pytest
from small_run import QUIET, read

from fluxclip.data.shards import write
from fluxclip.training.forward import Forward
from fluxclip.training.loop import dataset, train
from fluxclip.training.plan import kept_for_backward, plan


def test_a_plan_says_what_the_run_does(changes: list[str], tmp_path: Path) -> None:
    recipe = read([*changes, "optimizer.steps=2", "optimizer.warmup_steps=1"])
    found = plan(recipe)
    text = "\n".join(found.lines)
    assert found.missing == []
    assert not (tmp_path / "run").exists()
    model = recipe.build()
    trained = sum(
        p.numel() for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith("text.")
    )  # fmt: skip
    assert f"trained: {trained / 1e6:.2f} M parameters (video " in text
    frozen = sum(p.numel() for p in model.text.parameters()) / 1e6
    assert f"frozen: {frozen:.2f} M parameters (text {frozen:.2f})" in text
    assert "data: train.json, 16 records, 8 a step, 1.0 epochs" in text
    assert "steps: 2 of 12 pairs, 24 in all" in text
    # 8 clips of 8 to 64 tokens and 4 stills of 4 to 16, at budgets 32 and 8
    assert "tokens: 80 to 416 a step into the blocks" in text
    data = dataset(recipe)
    forward = Forward(model, data.sources, recipe)
    counts = {forward.encode(data[number]).num_tokens for number in range(12)}
    assert (min(counts), max(counts)) == (80, 416)
    card = (train(recipe, console=QUIET) / "last" / "README.md").read_text()
    assert f"{trained / 1e6:.2f} M trained" in card


def test_what_a_clip_keeps_is_what_autograd_holds(changes: list[str]) -> None:
    """Twice the budget, about twice the bytes; and no less than the blocks' inputs."""
    small, large = (
        kept_for_backward(recipe.build(), recipe)
        for recipe in (read([*changes, f"flux.budgets=[{k}]"]) for k in (16, 32))
    )
    width, depth = 192, 6
    assert large > 4 * 32 * width * depth * 4
    assert 1.6 < large / small < 2.1


def test_every_missing_file_is_listed(changes: list[str], tmp_path: Path) -> None:
    records = json.loads((tmp_path / "train.json").read_text())
    gone = [tmp_path / f"gone{i}.mp4" for i in range(5)]
    for record, path in zip(records, gone, strict=False):
        record["video"] = str(path)
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "val.json").unlink()
    found = plan(read([*changes, f"data.1.teacher={tmp_path / 'teacher.safetensors'}"]))
    assert set(found.missing) == {
        *gone, tmp_path / "val.json", tmp_path / "teacher.safetensors"
    }  # fmt: skip
    assert any(line.startswith("trained: ") for line in found.lines)


def test_of_shards_the_missing_ones_are_listed(changes: list[str], tmp_path: Path) -> None:
    """And not the pairs in them, of which there may be thousands."""
    write(str(tmp_path / "train.json"), tmp_path / "shards", copy=True, shard_mb=0.1)
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    assert 3 <= len(shards) < 16
    for gone in shards[1:]:
        gone.unlink()
    named = ["data.0.source=webdataset", f"data.0.annotations={tmp_path / 'shards'}"]
    assert plan(read([*changes, *named])).missing == shards[1:]


def test_wrong_files_are_an_error_as_in_a_run(changes: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ValueError, match="is an empty list"):
        plan(read(changes))


def test_of_many_records_some_are_looked_at(changes: list[str]) -> None:
    """A source that is no file, and has more records than can be walked at every start."""
    named = ["data.0.source=synthetic", "data.0.annotations=3000000?stills=0.25&side=64"]
    text = "\n".join(plan(read([*changes, *named, "data.0.cache_frames=0"])).lines)
    assert "data: 3000000, 3,000,000 records, 8 a step, 0.0 epochs" in text
    assert "; missing files and stills by 10,000 of them" in text
