"""Ranks, recall and mean reciprocal rank for many-to-many pairs, in NumPy.

Shapes: Q queries, G gallery items, N videos, M texts, D width.

Ties. A right item that shares its score with wrong ones has no rank of its own. Every number here
is the exact expectation over all orders of the tied items: R@k counts the probability that a right
item comes among the first k, MRR the expected 1/rank, and the rank itself is the mean one. It is
deterministic, and a model that gives everything the same score gets precisely what guessing gets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.floating]

# What a video is searched in: "all" texts, where the best of its own counts (`itm_eval` of UMT and
# InternVideo2), or the "best" text of each video, one per video (CLIP4Clip). R@1 is the same, R@5
# and R@10 are higher with "best".
CaptionGallery = Literal["all", "best"]

# Scores are made in blocks of about this many, whatever the size of the gallery.
_BLOCK = 2**22

# Cosines equal to this many decimals are ties: float32 vectors carry no more, and a collapsed
# model must not be ranked by rounding noise.
COSINE_DECIMALS = 6


@dataclass(frozen=True)
class Ranks:
    """Where the best right item of each query stands; all arrays int64 of shape (Q,).

    `better_Q` wrong items score higher than the best right one, `tied_Q` wrong items score the
    same, and `right_Q` right items share that best score (at least 1).
    """

    better_Q: Ints
    tied_Q: Ints
    right_Q: Ints

    @classmethod
    def from_means(
        cls, mean_Q: Sequence[float], ties: Mapping[int, tuple[int, int, int]]
    ) -> "Ranks":
        """What `mean_Q` and `ties` of some ranks were made of."""
        better_Q = np.array([int(rank) - 1 for rank in mean_Q], dtype=np.int64)
        tied_Q, right_Q = np.zeros_like(better_Q), np.ones_like(better_Q)
        for query, counts in ties.items():
            better_Q[query], tied_Q[query], right_Q[query] = counts
        return cls(better_Q=better_Q, tied_Q=tied_Q, right_Q=right_Q)

    def __len__(self) -> int:
        return len(self.better_Q)

    def __repr__(self) -> str:
        return f"Ranks({len(self)} queries, {int((self.tied_Q > 0).sum())} with ties)"

    def mean_Q(self) -> Floats:
        """Mean rank per query, from 1, over all orders of its ties."""
        return 1 + self.better_Q + self.tied_Q / (self.right_Q + 1)

    def ties(self) -> dict[int, tuple[int, int, int]]:
        """(better, tied, right) of the queries that are tied with wrong items, by their place."""
        return {
            int(query): (
                int(self.better_Q[query]), int(self.tied_Q[query]), int(self.right_Q[query])
            )
            for query in np.flatnonzero(self.tied_Q)
        }  # fmt: skip

    def recall_Q(self, k: int) -> Floats:
        """Probability per query, 0-1, that a right item is among the first k; 0 or 1 if no ties."""
        places_Q = k - self.better_Q  # places that the tied items have among the first k
        all_wrong_Q = np.ones(len(self))
        for place in range(k):
            # The next place goes to a wrong item, given that all before it did.
            left_Q = np.maximum(self.tied_Q - place, 0)
            chance_Q = left_Q / np.maximum(left_Q + self.right_Q, 1)
            all_wrong_Q *= np.where(place < places_Q, chance_Q, 1.0)
        return 1 - all_wrong_Q

    def reciprocal_Q(self) -> Floats:
        """Expected 1/rank per query, 0-1, over all orders of its ties."""
        kinds, kind_of_Q = np.unique(
            np.stack([self.better_Q, self.tied_Q, self.right_Q]), axis=1, return_inverse=True
        )
        values = np.array([_expected_reciprocal(*map(int, kind)) for kind in kinds.T])
        return values[kind_of_Q.reshape(-1)]

    def recall(self, k: int) -> float:
        """R@k in percent."""
        return 100 * float(self.recall_Q(k).mean())

    @property
    def mrr(self) -> float:
        """Mean reciprocal rank, times 100."""
        return 100 * float(self.reciprocal_Q().mean())

    @property
    def median_rank(self) -> float:
        """Median over the queries of the mean rank, from 1."""
        return float(np.median(self.mean_Q()))

    @property
    def mean_rank(self) -> float:
        """Mean over the queries of the mean rank, from 1."""
        return float(self.mean_Q().mean())


@dataclass(frozen=True)
class RetrievalRanks:
    """Both directions of one retrieval task: `found.text_to_video.recall(1)`, `.mrr`, ..."""

    text_to_video: Ranks
    video_to_text: Ranks


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def ranks(similarity_QG: npt.ArrayLike, relevant_QG: npt.ArrayLike) -> Ranks:
    """Ranks of the best right item of every query among all wrong ones.

    `relevant_QG` is bool and marks the right items, at least one per query. With several, the
    best counts, as in the evaluation of UMT and InternVideo2. Raises ValueError that names the
    row if a score is not finite or a query has no right item.
    """
    scores_QG = np.asarray(similarity_QG)
    right_QG = np.asarray(relevant_QG, dtype=bool)
    bad = first_not_finite(scores_QG)
    if bad is not None:
        raise ValueError(f"similarity row {bad} has a score that is not finite (NaN or infinite)")
    if not right_QG.any(axis=1).all():
        row = int(np.argmin(right_QG.any(axis=1)))
        raise ValueError(f"query {row} has no right item in the gallery")
    best_Q1 = np.where(right_QG, scores_QG, -np.inf).max(axis=1, keepdims=True)
    equal_QG = scores_QG == best_Q1
    return Ranks(
        better_Q=np.count_nonzero(scores_QG > best_Q1, axis=1).astype(np.int64),
        tied_Q=np.count_nonzero(equal_QG & ~right_QG, axis=1).astype(np.int64),
        right_Q=np.count_nonzero(equal_QG & right_QG, axis=1).astype(np.int64),
    )


def retrieval_ranks(
    video_ND: Vectors,
    text_MD: Vectors,
    video_of_text_M: Ints,
    *,
    caption_gallery: CaptionGallery = "all",
    dual_softmax_temperature: float | None = None,
    chunk: int | None = None,
) -> RetrievalRanks:
    """Both directions of retrieval from unit vectors, `chunk` queries at a time.

    Text-to-video: each text is a query with one right video. Video-to-text: each video is a
    query in the gallery of `CaptionGallery`. Memory is that of the vectors in double precision and
    of a few times chunk x gallery scores (by default about four million). With
    `dual_softmax_temperature` the scores are those of `dual_softmax` over the queries of each
    direction. Raises ValueError that names the row of a vector that is not finite.
    """
    for kind, vectors in (("video", video_ND), ("text", text_MD)):
        bad = first_not_finite(vectors)
        if bad is not None:
            raise ValueError(f"the vector of {kind} {bad} is not finite (NaN or infinite)")
    videos_N = np.arange(len(video_ND))
    video_of_text_M = np.asarray(video_of_text_M, dtype=np.int64)
    video_ND, text_MD = video_ND.astype(np.float64), text_MD.astype(np.float64)

    def direction(
        query: Vectors, gallery: Vectors, own_Q: Ints, own_G: Ints,
        best_of: Callable[[Floats], Floats] | None = None,
    ) -> Ranks:  # fmt: skip
        rows_at_once = chunk or max(1, _BLOCK // len(gallery))
        found = []
        for rows, scores in _score_blocks(query, gallery, rows_at_once, dual_softmax_temperature):
            if best_of is not None:
                scores = best_of(scores)
            found.append(ranks(scores, own_Q[rows, None] == own_G))
        return _joined(found)

    text_to_video = direction(text_MD, video_ND, video_of_text_M, videos_N)
    if caption_gallery == "all":
        return RetrievalRanks(
            text_to_video, direction(video_ND, text_MD, videos_N, video_of_text_M)
        )
    by_video_M = np.argsort(video_of_text_M, kind="stable")
    starts_N = np.searchsorted(video_of_text_M[by_video_M], videos_N)

    def best_of(scores_QM: Floats) -> Floats:
        best_QN: Floats = np.maximum.reduceat(scores_QM[:, by_video_M], starts_N, axis=1)
        return best_QN

    return RetrievalRanks(text_to_video, direction(video_ND, text_MD, videos_N, videos_N, best_of))


def chance(num_right_Q: npt.ArrayLike, num_gallery: int) -> Ranks:
    """Ranks of guessing: a query ties all `num_gallery` items, of which `num_right_Q` are right."""
    right_Q = np.asarray(num_right_Q, dtype=np.int64)
    return Ranks(better_Q=np.zeros_like(right_Q), tied_Q=num_gallery - right_Q, right_Q=right_Q)


def cosines(query_QD: Vectors, gallery_GD: Vectors) -> Floats:
    """Cosines (Q, G) of unit vectors, computed in float64 and rounded to `COSINE_DECIMALS`."""
    products_QG = (
        query_QD.astype(np.float64, copy=False) @ gallery_GD.astype(np.float64, copy=False).T
    )
    return np.round(products_QG, COSINE_DECIMALS)


def dual_softmax(similarity_QG: Floats, *, temperature: float) -> Floats:
    """Scores (Q, G) times their softmax over the queries, `s * softmax(s / temperature, axis=0)`.

    It needs every query of the test set at once and assumes that each item answers about one of
    them, so no search index can use it: report it apart from plain cosines. InternVideo2 uses
    temperature 1.
    """
    return _dual(similarity_QG, temperature, _log_sum_exp(similarity_QG / temperature))


def bootstrap_interval(
    values_Q: npt.ArrayLike,
    *,
    group_Q: npt.ArrayLike | None = None,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean of one value per query.

    With `group_Q` (ints, one per query) whole groups are drawn: the captions of one video stand
    or fall together, and drawing them one by one would make the interval too narrow.
    """
    values_Q = np.asarray(values_Q, dtype=np.float64)
    groups = np.arange(len(values_Q)) if group_Q is None else np.asarray(group_Q)
    group_of_Q = np.unique(groups, return_inverse=True)[1].reshape(-1)
    sums, counts = np.bincount(group_of_Q, weights=values_Q), np.bincount(group_of_Q)
    generator = np.random.default_rng(seed)
    means = np.empty(num_samples)
    for sample in range(num_samples):
        drawn = generator.integers(len(sums), size=len(sums))
        means[sample] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(values_Q.mean()), low=float(low), high=float(high))


