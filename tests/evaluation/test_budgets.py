"""evaluate(): real clips through a real embedder, decoded once a grid, refused when broken."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from colour_embedder import ColourEmbedder

from fluxclip import load_model
from fluxclip.evaluation.budgets import evaluate
from fluxclip.evaluation.protocols import RetrievalTask
from fluxclip.evaluation.protocols.annotations import read
from fluxclip.evaluation.ranking import retrieval_ranks
from fluxclip.evaluation.record import Record
from fluxclip.video import Clip, read_clip


def test_hearts_are_found_by_their_colour(record: Record) -> None:
    found = record.results[0].cosine.text_to_video
    assert (found.num_queries, found.num_gallery) == (12, 12)
    assert found.r1 > 60
    assert record.chance.text_to_video.r1 < 10
    assert found.r1_interval.low <= found.r1 <= found.r1_interval.high
    assert found.mrr_interval.low <= found.mrr <= found.mrr_interval.high


def test_scores_are_those_of_the_files_embedded_one_by_one(
    record: Record, model: ColourEmbedder, hearts: RetrievalTask
) -> None:
    texts = model.embed_text(hearts.texts)
    for result in record.results:
        videos = np.concatenate(
            [
                model.embed_video(
                    [read_clip(path, num_frames=result.num_frames, side=result.side, fit="crop")],
                    token_budget=result.token_budget,
                )
                for path in hearts.videos
            ]
        )
        expected = retrieval_ranks(videos, texts, hearts.video_of_text_M)
        assert result.cosine.text_to_video.ranks == expected.text_to_video.mean_Q().tolist()
        assert result.cosine.video_to_text.ranks == expected.video_to_text.mean_Q().tolist()
        assert result.cosine.video_to_text.mrr == expected.video_to_text.mrr


def test_cost_is_that_of_the_grid_and_the_budget(record: Record) -> None:
    rows = [(r.token_budget, r.num_tokens, r.grid_tokens, r.num_frames) for r in record.results]
    assert rows == [(None, 16, 16, 4), (8, 8, 8, 2), (2, 2, 8, 2)]
    assert [r.macs for r in record.results] == [4 * 112 * 112 * 3 + 16, 75264 + 8, 75264 + 2]
    assert all(r.decode_s > 0 and r.embed_s > 0 for r in record.results)
    assert record.results[1].decode_s == record.results[2].decode_s  # one grid, decoded once


def test_record_says_what_was_scored(record: Record, hearts: RetrievalTask) -> None:
    [source] = hearts.sources
    assert record.data.files == {str(source): hashlib.sha256(source.read_bytes()).hexdigest()}
    assert (record.captions, record.data.num_videos, record.data.texts.num_texts) == (
        "first",
        12,
        12,
    )
    assert record.data.name == "hearts"
    assert record.model.fingerprint == ColourEmbedder.fingerprint
    assert {"python", "numpy", "av", "torch", "machine"} <= set(record.environment)
    assert record.results[0].dual_softmax.temperature == 1.0
    assert record.chance.text_to_video.r1 == pytest.approx(100 / 12)


def test_every_caption_is_a_query_and_repeated_ones_are_counted(
    emoji: Path, tmp_path: Path
) -> None:
    items = [
        {"video": str(emoji / "clips" / "2764-fe0f.mp4"), "caption": ["red", "a heart"]},
        {"video": str(emoji / "clips" / "1f499.mp4"), "caption": ["blue", "a heart", "blue"]},
    ]
    (tmp_path / "two.json").write_text(json.dumps(items))
    record = evaluate(ColourEmbedder(), read(tmp_path / "two.json", captions="all"))
    assert (record.data.texts.num_texts, record.data.texts.num_repeated) == (5, 2)
    assert record.results[0].cosine.text_to_video.num_queries == 5
    assert record.results[0].cosine.video_to_text.num_gallery == 5
    assert record.chance.video_to_text.r1 == pytest.approx(100 * (2 / 5 + 3 / 5) / 2)
    assert record.results[0].cosine.video_to_text.r1 == 100


class MixedUpAtTwo(ColourEmbedder):
    """Gives the clips each other's vectors at a budget of 2 tokens."""

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> npt.NDArray[np.float32]:
        vectors = super().embed_video(videos, token_budget=token_budget)
        if token_budget == 2:
            vectors = vectors[::-1].copy()
        return vectors


