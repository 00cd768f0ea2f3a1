"""A query's vector -> hits: candidates from the index, exact scores, grouping, merging, paging.

Scores are computed anew from the stored vectors: equal vectors then score equally, which sums in
single precision do not promise, and an approximate index gives exact scores.
Shape legend: N segments or texts, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import Any, Literal

import numpy as np

from .cache import IndexCache
from .conditions import MetadataValue, Where, where_sql
from .store import SegmentRow, Store

# Scores closer than this may come out of an index in either order, by rounding in single precision.
_SCORE_ROUNDING = 1e-5
_TIME_ROUNDING_S = 1e-6  # windows that touch may end and begin a rounding apart


@dataclass(frozen=True)
class Hit:
    """An answer: [start_s, end_s) of a video (an image is [0, 0)), the best with the highest score.

    id: of the segment, never reused. video: absolute path. score: cosine, -1 to 1 up to rounding.
    metadata: of the video. A hit among texts has `video` "" and the text as `metadata["text"]`;
    its id counts texts.
    """

    id: int
    video: str
    start_s: float
    end_s: float
    score: float
    metadata: dict[str, MetadataValue] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same JSON from Python, the command line and a service."""
        return asdict(self)


@dataclass(frozen=True)
class Wanted:
    """Which of the answers to a query are wanted; see `Collection.search`. Checks itself."""

    k: int = 10
    offset: int = 0
    where: Where | None = None
    min_score: float | None = None
    group_by: Literal["video"] | None = None
    merge_gap_s: float | None = None
    target: Literal["video", "text"] = "video"

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1:
            raise ValueError(f"k must be a whole number, 1 or more; got {self.k!r}")
        if type(self.offset) is not int or self.offset < 0:
            raise ValueError(f"offset must be a whole number, 0 or more; got {self.offset!r}")
        if self.min_score is not None and not _is_finite(self.min_score):
            raise ValueError(f"min_score must be a finite number; got {self.min_score!r}")
        gap_s = self.merge_gap_s
        if gap_s is not None and not (_is_finite(gap_s) and gap_s >= 0):
            raise ValueError(f"merge_gap_s must be a number of seconds, 0 or more; got {gap_s!r}")
        if gap_s is not None and self.offset:
            raise ValueError(
                "merge_gap_s and offset do not go together, as a longer list may join hits of a "
                "shorter one: ask for more with k"
            )
        if self.group_by not in (None, "video"):
            raise ValueError(f'group_by must be "video" or None, got {self.group_by!r}')
        if self.target not in ("video", "text"):
            raise ValueError(f'target must be "video" or "text", got {self.target!r}')
        about_videos = self.where or self.group_by or self.merge_gap_s is not None
        if self.target == "text" and about_videos:
            raise ValueError(
                "where, group_by and merge_gap_s are about videos; "
                'they cannot go with target="text"'
            )
        where_sql(self.where)  # refuses a bad condition before any work

    @property
    def up_to(self) -> int:
        """Length of the list of answers of which the wanted ones are the end."""
        return self.offset + self.k


@dataclass(frozen=True)
class _Moment:
    """A segment with its score, or several of one video, with the id and score of the best."""

    id: int
    video_id: int
    video: str
    start_s: float
    end_s: float
    score: float


class Searcher:
    """Answers to vectors of queries, inside a snapshot: of the cache, or for texts of the store."""

    def __init__(self, store: Store, cache: IndexCache) -> None:
        self._store = store
        self._cache = cache
        self._texts = _Texts(store)

    def hits(self, queries_QD: np.ndarray, wanted: Wanted) -> list[list[Hit]]:
        """The wanted answers to each unit vector, the best first, equal scores by id."""
        if wanted.target == "text":
            return [self._texts.hits(query_D, wanted) for query_D in queries_QD]
        allowed_N = self._store.segment_ids(wanted.where) if wanted.where else None
        return [
            self._hits(self._moments(query_D, wanted, allowed_N)[wanted.offset : wanted.up_to])
            for query_D in queries_QD
        ]

    def _hits(self, moments: Sequence[_Moment]) -> list[Hit]:
        video_ids = {moment.video_id for moment in moments}
        metadata = {video_id: self._store.metadata(video_id) for video_id in video_ids}
        return [
            Hit(
                moment.id,
                moment.video,
                moment.start_s,
                moment.end_s,
                moment.score,
                dict(metadata[moment.video_id]),
            )
            for moment in moments
        ]

    def _moments(
        self, query_D: np.ndarray, wanted: Wanted, allowed_N: np.ndarray | None
    ) -> list[_Moment]:
        """The first `up_to` answers, as far as there are: more candidates until sure."""
        least = -np.inf if wanted.min_score is None else wanted.min_score
        is_one_each = wanted.group_by is None and wanted.merge_gap_s is None
        num = wanted.up_to + 4 if is_one_each else 2 * wanted.up_to + 16
        while True:
            ids_N, bound = self._cache.nearest(query_D, num, allowed_N=allowed_N)
            # what was left out scores no more than the bound
            sure = max(least, bound + _SCORE_ROUNDING)
            ranked = self._ranked(query_D, ids_N)
            listed, is_full = _listed([m for m in ranked if m.score >= sure], wanted)
            if is_full or sure == least:
                return listed
            num *= 4

    def _ranked(self, query_D: np.ndarray, ids_N: np.ndarray) -> list[_Moment]:
        ids_N, vectors_ND = self._store.vectors(ids_N)
        rows = self._store.segments(ids_N)
        scores_N = _scores(vectors_ND, query_D)
        order_N = np.lexsort((ids_N, -scores_N))
        return [_moment(rows[int(ids_N[i])], float(scores_N[i])) for i in order_N]


