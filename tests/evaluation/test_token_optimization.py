"""Token Optimization: what is chosen is what a plain loop over all grids would choose."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from colour_embedder import ColourEmbedder

from fluxclip import Embedder, load_model
from fluxclip.evaluation import token_optimization
from fluxclip.evaluation.protocols import RetrievalTask
from fluxclip.evaluation.protocols.annotations import read
from fluxclip.evaluation.ranking import retrieval_ranks
from fluxclip.evaluation.token_optimization import optimize, validation_loss
from fluxclip.training.objectives import contrastive
from fluxclip.video import Clip

CANDIDATES = {18: [(2, 42), (2, 56), (4, 84)], 9: [(2, 42), (1, 56)]}


@pytest.fixture(scope="module")
def eight(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> RetrievalTask:
    """Eight clips of the validation set."""
    records = json.loads((emoji / "val.json").read_text())[:8]
    items = [{"video": str(emoji / r["video"]), "caption": r["caption"]} for r in records]
    path = tmp_path_factory.mktemp("eight") / "eight.json"
    path.write_text(json.dumps(items))
    return read(path)


@pytest.fixture(scope="module")
def tiny() -> Embedder:
    return load_model("emoji-tiny", device="cpu")


def unit(*shape: int, seed: int) -> npt.NDArray[np.float32]:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    unit_vectors: npt.NDArray[np.float32] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit_vectors


class Colours(ColourEmbedder):
    """Takes the grid that it is given."""

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> npt.NDArray[np.float32]:  # fmt: skip
        return super().embed_video(videos, token_budget=token_budget)


class Blind(Colours):
    """Sees the same in every clip."""

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> npt.NDArray[np.float32]:  # fmt: skip
        return np.repeat(self.embed_text(["red"]), len(videos), axis=0)


def test_the_chosen_grids_are_those_of_a_plain_loop(tiny: Embedder, eight: RetrievalTask) -> None:
    seen: list[tuple[int, int]] = []
    found = optimize(tiny, eight, CANDIDATES, on_progress=lambda *step: seen.append(step))
    texts = torch.from_numpy(tiny.embed_text(eight.texts))
    trials = {(t.token_budget, t.num_frames, t.side): t for t in found.trials}
    assert len(trials) == len(found.trials) == 5
    for budget, grids in CANDIDATES.items():
        losses = {}
        for grid in grids:
            vectors = tiny.embed_video(eight.videos, token_budget=budget, grid=grid)
            logits = tiny.logit_scale * torch.from_numpy(vectors) @ texts.T
            own = torch.arange(len(logits))
            both = [torch.nn.functional.cross_entropy(x, own) for x in (logits, logits.T)]
            losses[grid] = float(sum(both)) / 2
            trial = trials[budget, *grid]
            assert trial.loss == pytest.approx(losses[grid], abs=1e-4)
            ranks = retrieval_ranks(vectors, texts.numpy(), eight.video_of_text_M)
            assert trial.mrr == pytest.approx(
                (ranks.text_to_video.mrr + ranks.video_to_text.mrr) / 2
            )
            assert trial.grid_tokens == tiny.num_tokens(*grid)
            assert trial.macs == tiny.macs(*grid, budget)
        assert (budget, *min(losses, key=lambda grid: losses[grid])) in found.rows
    assert [row[0] for row in found.rows] == [18, 9]
    assert seen[-1] == (40, 40) and sorted(seen) == seen
    assert found.files == {
        "eight.json": hashlib.sha256(eight.sources[0].read_bytes()).hexdigest()
    }  # fmt: skip
    assert (found.num_videos, found.fingerprint) == (8, tiny.fingerprint)


@pytest.mark.parametrize("names", [list("abcdef"), list("abcbab")])
def test_the_loss_is_that_of_training_over_the_whole_set(names: list[str]) -> None:
    videos, texts = unit(6, 16, seed=0), unit(6, 16, seed=1)
    right = np.array([[a == b for b in names] for a in names])
    labels_BK = torch.tensor([[ord(name)] for name in names])
    vectors = [torch.from_numpy(videos)], torch.from_numpy(texts), torch.tensor(14.0)
    expected, _ = contrastive.make()(*vectors, labels_BK, align=0.0, negatives="local")
    assert validation_loss(videos, texts, right, 14.0) == pytest.approx(expected.item(), abs=1e-5)


def test_with_several_texts_per_video_guessing_has_the_loss_of_guessing() -> None:
    same = np.repeat(unit(1, 8, seed=0), 10, axis=0)
    right = np.arange(3)[:, None] == np.arange(9) // 3
    loss = validation_loss(same[:3], same[:9], right, 20.0)
    assert loss == pytest.approx((np.log(3) + np.log(9)) / 2)


def test_equal_losses_choose_the_cheaper_grid(hearts: RetrievalTask) -> None:
    found = optimize(Blind(), hearts, {8: [(4, 112), (2, 112), (8, 56)], 2: [(4, 112), (2, 56)]})
    assert len({round(trial.loss, 6) for trial in found.trials}) == 1
    # 75,264 pixels twice: fewer frames are cheaper to decode
    assert found.rows == [(8, 2, 112), (2, 2, 56)]


def test_what_is_written_is_what_was_found(hearts: RetrievalTask, tmp_path: Path) -> None:
    found = optimize(Colours(), hearts, {8: [(2, 112), (4, 112)]})
    token_optimization.save(found, tmp_path)
    [path] = tmp_path.iterdir()
    assert path.name == token_optimization.FILE
    text = path.read_text()
    assert token_optimization.TokenOptimization.model_validate_json(text) == found
    assert str(tmp_path.parent) not in text


def test_mistakes_are_named(hearts: RetrievalTask, emoji: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        optimize(Colours(), hearts, {0: [(2, 112)]})
    with pytest.raises(ValueError, match="no grid to try for a budget of 8 tokens"):
        optimize(Colours(), hearts, {8: []})
    with pytest.raises(ValueError, match="at least one"):
        optimize(Colours(), hearts, {})
    heart = {"video": str(emoji / "clips" / "1f499.mp4"), "caption": "blue heart"}
    (tmp_path / "broken.mp4").write_text("no video")
    for name, kind, message in (
        ("gone.mp4", FileNotFoundError, "1 of 2 video files not found, the first: .*gone.mp4"),
        ("broken.mp4", ValueError, "1 of 2 videos cannot be read.*broken.mp4"),
    ):
        path = tmp_path / "two.json"
        path.write_text(json.dumps([heart, {"video": name, "caption": "no heart"}]))
        with pytest.raises(kind, match=message):
            optimize(Colours(), read(path), {8: [(2, 112)]})