def test_mrr_of_a_budget_is_compared_with_the_first_query_by_query(hearts: RetrievalTask) -> None:
    record = evaluate(MixedUpAtTwo(), hearts, budgets=[8, 4, 2])
    full, same, worse = (result.cosine.text_to_video for result in record.results)
    assert full.mrr_change is None
    assert same.mrr_change is not None and worse.mrr_change is not None
    assert (same.mrr_change.low, same.mrr_change.mean, same.mrr_change.high) == (0, 0, 0)
    assert worse.mrr_change.mean == pytest.approx(worse.mrr - full.mrr)
    assert worse.mrr_change.low < worse.mrr_change.mean < worse.mrr_change.high < 0


def test_progress_counts_to_the_end(model: ColourEmbedder, hearts: RetrievalTask) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(model, hearts, budgets=[8, 2, 8], on_progress=lambda *step: seen.append(step))
    assert seen == [(12, 24), (24, 24)]


@pytest.mark.parametrize("content", [b"", b"no video at all", None])
def test_a_broken_video_is_left_out_counted_and_named(
    emoji: Path, tmp_path: Path, content: bytes | None
) -> None:
    good = [emoji / "clips" / name for name in ("2764-fe0f.mp4", "1f499.mp4")]
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(good[0].read_bytes()[:2000] if content is None else content)
    items = [
        {"video": str(good[0]), "caption": "red"},
        {"video": "bad.mp4", "caption": ["green", "yellow"]},
        {"video": str(good[1]), "caption": "blue"},
        {"video": "gone.mp4", "caption": "white"},
    ]
    (tmp_path / "set.json").write_text(json.dumps(items))
    record = evaluate(ColourEmbedder(), read(tmp_path / "set.json", captions="all"))
    assert record.data.name == "set (2 of 4 videos)"
    assert record.data.missing == ["gone.mp4"]
    assert list(record.data.broken) == ["bad.mp4"] and "bad.mp4" in record.data.broken["bad.mp4"]
    assert (record.data.num_videos, record.data.texts.num_texts) == (2, 2)
    alone = tmp_path / "good.json"
    alone.write_text(json.dumps([items[0], items[2]]))
    expected = evaluate(ColourEmbedder(), read(alone, captions="all"))
    assert record.results[0].cosine == expected.results[0].cosine
    assert expected.data.name == "good"


def test_a_set_that_cannot_be_read_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "set.json").write_text('[{"video": "bad.mp4", "caption": "red"}]')
    with pytest.raises(ValueError, match=r"cannot score set: none of its 1 .*bad\.mp4") as caught:
        evaluate(ColourEmbedder(), read(tmp_path / "set.json"))
    assert "\n" not in str(caught.value)


class BadVector(ColourEmbedder):
    """Gives one number in place of the vector of the third video."""

    def __init__(self, number: float) -> None:
        self.number = number

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> npt.NDArray[np.float32]:
        vectors = super().embed_video(videos, token_budget=token_budget)
        vectors[2:3] = self.number
        return vectors


@pytest.mark.parametrize(
    ("number", "what"), [(np.nan, "NaN or infinity"), (3.0, "not of unit length")]
)
def test_bad_vector_is_refused_with_the_name_of_the_video(
    hearts: RetrievalTask, number: float, what: str
) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        evaluate(BadVector(number), hearts)
    assert str(hearts.videos[2]) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": []}, "no token budget"),
        ({"budgets": [64, 0]}, "at least 1, got 0"),
        ({"dual_softmax_temperature": 0.0}, "must be > 0, got 0.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    hearts: RetrievalTask, arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(ColourEmbedder(), hearts, **arguments)


def test_a_filter_s_cost_is_that_of_each_clip(hearts: RetrievalTask, tmp_path: Path) -> None:
    model = load_model("emoji-tiny?filter=run_length")
    first = evaluate(model, hearts, budgets=[None, 40], cache=tmp_path)
    again = evaluate(model, hearts, budgets=[None, 40], cache=tmp_path)
    assert first.model.filter == "run_length()"
    clips = {
        result.token_budget: [
            read_clip(path, num_frames=result.num_frames, side=result.side, fit="crop")
            for path in hearts.videos
        ]
        for result in first.results
    }
    for a, b in zip(first.results, again.results, strict=True):
        costs = model.clip_costs(clips[a.token_budget], token_budget=a.token_budget)
        assert a.tokens_of_clips == b.tokens_of_clips == [tokens for tokens, _ in costs]
        assert a.num_tokens == b.num_tokens == round(np.mean(a.tokens_of_clips))
        assert a.macs == b.macs == round(np.mean([macs for _, macs in costs]))
    assert first.results[0].num_tokens < first.results[0].grid_tokens