class _Texts:
    """The collection's texts, held in memory while none comes or goes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._mark: tuple[int, int, int] | None = None
        self._revision = (-1, "")
        self._rows: Sequence[tuple[int, str]] = ()
        self._vectors_ND = np.empty((0, 0), np.float32)

    def hits(self, query_D: np.ndarray, wanted: Wanted) -> list[Hit]:
        if self._revision != (revision := self._store.revision()):
            mark = self._store.texts_mark()
            if mark != self._mark or not self._store.has_revision(self._revision):
                self._rows, self._vectors_ND = self._store.texts()
            self._revision, self._mark = revision, mark
        scores_N = self._vectors_ND @ query_D
        candidates_N = np.arange(len(scores_N))
        if len(scores_N) > wanted.up_to:
            last = np.partition(scores_N, -wanted.up_to)[-wanted.up_to]
            candidates_N = np.flatnonzero(scores_N >= last - _SCORE_ROUNDING)
        exact_N = _scores(self._vectors_ND[candidates_N], query_D)
        hits = []
        for i in np.argsort(-exact_N, kind="stable"):  # rows are in the order of their ids
            id, text = self._rows[candidates_N[i]]
            if wanted.min_score is None or exact_N[i] >= wanted.min_score:
                hits.append(Hit(id, "", 0.0, 0.0, float(exact_N[i]), {"text": text}))
        return hits[wanted.offset : wanted.up_to]


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _moment(row: SegmentRow, score: float) -> _Moment:
    return _Moment(row.id, row.video_id, row.video, row.start_s, row.end_s, score)


def _scores(vectors_ND: np.ndarray, query_D: np.ndarray) -> np.ndarray:
    """Inner products (N,) in double precision, each row's sum taken alike wherever it stands."""
    return (vectors_ND.astype(np.float64) * query_D).sum(axis=1)


def _listed(ranked: Sequence[_Moment], wanted: Wanted) -> tuple[list[_Moment], bool]:
    """The first answers that segments make, the best first, and whether more could not change them.

    With merge_gap_s those of a video that are near each other are one. What ranks below the segment
    that would begin one answer too many has no say: else an answer would spread over all of a film.
    """
    of_video: dict[int, list[_Moment]] = {}
    num, is_full = 0, False
    for moment in ranked:
        others = of_video.get(moment.video_id, [])
        near = []
        if wanted.merge_gap_s is not None:
            near = [other for other in others if _are_near(other, moment, wanted.merge_gap_s)]
        begins = not near and not (wanted.group_by == "video" and others)
        if is_full := begins and num == wanted.up_to:
            break
        joined = replace(
            min([moment, *near], key=_rank),
            start_s=min(one.start_s for one in [moment, *near]),
            end_s=max(one.end_s for one in [moment, *near]),
        )
        of_video[moment.video_id] = [joined, *(other for other in others if other not in near)]
        num += 1 if begins else 0 if wanted.group_by == "video" else 1 - len(near)
        if wanted.merge_gap_s is None and num == wanted.up_to:
            is_full = True
            break
    answers = sorted((one for each in of_video.values() for one in each), key=_rank)
    return (_first_of_each_video(answers) if wanted.group_by == "video" else answers), is_full


def _first_of_each_video(ranked: Sequence[_Moment]) -> list[_Moment]:
    first: dict[int, _Moment] = {}
    for moment in ranked:
        first.setdefault(moment.video_id, moment)
    return list(first.values())


def _are_near(a: _Moment, b: _Moment, gap_s: float) -> bool:
    return max(a.start_s, b.start_s) - min(a.end_s, b.end_s) <= gap_s + _TIME_ROUNDING_S


def _rank(moment: _Moment) -> tuple[float, int]:
    return -moment.score, moment.id
