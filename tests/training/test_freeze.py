"""What `freeze` leaves as it was: by patterns, whole towers, LiT, in runs that save and resume."""

import json
from pathlib import Path

import pytest
import torch
from small_run import QUIET, metrics, read
from torch import Tensor

from fluxclip import load_model
from fluxclip.data.batch import Step
from fluxclip.model import weights
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.text import tokenizer
from fluxclip.text.tokenizer import EncoderSize
from fluxclip.tokens.draws import Draws
from fluxclip.training import checkpoint
from fluxclip.training.engines import plain
from fluxclip.training.forward import Forward
from fluxclip.training.loop import dataset, train
from fluxclip.training.plan import kept_for_backward, plan
from fluxclip.training.recipe import Recipe

SHORT = ["optimizer.steps=3", "optimizer.warmup_steps=1", "validation.every=3"]


def freeze(*patterns: str) -> str:
    return f"freeze={json.dumps(patterns)}"


@pytest.fixture
def own_text(changes: list[str], tmp_path: Path) -> list[str]:
    """The small run with a text tower of its own, which is stored with the model."""
    records = json.loads((tmp_path / "train.json").read_text())
    captions = [caption for record in records for caption in record["caption"]]
    size = EncoderSize(width=32, depth=1, heads=2)
    tokenizer.write(tmp_path / "tokenizer", tokenizer.train(captions, pieces=450), size)
    return [
        *changes, *SHORT, "text.encoder=sentencepiece_transformer", "text.max_tokens=16",
        f"text.source={tmp_path / 'tokenizer'}", "text.weights=stored", "model.drop_path=0.5",
    ]  # fmt: skip


def start_of(changes: list[str]) -> FluxCLIP:
    """The model as the run gets it before its first step."""
    recipe = read(changes)
    torch.manual_seed(recipe.seed)
    return recipe.build()


def is_trained(changes: list[str], *patterns: str) -> dict[str, bool]:
    model = start_of([*changes, freeze(*patterns)])
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_patterns_name_weights_and_the_last_match_counts(own_text: list[str]) -> None:
    assert all(is_trained(own_text).values())
    parts = is_trained(own_text, "video.*", "!video.pools.*", "video.pools.0.q.*", "log_scale")
    for name, trained in parts.items():
        in_pool = name.startswith("video.pools.0.") and not name.startswith("video.pools.0.q.")
        outside = not name.startswith("video.") and name != "log_scale"
        assert trained == (in_pool or outside), name
    assert is_trained(own_text, "!video.pools.*", "video.*") == is_trained(own_text, "video.*")
    first = is_trained(own_text, "video.blocks.[0-2].*")
    assert {name.split(".")[2] for name, own in first.items() if not own} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["video.pool.*"], r"no weight is called 'video.pool.\*'; the nearest are video.pools.\*"),
        (["text_projections.*"], r"the nearest are text_projection.\*"),
        (["!videos.blocks.0.*"], r"no weight is called 'videos.blocks.0.\*'.*video.blocks.0.\*"),
        (["xyz"], r"the parts are log_scale, video.\*, video_projection.\*, text.\*, text_proj"),
        (["*"], "leaves nothing to train"),
        (["*", "!log_scale"], "the temperature alone, which changes no ranking"),
        (["!text.*"], 'referred to .text.weights = "reference".: name less, or train a model'),
        (["*", "!*"], "would train the text tower"),
    ],
)
def test_what_cannot_be_meant_is_one_line_before_any_step(
    changes: list[str], tmp_path: Path, patterns: list[str], message: str
) -> None:
    recipe = read([*changes, freeze(*patterns)])
    for refuse in (train, plan):
        with pytest.raises(ValueError, match=message) as caught:
            refuse(recipe)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_changes_what_is_trained_and_nothing_else(own_text: list[str]) -> None:
    """LiT: the video tower is locked, the text tower learns to speak its language."""
    lit = [*own_text, freeze("video.*")]
    model = start_of(lit)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("video.")}
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = train(read([*lit, "optimizer.weight_decay=0.5"]), console=QUIET)
    after = load_model(folder / "last").model.state_dict()
    assert after.keys() == start.keys()
    for name, tensor in start.items():
        assert torch.equal(after[name], tensor) == (name in frozen), name
    state = checkpoint.states(folder / "state")[-1]
    expected = plain.make(*forward_of(lit)).state()
    names = {name.partition("/") for name in checkpoint.read_tensors(state, expected=expected)}
    assert {name for kind, _, name in names if kind == "parameters"} == {
        f"model.{name}" for name in start
    }
    moments = {name.removeprefix("model.") for kind, _, name in names if kind == "exp_avg"}
    assert moments == start.keys() - frozen
    text = "\n".join(plan(read(lit)).lines)
    count = sum(start[name].numel() for name in frozen) / 1e6
    assert f"frozen: {count:.2f} M parameters (video {count:.2f})" in text
    assert "M parameters (video projection " in text


