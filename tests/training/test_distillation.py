"""Learning from a teacher: where the kept tokens lie, in a run that resumes exactly."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_run import QUIET, metrics, read
from torch import Tensor

from fluxclip.embedder import load_model
from fluxclip.model import weights
from fluxclip.model.fluxclip import View
from fluxclip.tokens.selection import take
from fluxclip.training.distillation import Distillation
from fluxclip.training.forward import Forward
from fluxclip.training.loop import dataset, train


def view(tokens_BKW: Tensor, pooled_BP: Tensor, score_B1L: Tensor, budget: int) -> View:
    selection = take(score_B1L, budget=budget)
    kept = tokens_BKW.flatten(0, 1)[selection.cells(tokens_BKW.shape[1])]
    return View(pooled_BP, pooled_BP, kept, selection)


def test_each_kept_token_is_compared_with_the_teacher_at_its_own_place() -> None:
    torch.manual_seed(0)
    heads = Distillation(token_width=6, pooled_width=5, channels=6)
    # heads that pass on what they get, so that the distance can be foretold
    heads.token_head = torch.nn.Identity()  # type: ignore[assignment]
    heads.pooled_head = torch.nn.Linear(6, 6)
    torch.nn.init.eye_(heads.pooled_head.weight)
    torch.nn.init.zeros_(heads.pooled_head.bias)
    teacher_BLC = torch.randn(3, 10, 6)
    mean_BC = teacher_BLC.mean(1)
    same = view(teacher_BLC, mean_BC, torch.randn(3, 1, 10), 4)
    assert heads([same], teacher_BLC).abs().max() < 1e-5
    opposite = view(-teacher_BLC, -mean_BC, torch.randn(3, 1, 10), 4)
    torch.testing.assert_close(heads([opposite], teacher_BLC), torch.full((3,), 4.0))
    torch.testing.assert_close(heads([same, opposite], teacher_BLC), torch.full((3,), 2.0))
    shifted = view(teacher_BLC.roll(1, dims=1), mean_BC, torch.randn(3, 1, 10), 4)
    assert heads([shifted], teacher_BLC).min() > 0.1


@pytest.fixture
def taught(changes: list[str], tmp_path: Path) -> list[str]:
    """The small run with a teacher of random features, to be learned by heart."""
    for number, name in enumerate(("train", "stills")):
        records = json.loads((tmp_path / f"{name}.json").read_text())
        torch.manual_seed(number)
        features = torch.randn(len(records), 1 + number, 4, 4, 6).half()
        names = [Path(record["video"]).name for record in records]
        save_file(
            {"features": features}, tmp_path / f"{name}.safetensors",
            metadata={"videos": json.dumps(names)},
        )  # fmt: skip
        changes = [*changes, f"data.{number}.teacher={tmp_path / name}.safetensors"]
    return [*changes, "negatives=all", "optimizer.muon=3", 'freeze=["text_projection.*"]']


def test_a_run_learns_from_its_teacher_and_leaves_the_heads_behind(
    taught: list[str], tmp_path: Path
) -> None:
    folder = train(read([*taught, "optimizer.lr=2e-3"]), console=QUIET)
    steps = [row for row in metrics(folder) if "distance" in row]
    early, late = (sum(r["distance"] for r in part) for part in (steps[:5], steps[-5:]))
    assert late < 0.97 * early
    assert steps[-1]["named"] < steps[0]["named"]
    model = load_model(folder / "last").model
    assert not [name for name in model.state_dict() if "head" in name]
    start = weights.build(read(taught).model_config())
    text, bias = model.text_projection.weight, model.text_projection.bias
    torch.testing.assert_close(text @ text.T, torch.eye(len(text)), atol=5e-3, rtol=0)
    assert not bias.any() and start.text_projection.weight.shape == text.shape


def test_a_run_with_teacher_and_muon_resumes_bit_for_bit(taught: list[str], tmp_path: Path) -> None:
    short = [*taught, "optimizer.steps=6", "model.drop_path=0.2", "validation.every=3"]
    whole = train(read([*short, f"output={tmp_path / 'whole'}"]), console=QUIET)
    broken = read([*short, f"output={tmp_path / 'broken'}"])
    train(broken, console=QUIET)
    newest = max((tmp_path / "broken" / "state").iterdir(), key=lambda path: path.name)
    assert newest.name == "step-6"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    resumed = train(broken, resume=True, console=QUIET)
    prints = [load_model(folder / "last").fingerprint for folder in (whole, resumed)]
    assert prints[0] == prints[1]


def forward_of(changes: list[str]) -> tuple[Forward, Any]:
    recipe = read(changes)
    data = dataset(recipe)
    return Forward(weights.build(recipe.model_config()), data.sources, recipe), data[0]


def test_a_step_without_a_teacher_among_sources_with_one_still_counts(taught: list[str]) -> None:
    forward, step = forward_of(taught)
    assert all(batch.teacher_BLC is not None for batch in step.batches)
    bare = tuple(replace(batch, teacher_BLC=None) for batch in step.batches)
    _, parts = forward(replace(step, batches=bare))
    assert parts["distance"] == 0.0


def test_a_step_in_bf16_learns_from_its_teacher_too(taught: list[str]) -> None:
    """As on a GPU: the losses, with the heads, are in fp32 and what comes to them is not."""
    forward, step = forward_of(taught)
    _, exact = forward(step)
    forward.bf16 = True
    loss, parts = forward(step)
    assert float(parts["distance"]) == pytest.approx(float(exact["distance"]), abs=0.05)
    loss.backward()
    assert forward.distillation is not None
    gradients = [p.grad for p in forward.distillation.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_the_first_steps_learn_from_the_teacher_alone(taught: list[str]) -> None:
    forward, step = forward_of([*taught, "distillation_steps=1"])
    later = replace(step, number=1)
    moved = []
    for each in (step, later):
        forward.zero_grad()
        forward(each)[0].backward()
        head = forward.model.video_projection[1].weight.grad
        trunk = forward.model.video.blocks[0].attn.qkv.weight.grad
        assert head is not None and trunk is not None and trunk.abs().sum() > 0
        moved.append(bool(head.abs().sum() > 0))
    assert moved == [False, True]


def test_boxes_are_mixed_only_while_the_teacher_alone_is_learned_from(taught: list[str]) -> None:
    mixing = [*taught, "distillation_steps=2", "distillation_mix=1.0"]
    plain, boxes = (dataset(read(changes)) for changes in (taught, mixing))
    for number in range(4):
        pairs = zip(plain[number].batches, boxes[number].batches, strict=True)
        same = [torch.equal(a.frames_BTHWC, b.frames_BTHWC) for a, b in pairs]
        assert same == [number >= 2] * len(same)
    assert torch.equal(boxes[1].batches[0].frames_BTHWC, boxes[1].batches[0].frames_BTHWC)


def test_teachers_of_other_widths_and_a_trained_text_tower_are_refused(
    taught: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r'negatives = "all" needs text\.weights = "reference"'):
        forward_of([*taught, "text.weights=stored"])
    names = [Path(r["video"]).name for r in json.loads((tmp_path / "stills.json").read_text())]
    save_file(
        {"features": torch.zeros(len(names), 1, 4, 4, 7)}, tmp_path / "stills.safetensors",
        metadata={"videos": json.dumps(names)},
    )  # fmt: skip
    with pytest.raises(ValueError, match="equally many channels"):
        forward_of(taught)
