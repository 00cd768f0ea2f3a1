"""Ranks against a slow oracle, ties against enumeration, guessing against chance."""

import itertools
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from fluxclip.evaluation import ranking
from fluxclip.evaluation.ranking import (
    Floats,
    Ranks,
    bootstrap_interval,
    chance,
    cosines,
    dual_softmax,
    paired_bootstrap,
    ranks,
    retrieval_ranks,
)

GENERATOR = np.random.default_rng(7)
TEMPERATURES = [1.0, 0.2]


def unit(rows: Floats) -> Floats:
    """Rows scaled to unit length."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def many_to_many(*, tied: bool) -> tuple[Floats, Floats, np.ndarray]:
    """Vectors of 9 videos and 23 texts, one to five a video; `tied`: many of them are equal."""
    video_of_text = np.concatenate([np.arange(9), GENERATOR.integers(9, size=14)])
    videos, texts = GENERATOR.normal(size=(9, 4)), GENERATOR.normal(size=(23, 4))
    if tied:
        videos, texts = np.sign(videos), np.sign(texts)
    return unit(videos), unit(texts), video_of_text


def enumerated(scores: Floats, right: np.ndarray) -> list[int]:
    """First rank of a right item in every order that sorts the scores downwards."""
    groups = [np.flatnonzero(scores == score) for score in sorted(set(scores), reverse=True)]
    orders = itertools.product(*(itertools.permutations(group) for group in groups))
    return [
        1 + next(place for place, item in enumerate(itertools.chain(*order)) if right[item])
        for order in orders
    ]


def test_numbers_are_the_exact_mean_over_all_orders_of_the_ties() -> None:
    for _ in range(60):
        num_items = int(GENERATOR.integers(2, 8))
        scores = GENERATOR.integers(0, 3, size=num_items).astype(float)
        right = GENERATOR.random(num_items) < 0.4
        right[GENERATOR.integers(num_items)] = True
        found = ranks(scores[None], right[None])
        every = enumerated(scores, right)
        assert found.mean_Q()[0] == pytest.approx(float(Fraction(sum(every), len(every))))
        assert found.reciprocal_Q()[0] == pytest.approx(np.mean([1 / rank for rank in every]))
        for k in (1, 2, 5, 10):
            assert found.recall_Q(k)[0] == pytest.approx(np.mean([rank <= k for rank in every]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [None, *TEMPERATURES])
def test_both_directions_match_a_slow_oracle(tied: bool, temperature: float | None) -> None:
    for _ in range(5):
        videos, texts, video_of_text = many_to_many(tied=tied)
        found = retrieval_ranks(
            videos, texts, video_of_text, chunk=4, dual_softmax_temperature=temperature
        )
        for name, query, gallery in [("t2v", texts, videos), ("v2t", videos, texts)]:
            table = [[round(float(q @ g), 6) for g in gallery] for q in query]
            if temperature is not None:
                table = slow_dual_softmax(table, temperature)
            direction = found.text_to_video if name == "t2v" else found.video_to_text
            for i, row in enumerate(table):
                own = [
                    video_of_text[i] == j if name == "t2v" else video_of_text[j] == i
                    for j in range(len(row))
                ]
                best = max(score for score, mine in zip(row, own, strict=True) if mine)
                wrong = [score for score, mine in zip(row, own, strict=True) if not mine]
                close = [score == pytest.approx(best, rel=1e-8, abs=0) for score in wrong]
                assert direction.tied_Q[i] == sum(close)
                assert direction.better_Q[i] == sum(
                    score > best and not same for score, same in zip(wrong, close, strict=True)
                )


@pytest.mark.parametrize("tied", [False, True])
def test_the_best_caption_of_each_video_is_a_gallery_of_videos(tied: bool) -> None:
    for chunk in (None, 3):
        videos, texts, video_of_text = many_to_many(tied=tied)
        every, best = (
            retrieval_ranks(videos, texts, video_of_text, caption_gallery=gallery, chunk=chunk)
            for gallery in ("all", "best")
        )
        for i, video in enumerate(videos):
            of_video = [
                max(
                    round(float(video @ text), 6)
                    for text, j in zip(texts, video_of_text, strict=True)
                    if j == other
                )
                for other in range(len(videos))
            ]
            wrong = of_video[:i] + of_video[i + 1 :]
            assert best.video_to_text.better_Q[i] == sum(score > of_video[i] for score in wrong)
            assert best.video_to_text.tied_Q[i] == sum(score == of_video[i] for score in wrong)
        np.testing.assert_array_equal(every.text_to_video.better_Q, best.text_to_video.better_Q)
        # several captions of one wrong video fill several places
        assert (best.video_to_text.better_Q <= every.video_to_text.better_Q).all()
        first = [r.video_to_text.better_Q + r.video_to_text.tied_Q == 0 for r in (every, best)]
        np.testing.assert_array_equal(*first)


def test_ranks_are_made_again_from_mean_ranks_and_ties() -> None:
    videos, texts, video_of_text = many_to_many(tied=True)
    found = retrieval_ranks(videos, texts, video_of_text).text_to_video
    again = Ranks.from_means(found.mean_Q().tolist(), found.ties())
    for k in (1, 2, 5):
        np.testing.assert_array_equal(again.recall_Q(k), found.recall_Q(k))
    np.testing.assert_array_equal(again.reciprocal_Q(), found.reciprocal_Q())


def slow_dual_softmax(table: list[list[float]], temperature: float) -> list[list[float]]:
    """s * exp(s / t) / sum over the queries of exp(s / t), entry by entry."""
    return [
        [
            score
            * np.exp(score / temperature)
            / sum(np.exp(other[j] / temperature) for other in table)
            for j, score in enumerate(row)
        ]
        for row in table
    ]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dual_softmax_is_a_softmax_over_the_queries(temperature: float) -> None:
    scores = cosines(unit(GENERATOR.normal(size=(6, 3))), unit(GENERATOR.normal(size=(5, 3))))
    found = dual_softmax(scores, temperature=temperature)
    np.testing.assert_allclose(found, slow_dual_softmax(scores.tolist(), temperature), 1e-8)
    np.testing.assert_allclose((found / scores).sum(axis=0), 1, rtol=1e-7)


def test_dual_softmax_survives_a_tiny_temperature() -> None:
    assert np.isfinite(dual_softmax(np.array([[1.0, -1.0], [0.5, 0.2]]), temperature=1e-4)).all()


@pytest.mark.parametrize("temperature", [None, *TEMPERATURES])
def test_chunks_change_nothing(temperature: float | None) -> None:
    videos, texts, video_of_text = many_to_many(tied=True)
    whole, pieces = (
        retrieval_ranks(
            videos, texts, video_of_text, chunk=chunk, dual_softmax_temperature=temperature
        )
        for chunk in (1000, 3)
    )
    for name in ("text_to_video", "video_to_text"):
        one, other = getattr(whole, name), getattr(pieces, name)
        np.testing.assert_array_equal(one.better_Q, other.better_Q)
        np.testing.assert_array_equal(one.tied_Q, other.tied_Q)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_memory_is_that_of_a_block_and_not_of_all_scores(
    temperature: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "_BLOCK", 100_000)
    videos, texts = (unit(GENERATOR.normal(size=(n, 4))) for n in (1000, 20_000))
    tracemalloc.start()
    retrieval_ranks(videos, texts, np.arange(20_000) % 1000, dual_softmax_temperature=temperature)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.2 * 8 * 1000 * 20_000  # one float64 each would be 160 MB


def test_perfect_vectors_score_100() -> None:
    videos = np.eye(12)
    video_of_text = np.repeat(np.arange(12), 3)
    found = retrieval_ranks(videos, videos[video_of_text], video_of_text)
    for direction in (found.text_to_video, found.video_to_text):
        assert [direction.recall(k) for k in (1, 5, 10)] == [100, 100, 100]
        assert (direction.mrr, direction.median_rank, direction.mean_rank) == (100, 1, 1)


@pytest.mark.parametrize("temperature", [None, 1.0])
@pytest.mark.parametrize("dim", [3, 384])
def test_one_vector_for_everything_scores_chance(dim: int, temperature: float | None) -> None:
    same = unit(GENERATOR.normal(size=(1, dim))).astype(np.float32)
    video_of_text = np.repeat(np.arange(50), 3)
    found = retrieval_ranks(
        same.repeat(50, axis=0),
        same.repeat(150, axis=0),
        video_of_text,
        dual_softmax_temperature=temperature,
    )
    assert found.text_to_video.recall(1) == pytest.approx(2)
    assert found.text_to_video.recall(5) == pytest.approx(10)
    assert found.text_to_video.recall(10) == pytest.approx(20)
    assert found.text_to_video.median_rank == found.text_to_video.mean_rank == 25.5
    assert found.text_to_video.mrr == pytest.approx(100 * sum(1 / r for r in range(1, 51)) / 50)
    assert found.video_to_text.recall(1) == pytest.approx(2)  # 3 of 150 texts are right


def test_noise_below_the_precision_of_the_vectors_decides_nothing() -> None:
    texts = unit(GENERATOR.normal(size=(40, 64)))
    videos = unit(np.ones((40, 64)) + 1e-9 * GENERATOR.normal(size=(40, 64)))
    found = retrieval_ranks(videos, texts, np.arange(40))
    assert found.text_to_video.recall(1) == pytest.approx(2.5)


def test_chance_is_what_random_scores_get_on_average() -> None:
    num_right, num_gallery, trials = 3, 20, 20_000
    relevant = np.arange(num_gallery) < num_right
    found = ranks(GENERATOR.random((trials, num_gallery)), np.tile(relevant, (trials, 1)))
    guess = chance([num_right], num_gallery)
    for k in (1, 5, 10):
        assert found.recall(k) == pytest.approx(guess.recall(k), abs=1.5)
    assert found.mrr == pytest.approx(guess.mrr, abs=1.5)
    assert found.mean_rank == pytest.approx(guess.mean_rank, rel=0.02)


def test_captions_of_one_wrong_video_fill_several_places() -> None:
    """Video-to-text ranks the whole caption gallery, not one caption per video."""
    videos = np.eye(2)
    near = unit(np.array([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.9], [0.0, 1.0]]))
    found = retrieval_ranks(videos, near, np.array([1, 1, 1, 0, 1]))
    assert found.video_to_text.mean_Q()[0] == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused_by_row(bad: float) -> None:
    scores = np.zeros((3, 3))
    scores[2, 0] = bad
    with pytest.raises(ValueError, match="similarity row 2"):
        ranks(scores, np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match="the vector of video 2 is not finite"):
        retrieval_ranks(scores, np.eye(3), np.arange(3))
    with pytest.raises(ValueError, match="the vector of text 2 is not finite"):
        retrieval_ranks(np.eye(3), scores, np.arange(3))


def test_query_without_a_right_item_is_refused() -> None:
    with pytest.raises(ValueError, match="query 1 has no right item"):
        ranks(np.zeros((2, 3)), np.array([[1, 0, 0], [0, 0, 0]]))


def test_bootstrap_covers_the_true_mean() -> None:
    covered = 0
    for trial in range(200):
        values = GENERATOR.random(150) < 0.3
        interval = bootstrap_interval(values, num_samples=300, seed=trial)
        assert interval.mean == values.mean()
        covered += interval.low <= 0.3 <= interval.high
    assert 180 <= covered <= 199  # 95 % of 200, give or take


def test_bootstrap_is_repeatable() -> None:
    values = GENERATOR.random(40)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_copies_within_a_group_do_not_narrow_the_interval() -> None:
    values = GENERATOR.random(30)
    alone = bootstrap_interval(values)
    copied = bootstrap_interval(values.repeat(10), group_Q=np.arange(30).repeat(10))
    assert copied.low == pytest.approx(alone.low)
    assert copied.high == pytest.approx(alone.high)


def test_paired_bootstrap_sees_a_small_even_gain() -> None:
    hard = GENERATOR.random(150)
    better = np.clip(hard + 0.02 + 0.01 * GENERATOR.normal(size=150), 0, 2)
    gain = paired_bootstrap(better, hard)
    assert 0 < gain.low < gain.mean < gain.high < 0.04
    same = paired_bootstrap(hard, hard)
    assert (same.low, same.mean, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="the same queries: got 150 and 3 values"):
        paired_bootstrap(hard, hard[:3])


def test_repr_shows_the_size() -> None:
    array = np.array([0, 1, 2])
    assert repr(Ranks(array, array, array + 1)) == "Ranks(3 queries, 2 with ties)"