def forward_of(changes: list[str]) -> tuple[Forward, Recipe]:
    recipe = read(changes)
    model = start_of(changes)
    return Forward(model, dataset(recipe).sources, recipe), recipe


def test_a_frozen_video_tower_keeps_no_graph_and_draws_nothing(own_text: list[str]) -> None:
    lit = [*own_text, freeze("video.*")]
    model = start_of(lit)
    assert model.training and not model.video.training
    frames = torch.randn(6, 2, 56, 56, 3)
    draws = [Draws(seed, torch.arange(6)) for seed in (1, 2)]
    views = [model.encode_video_views(frames, [8], draws=own)[0] for own in draws]
    assert torch.equal(views[0].vector_BD, views[1].vector_BD)
    assert not views[0].pooled_BP.requires_grad and views[0].vector_BD.requires_grad
    trained = start_of(own_text)
    views = [trained.encode_video_views(frames, [8], draws=own)[0] for own in draws]
    assert not torch.equal(views[0].vector_BD, views[1].vector_BD)
    kept = [kept_for_backward(start_of(own), read(own)) for own in (lit, own_text)]
    assert kept[0] < 0.01 * kept[1]
    assert work(lit) == pytest.approx(work(own_text) / 3, rel=0.01)


def work(changes: list[str]) -> float:
    (line,) = [line for line in plan(read(changes)).lines if line.startswith("work: ")]
    return float(line.split()[1])


def test_a_frozen_text_tower_that_is_stored_is_looked_up_and_saved(own_text: list[str]) -> None:
    locked = [*own_text, freeze("text.*"), "negatives=all"]
    forward, _ = forward_of(locked)
    model = forward.model
    assert not model.text.training and len(forward.rows) > 16
    captions = list(forward.rows)[:5]
    wanted = model.text_features(model.tokenize(captions))
    looked_up = forward.table_NW[[forward.rows[caption] for caption in captions]]
    torch.testing.assert_close(looked_up, wanted, rtol=1e-5, atol=1e-5)
    start = {name: tensor.clone() for name, tensor in start_of(locked).state_dict().items()}
    folder = train(read(locked), console=QUIET)
    assert all("named" in row for row in metrics(folder) if "loss" in row)
    after = weights.load(folder / "last").state_dict()
    same = {name for name, tensor in start.items() if torch.equal(after[name], tensor)}
    assert same == {name for name in start if name.startswith("text.")}
    # trained again afterwards, as any other
    on = [change for change in own_text if not change.startswith(("text.", "model."))]
    again = start_of([*on, "model={}", "text={}", f"init={folder / 'last'}"])
    assert again.text.training and all(p.requires_grad for p in again.text.parameters())


def test_a_run_resumes_bit_for_bit_with_its_own_list_only(
    own_text: list[str], tmp_path: Path
) -> None:
    frozen = [*own_text, freeze("video.blocks.[0-3].*", "text.embedding.*"), "validation.every=1"]
    whole = train(read([*frozen, f"output={tmp_path / 'whole'}"]), console=QUIET)
    broken = [*frozen, f"output={tmp_path / 'broken'}"]
    train(read(broken), console=QUIET)
    newest = checkpoint.states(tmp_path / "broken" / "state")[-1]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    with pytest.raises(ValueError, match=r"another recipe: freeze was .*video.blocks.* and is"):
        train(read([*broken, "freeze=[]"]), resume=True, console=QUIET)
    resumed = train(read(broken), resume=True, console=QUIET)
    prints = [load_model(folder / "last").fingerprint for folder in (whole, resumed)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("patterns", [["video.*"], ["video*", "text.*"], ["text*"]])
def test_gradients_of_what_is_left_are_those_of_the_whole_model(
    own_text: list[str], patterns: list[str]
) -> None:
    """Freezing cuts no path to what is trained, in one piece or in three."""
    still = [*own_text, "model.drop_path=0.0"]
    data = dataset(read(still))
    whole = gradients(still, data[0], pieces=1)
    for pieces in (1, 3):
        found = gradients([*still, freeze(*patterns)], data[0], pieces=pieces)
        assert 0 < len(found) < len(whole)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6)


def gradients(changes: list[str], step: Step, *, pieces: int) -> dict[str, Tensor]:
    forward, recipe = forward_of([*changes, f"pieces={pieces}"])
    engine = plain.make(forward, recipe)
    engine.backward(step)
    named = forward.model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}
