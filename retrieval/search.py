"""A query's vector -> hits: candidates from the index, exact scores, grouping, merging, paging.

Scores are computed anew from the stored vectors: equal vectors then score equally, which sums in
single precision do not promise, and an approximate index gives exact scores.
Shape legend: N segments or texts, D width.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from .cache import IndexCache
from .conditions import MetadataValue, Where, where_sql
from .store import SegmentRow, Store

# Scores closer than this may come out of an index in either order, by rounding in single precision.
_SCORE_ROUNDING = 1e-5
_ROWS_AT_ONCE = 4096  # of a large collection all vectors at once may not fit into memory
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
        if not _is_whole(self.k) or self.k < 1:
            raise ValueError(f"k must be a whole number, 1 or more; got {self.k!r}")
        if not _is_whole(self.offset) or self.offset < 0:
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
        return int(self.offset) + int(self.k)


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
        up_to = wanted.up_to
        if wanted.group_by == "video" and wanted.merge_gap_s is None:
            up_to = min(up_to, self._store.num_videos(wanted.where))  # where no more can come
        return [
            self._hits(self._moments(query_D, wanted, up_to, allowed_N)[wanted.offset :])
            for query_D in queries_QD
        ]

    def _hits(self, moments: Sequence[_Moment]) -> list[Hit]:
        video_ids = {moment.video_id for moment in moments}
        metadata = self._store.metadata_of(list(video_ids))
        return [
            Hit(
                moment.id,
                moment.video,
                moment.start_s,
                moment.end_s,
                moment.score,
                dict(metadata.get(moment.video_id, {})),
            )
            for moment in moments
        ]

    def _moments(
        self, query_D: np.ndarray, wanted: Wanted, up_to: int, allowed_N: np.ndarray | None
    ) -> list[_Moment]:
        """The first `up_to` answers, as far as there are: more candidates until sure."""
        least = -np.inf if wanted.min_score is None else wanted.min_score
        is_one_each = wanted.group_by is None and wanted.merge_gap_s is None
        num = up_to + 4 if is_one_each else 2 * up_to + 16
        ids_N, scores_N = np.empty(0, np.int64), np.empty(0)
        while True:
            found_N, bound = self._cache.nearest(query_D, num, allowed_N=allowed_N)
            # what was left out scores no more than the bound
            sure = max(least, bound + _SCORE_ROUNDING)
            new_N, new_scores_N = self._scored(query_D, np.setdiff1d(found_N, ids_N))
            ids_N = np.concatenate([ids_N, new_N])
            scores_N = np.concatenate([scores_N, new_scores_N])
            order_N = np.lexsort((ids_N, -scores_N))
            order_N = order_N[scores_N[order_N] >= sure]
            ranked = self._ranked(ids_N[order_N], scores_N[order_N])
            listed, is_full = _listed(ranked, wanted, up_to)
            if is_full or sure == least:
                return listed
            num *= 4

    def _scored(self, query_D: np.ndarray, ids_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of the ids that there are, and their scores."""
        scored = [(ids_N[:0], np.empty(0))]
        for at in range(0, len(ids_N), _ROWS_AT_ONCE):
            block_N, vectors_ND = self._store.vectors(ids_N[at : at + _ROWS_AT_ONCE])
            scored.append((block_N, _scores(vectors_ND, query_D)))
        ids, scores = zip(*scored, strict=True)
        return np.concatenate(ids), np.concatenate(scores)

    def _ranked(self, ids_N: np.ndarray, scores_N: np.ndarray) -> Iterator[_Moment]:
        """The segments in the order of these ids, read as they are asked for."""
        at, num = 0, 64  # most lists are short
        while at < len(ids_N):
            ids = ids_N[at : at + num]
            rows = self._store.segments(ids)
            for id, score in zip(ids.tolist(), scores_N[at : at + num].tolist(), strict=True):
                yield _moment(rows[id], score)
            at, num = at + num, min(4 * num, _ROWS_AT_ONCE)


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


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _moment(row: SegmentRow, score: float) -> _Moment:
    return _Moment(row.id, row.video_id, row.video, row.start_s, row.end_s, score)


def _scores(vectors_ND: np.ndarray, query_D: np.ndarray) -> np.ndarray:
    """Inner products (N,) in double precision, each row's sum taken alike wherever it stands."""
    scores_N = np.empty(len(vectors_ND))
    for at in range(0, len(vectors_ND), _ROWS_AT_ONCE):
        rows_ND = vectors_ND[at : at + _ROWS_AT_ONCE].astype(np.float64)
        scores_N[at : at + _ROWS_AT_ONCE] = (rows_ND * query_D).sum(axis=1)
    return scores_N


def _listed(ranked: Iterable[_Moment], wanted: Wanted, up_to: int) -> tuple[list[_Moment], bool]:
    """The first answers that segments make, the best first, and whether more could not change them.

    With merge_gap_s those of a video that are near each other are one. What ranks below the segment
    that would begin one answer too many has no say: else an answer would spread over all of a film.
    """
    if wanted.merge_gap_s is not None:
        return _merged(ranked, wanted.merge_gap_s, wanted.group_by, up_to)
    listed: list[_Moment] = []
    seen: set[int] = set()
    for moment in ranked:
        if wanted.group_by == "video" and moment.video_id in seen:
            continue
        seen.add(moment.video_id)
        listed.append(moment)
        if len(listed) == up_to:
            return listed, True
    return listed, False


def _merged(
    ranked: Iterable[_Moment], gap_s: float, group_by: Literal["video"] | None, up_to: int
) -> tuple[list[_Moment], bool]:
    # by start, and so by end: no two of a video are near each other
    of_video: dict[int, list[_Moment]] = {}
    num, is_full = 0, False
    for moment in ranked:
        others = of_video.get(moment.video_id, [])
        near = _near(others, moment, gap_s + _TIME_ROUNDING_S)
        num_near = near.stop - near.start
        begins = not num_near and not (group_by == "video" and others)
        if is_full := begins and num == up_to:
            break
        if group_by == "video":
            num += begins
        else:
            num += 1 - num_near
        joined = moment
        if num_near:
            parts = [moment, *others[near]]
            start_s = min(part.start_s for part in parts)
            end_s = max(part.end_s for part in parts)
            joined = replace(min(parts, key=_rank), start_s=start_s, end_s=end_s)
        others[near] = [joined]
        of_video[moment.video_id] = others
    if group_by == "video":
        return sorted((min(each, key=_rank) for each in of_video.values()), key=_rank), is_full
    return sorted((one for each in of_video.values() for one in each), key=_rank), is_full


def _near(others: Sequence[_Moment], moment: _Moment, gap_s: float) -> slice:
    """Where those are that are at most so far from a moment, or where it would stand itself."""
    first = bisect_left(others, True, key=lambda other: moment.start_s - other.end_s <= gap_s)
    end = bisect_left(others, True, first, key=lambda other: other.start_s - moment.end_s > gap_s)
    return slice(first, end)


def _rank(moment: _Moment) -> tuple[float, int]:
    return -moment.score, moment.id
