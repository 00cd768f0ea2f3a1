"""From queries to vectors: mixes, a budget of the query, a model that changes meanwhile."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from layout_embedder import LayoutEmbedder

from fluxclip import load_model
from fluxclip.video import read_clip
from retrieval import Collection, Query, export_text_encoder
from retrieval.queries import ServingModel
from retrieval.query_encoder import text_encoder_folder
from retrieval.store import Store


@pytest.fixture
def serving(cats: Collection, embedder: LayoutEmbedder) -> ServingModel:
    return ServingModel(cats._store, embedder)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def test_a_mix_is_the_weighted_sum_of_directions(
    serving: ServingModel, embedder: LayoutEmbedder, clips: list[Path]
) -> None:
    arrow = np.random.default_rng(0).normal(size=embedder.dim)
    mix = [
        Query(video=clips[0]),
        Query("at night", weight=0.7),
        Query("many people", weight=-0.5),
        Query(vector=40 * arrow, weight=2),
    ]
    texts = embedder.embed_text(["at night", "many people"])
    wanted = embedder.embed_video([clips[0]])[0] + 0.7 * texts[0] - 0.5 * texts[1] + 2 * unit(arrow)
    [found] = serving.vectors([mix])
    assert found.dtype == np.float32
    assert found == pytest.approx(unit(wanted), abs=1e-6)
    # the order, and one factor on all weights, change nothing
    directions = [serving.vectors([[replace(query, weight=1)]])[0] for query in mix]
    tripled = [
        Query(vector=direction, weight=3 * query.weight)
        for direction, query in zip(directions[::-1], mix[::-1], strict=True)
    ]
    assert serving.vectors([tripled])[0] == pytest.approx(found, abs=1e-6)


def test_several_mixes_keep_their_order(
    serving: ServingModel, embedder: LayoutEmbedder, clips: list[Path]
) -> None:
    """More texts and more files than go into a batch, in turns."""
    mixes = []
    for i in range(300):
        mixes.append([Query(f"text {i}")])
        if i < 18:
            mixes.append([Query(video=clips[i]), Query(f"text {i}", weight=0.1)])
    together = serving.vectors(mixes)
    assert together.shape == (318, embedder.dim)
    for at in (0, 1, 34, 35, 36, 200, 317):
        assert together[at] == pytest.approx(serving.vectors([mixes[at]])[0], abs=1e-6)
    assert serving.vectors([]).shape == (0, embedder.dim)


def test_a_mix_that_cancels_is_refused(cats: Collection) -> None:
    for mix in (
        [Query("a dog"), Query("a dog", weight=-1)],
        [Query("a dog"), Query("a cat"), Query("a DOG", weight=-1), Query("a cat", weight=-1)],
    ):
        with pytest.raises(ValueError, match="cancel each other: change the weights"):
            cats.search(mix=mix)


def test_bad_queries_and_mixes(cats: Collection, clips: list[Path]) -> None:
    for given in ({}, {"text": "a", "video": clips[0]}, {"image": "a.png", "vector": np.ones(3)}):
        with pytest.raises(ValueError, match="a query is one of a text, video=, image= and vector"):
            Query(**given)  # type: ignore[arg-type]
    for weight in (0, float("nan"), float("inf"), "1", True, None):
        with pytest.raises(ValueError, match="a weight must be a finite number and not 0, got"):
            Query("a", weight=weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the query is empty"):
        cats.search_many(["a dog", " "])
    with pytest.raises(ValueError, match="a mix needs at least one query"):
        cats.search(mix=[])
    with pytest.raises(ValueError, match="a mix is of Query"):
        cats.search(mix=["a dog", "at night"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="search takes one query"):
        cats.search("a dog", mix=[Query("a cat")])


def test_a_query_may_have_a_budget_of_its_own(
    cats: Collection, embedder: LayoutEmbedder, clips: list[Path]
) -> None:
    """The collection's is all tokens, four frames here; the query's gives one."""
    cats.add(clips)
    [hit] = cats.search(video=clips[5], k=1)
    assert hit.score == pytest.approx(1, abs=1e-6)
    one_frame = read_clip(clips[5], num_frames=1, side=32, fit="squash")
    vector = embedder.embed_video([one_frame])[0]
    hits = cats.search(video=clips[5], token_budget=16, k=20)
    assert hits == cats.search(vector=vector, k=20) != cats.search(video=clips[5], k=20)
    for budget in (0, -5, 1.5, True):
        with pytest.raises(ValueError, match="token_budget must be a whole number of tokens, 1 or"):
            cats.search(video=clips[5], token_budget=budget)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token_budget is about a video or image"):
        cats.search("a dog", token_budget=16)


def test_an_open_collection_follows_a_switch_of_model(
    tmp_path: Path, embedder: LayoutEmbedder, clips: list[Path]
) -> None:
    """Another process puts a wider, exported model in its place while this one is open."""
    new_source = "emoji-tiny"
    new = load_model(new_source)
    assert new.dim != embedder.dim
    folder = tmp_path / "c"
    with Collection.create(folder, model=embedder, token_budget=64) as opened:
        opened.add(clips[:8])
        opened.add_texts(["a dancing woman", "a rocket"])
        before = opened.search("a rocket", k=8)
        assert opened.search(video=clips[2], k=1)[0].score == pytest.approx(1, abs=1e-5)

        other = Store(folder)
        settings = {
            "model_source": new_source, "model_name": new.name, "fingerprint": new.fingerprint,
            "dim": new.dim, "token_budget": 36,
        }  # fmt: skip
        space = other.stage_space(settings)
        rows = other.unstaged_segments(100)
        vectors = new.embed_video([row.video for row in rows], token_budget=36)
        other.put_staged([row.id for row in rows], vectors)
        texts = other.unstaged_texts(100)
        other.put_staged_texts([id for id, _ in texts], new.embed_text([t for _, t in texts]))
        export_text_encoder(new, folder / text_encoder_folder(space))
        assert opened.search("a rocket", k=8) == before
        other.switch_space()
        other.drop_old_spaces()
        other.close()

        by_video = opened.search(video=clips[2], k=8)
        assert opened.model.fingerprint == new.fingerprint
        [query] = new.embed_video([clips[2]], token_budget=36)
        order = np.argsort(-(vectors @ query), kind="stable")
        assert [hit.id for hit in by_video] == [rows[i].id for i in order]
        assert by_video[0].score == pytest.approx(1, abs=1e-5)
        assert opened.search(video=clips[2], token_budget=64, k=1)[0].score < 1 - 1e-5
        with Collection.open(folder) as fresh:
            assert opened.search("a rocket", k=8) == fresh.search("a rocket", k=8)
            assert not fresh._serving.is_loaded  # the exported tower answered
        assert opened.search("a rocket", target="text", k=1)[0].metadata == {"text": "a rocket"}
        assert opened.info()["token_budget"] == 36
        assert opened.add(clips[8]).added == 1
        assert opened.search(video=clips[8], k=1)[0].score == pytest.approx(1, abs=1e-5)


class SwitchedMeanwhile(LayoutEmbedder):
    """While it embeds its first text, another process puts other vectors in place."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.calls = 0

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        self.calls += 1
        if self.calls == 1:
            with closing(Store(self.folder)) as other:
                other.stage_space({"token_budget": 16})
                rows = other.unstaged_segments(100)
                vectors = self.embed_video([row.video for row in rows], token_budget=16)
                other.put_staged([row.id for row in rows], vectors)
                other.switch_space()
                other.drop_old_spaces()
        return super().embed_text(texts)


def test_a_switch_while_the_query_is_embedded(cats: Collection, clips: list[Path]) -> None:
    cats.add(clips)
    old = cats.search("a dog", k=20)
    folder = cats._store.folder
    model = SwitchedMeanwhile(folder)
    with Collection.open(folder, model=model) as opened:
        hits = opened.search("a dog", k=20)
    assert model.calls == 2
    # what is open still and what is opened now see the same
    assert hits == cats.search("a dog", k=20) != old