def paired_bootstrap(
    a_Q: npt.ArrayLike,
    b_Q: npt.ArrayLike,
    *,
    group_Q: npt.ArrayLike | None = None,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of mean(a) - mean(b) for two models on the same queries.

    Both are drawn together, so the queries that are hard for both cancel out. The models differ
    at this level if the interval leaves out 0.
    """
    a_Q, b_Q = np.asarray(a_Q, dtype=np.float64), np.asarray(b_Q, dtype=np.float64)
    if a_Q.shape != b_Q.shape:
        raise ValueError(
            f"a paired comparison needs the same queries: got {a_Q.size} and {b_Q.size} values"
        )
    return bootstrap_interval(
        a_Q - b_Q, group_Q=group_Q, level=level, num_samples=num_samples, seed=seed
    )


def first_not_finite(rows: npt.NDArray[np.generic]) -> int | None:
    """Index of the first row that holds NaN or infinity, None if all are finite."""
    finite = np.isfinite(rows).all(axis=1)
    return None if finite.all() else int(np.argmin(finite))


def _score_blocks(
    query_QD: Vectors, gallery_GD: Vectors, chunk: int, temperature: float | None
) -> Iterator[tuple[slice, Floats]]:
    """Scores of `chunk` queries at a time, with the rows they belong to."""
    slices = [slice(start, start + chunk) for start in range(0, len(query_QD), chunk)]
    if temperature is not None:  # a first pass sums over all queries
        log_sum_G = np.full(len(gallery_GD), -np.inf)
        for rows in slices:
            block = cosines(query_QD[rows], gallery_GD) / temperature
            log_sum_G = np.logaddexp(log_sum_G, _log_sum_exp(block))
    for rows in slices:
        scores = cosines(query_QD[rows], gallery_GD)
        yield rows, scores if temperature is None else _dual(scores, temperature, log_sum_G)


def _dual(scores_QG: Floats, temperature: float, log_sum_G: Floats) -> Floats:
    """Scores times their softmax over the queries, given the log of its denominator.

    Nine digits are kept, whatever the scale: sums that differ only in the order of their terms must
    not break a tie.
    """
    product_QG = scores_QG * np.exp(scores_QG / temperature - log_sum_G)
    mantissa_QG, exponent_QG = np.frexp(product_QG)
    rounded_QG: Floats = np.ldexp(np.round(mantissa_QG, 9), exponent_QG)
    return rounded_QG


def _log_sum_exp(logits_QG: Floats) -> Floats:
    """log(sum(exp(x))) over the queries, safe for large values."""
    top_G = logits_QG.max(axis=0)
    total_G: Floats = top_G + np.log(np.exp(logits_QG - top_G).sum(axis=0))
    return total_G


def _expected_reciprocal(better: int, tied: int, right: int) -> float:
    """E[1 / (1 + better + J)], J of `tied` wrong items before the first of `right` right ones."""
    left = np.arange(tied, 0, -1)
    at_least = np.concatenate([[1.0], np.cumprod(left / (left + right)), [0.0]])  # P(J >= j)
    return float(-(np.diff(at_least) / (1 + better + np.arange(tied + 1))).sum())


def _joined(blocks: list[Ranks]) -> Ranks:
    """The ranks of consecutive queries as one."""
    return Ranks(
        better_Q=np.concatenate([block.better_Q for block in blocks]),
        tied_Q=np.concatenate([block.tied_Q for block in blocks]),
        right_Q=np.concatenate([block.right_Q for block in blocks]),
    )
