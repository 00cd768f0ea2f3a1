"""Searching: exact against NumPy for every kind of query and filter, and clear refusals."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_embedder import LayoutEmbedder

import retrieval
from fluxclip.video import read_clip
from retrieval import Collection, Hit, Query
from retrieval.store import Store

CAMERAS = ("north", "south", "east")

Answer = tuple[int, str, float, float]  # id, video, start_s, end_s


@pytest.fixture(scope="module")
def gallery(
    tmp_path_factory: pytest.TempPathFactory,
    embedder: LayoutEmbedder,
    clips: list[Path],
) -> Collection:
    """Twenty clips in windows, from three cameras; one clip is said to be rare."""
    gallery = Collection.create(
        tmp_path_factory.mktemp("search") / "gallery", model=embedder, window_s=0.5
    )
    for i, clip in enumerate(clips):
        gallery.add(clip, metadata={"camera": CAMERAS[i % 3], "rare": i == 7, "number": i})
    gallery.add_texts(["a red balloon", "a night sky", "the moon"])
    return gallery


def _all_vectors(gallery: Collection) -> tuple[np.ndarray, np.ndarray]:
    return gallery._store.vectors()


def _queries(dim: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, dim)).astype(np.float32)


def _brute_force(gallery: Collection, query: np.ndarray, ids: np.ndarray, k: int) -> list[int]:
    all_ids, vectors = _all_vectors(gallery)
    among = np.isin(all_ids, ids)
    scores = vectors[among].astype(np.float64) @ query
    return all_ids[among][np.argsort(-scores, kind="stable")][:k].tolist()


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_exact_against_brute_force(gallery: Collection, k: int) -> None:
    ids, vectors = _all_vectors(gallery)
    for query in _queries(gallery.info()["dim"]):
        hits = gallery.search(vector=query, k=k)
        assert [hit.id for hit in hits] == _brute_force(gallery, query, ids, k)
        by_id = dict(zip(ids.tolist(), vectors, strict=True))
        for hit in hits:
            cosine = by_id[hit.id] @ query / np.linalg.norm(query)
            assert hit.score == pytest.approx(cosine, abs=1e-6)
    assert len(hits) == min(k, len(gallery))


@pytest.mark.parametrize(
    "where",
    [{"camera": "north"}, {"rare": True}, {"rare": False}, {"number": 3.0}]
    + [{"camera": "south", "rare": True}, {"camera": "east", "rare": True}, {"camera": "west"}],
)
@pytest.mark.parametrize("k", [1, 4, 100])
def test_where_is_exact(gallery: Collection, where: dict[str, str | bool], k: int) -> None:
    ids = gallery._store.segment_ids(where)
    for query in _queries(gallery.info()["dim"]):
        hits = gallery.search(vector=query, k=k, where=where)
        assert [hit.id for hit in hits] == _brute_force(gallery, query, ids, k)
        assert all(where.items() <= hit.metadata.items() for hit in hits)


def test_group_by_video_gives_the_best_of_each(gallery: Collection, clips: list[Path]) -> None:
    # windows of the same clip take the first places of the last query, and still k videos come
    queries = [*_queries(gallery.info()["dim"]), gallery.model.embed_video(clips[4:5])[0]]
    for query in queries:
        every = gallery.search(vector=query, k=len(gallery))
        best: dict[str, Hit] = {}
        for hit in every:
            best.setdefault(hit.video, hit)
        for k in (1, 3, 20, 100):
            grouped = gallery.search(vector=query, k=k, group_by="video")
            assert grouped == list(best.values())[:k]
    assert len({hit.video for hit in every[:4]}) < 4
    rare = gallery.search(vector=query, k=3, where={"rare": True}, group_by="video")
    assert [hit.video for hit in rare] == [str(clips[7])]


def test_grouping_looks_as_far_as_it_must(cats: Collection, clips: list[Path]) -> None:
    """One video has so many good windows that the others are out of the first candidates."""
    cats.add(clips[:3])
    query = np.zeros(cats.info()["dim"], np.float32)
    query[0] = 1
    state = cats._store.files()[str(clips[0])]
    windows = [(float(i), float(i + 1)) for i in range(500)]
    cats._store.put_video("/film.mp4", state, 500.0, windows, np.tile(query, (500, 1)))
    hits = cats.search(vector=query, k=3, group_by="video")
    assert hits[0].video == "/film.mp4" and hits[0].start_s == 0
    assert len({hit.video for hit in hits}) == 3


def test_few_long_videos_are_searched_quickly_and_read_once(
    cats: Collection, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cats.add(clips[:1])
    [state] = cats._store.files().values()
    numbers = np.random.default_rng(5)
    vectors = numbers.normal(size=(15_000, cats.info()["dim"])).astype(np.float32)
    vectors[:6000] = vectors[0]  # black frames
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    windows = [(2.0 * i, 2.0 * i + 1) for i in range(len(vectors))]
    cats._store.put_video("/film.mp4", state, 30_000.0, windows, vectors)
    num = len(cats)
    cats.search(vector=vectors[0])
    read: list[int] = []
    read_vectors = Store.vectors

    def noted(store: Store, ids: Any = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        read.append(len(ids))
        return read_vectors(store, ids, **options)

    monkeypatch.setattr(Store, "vectors", noted)
    hits = cats.search(vector=vectors[0], group_by="video")
    assert len(hits) == 2 and sum(read) <= num and max(read) <= 4096
    read.clear()
    assert cats.search(vector=vectors[14_999], k=1, group_by="video")[0].start_s == windows[-1][0]
    assert sum(read) < 100
    read.clear()
    assert [hit.id for hit in cats.search(vector=vectors[0])] == list(range(2, 12))
    assert sum(read) <= num and max(read) <= 4096
    read.clear()
    start_s = time.process_time()
    hits = cats.search(vector=vectors[0], group_by="video", merge_gap_s=0)
    assert len(hits) == 2 and (hits[0].start_s, hits[0].end_s) == windows[0]
    assert sum(read) == num and max(read) <= 4096
    [hit] = cats.search(vector=vectors[0], merge_gap_s=1, min_score=0.9999)
    assert (hit.start_s, hit.end_s) == (0.0, 11_999.0)
    assert time.process_time() - start_s < 5  # compared with each other they would take 15 s


def test_equal_scores_come_by_id(cats: Collection, clips: list[Path]) -> None:
    cats.add(clips[:1])
    state = cats._store.files()[str(clips[0])]
    vectors = np.random.default_rng(1).normal(size=(3, cats.info()["dim"])).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    windows = [(float(i), float(i + 1)) for i in range(300)]
    cats._store.put_video("/copies.mp4", state, 300.0, windows, np.tile(vectors, (100, 1)))
    copies = {hit.id: hit for hit in cats.search(vector=vectors[1], k=100)}
    assert list(copies) == list(range(3, 302, 3))
    assert len({hit.score for hit in copies.values()}) == 1
    for k in (1, 2, 37):
        assert [hit.id for hit in cats.search(vector=vectors[1], k=k)] == list(copies)[:k]


def test_query_by_text_video_image_and_vector(
    gallery: Collection, embedder: LayoutEmbedder, clips: list[Path], tmp_path: Path
) -> None:
    from PIL import Image

    hits = gallery.search("a full moon", k=4)
    assert hits == gallery.search(vector=embedder.embed_text(["a full moon"])[0], k=4)

    picture = tmp_path / "query.png"
    Image.fromarray(read_clip(clips[5], num_frames=1).frames_THWC[0]).save(picture)
    assert gallery.search(image=picture, k=1)[0].video == str(clips[5])
    assert gallery.search(video=picture, k=3) == gallery.search(image=picture, k=3)

    by_video = gallery.search(video=str(clips[5]), k=4)
    vector = embedder.embed_video([clips[5]])[0]
    assert by_video == gallery.search(vector=vector, k=4)
    assert [hit.id for hit in gallery.search(vector=100 * vector, k=4)] == [
        hit.id for hit in by_video
    ]


def test_video_to_text(gallery: Collection, embedder: LayoutEmbedder, clips: list[Path]) -> None:
    texts = ["a red balloon", "a night sky", "the moon"]
    scores = embedder.embed_text(texts) @ embedder.embed_video([clips[0]])[0]
    hits = gallery.search(video=clips[0], target="text", k=10)
    order = np.argsort(-scores).tolist()
    assert [hit.metadata["text"] for hit in hits] == [texts[i] for i in order]
    assert [hit.id for hit in hits] == [i + 1 for i in order]
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True), abs=1e-6)
    assert {(hit.video, hit.start_s, hit.end_s) for hit in hits} == {("", 0.0, 0.0)}
    assert gallery.search("the MOON", target="text", k=1)[0].metadata == {"text": "the moon"}


def test_texts_are_added_once_and_removed(cats: Collection) -> None:
    assert cats.search("moon", target="text") == []
    assert cats.add_texts(["the sun", "the moon", "the sun"]) == 2
    assert cats.add_texts("the sun") == 0
    assert cats.remove(text="the sun") == 1
    assert cats.add_texts(["the sun"]) == 1
    assert {hit.id for hit in cats.search("sun", target="text")} == {2, 3}
    with pytest.raises(ValueError, match="a text to add must not be empty"):
        cats.add_texts(["fine", "  "])
    with pytest.raises(ValueError, match="'cats' holds no text 'the stars'"):
        cats.remove(text="the stars")
    assert len(cats) == 0 and cats.info()["texts"] == 2


def test_a_hit_is_the_same_json_everywhere(gallery: Collection, clips: list[Path]) -> None:
    [hit] = gallery.search(video=clips[4], where={"number": 4}, k=1)
    assert json.loads(json.dumps(hit.to_dict())) == {
        "id": hit.id,
        "video": str(clips[4]),
        "start_s": hit.start_s,
        "end_s": hit.start_s + 0.5,
        "score": hit.score,
        "metadata": {"camera": "south", "number": 4, "rare": False},
    }


def test_every_public_name_is_there() -> None:
    assert {name for name in dir(retrieval) if getattr(retrieval, name)} == set(retrieval.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Colection'"):
        _ = retrieval.Colection


def test_an_empty_collection_answers_with_nothing(cats: Collection) -> None:
    assert cats.search("a dog") == [] and len(cats) == 0
    assert cats.search("a dog", where={"camera": "north"}, group_by="video") == []


# -- everything that orders and cuts the list, against lists that are plainly worked out


@dataclass(frozen=True)
class Piece:
    """A segment of the crowd: eight films, one after the other of windows of which half overlap."""

    id: int
    video: str
    start_s: float
    end_s: float
    year: int
    vector: np.ndarray


@pytest.fixture(scope="module")
def crowd(
    tmp_path_factory: pytest.TempPathFactory, embedder: LayoutEmbedder, clips: list[Path]
) -> Iterator[tuple[Collection, list[Piece]]]:
    """A collection of 8 films and 720 segments, in an exact index but for the last of them."""
    numbers = np.random.default_rng(3)
    with Collection.create(tmp_path_factory.mktemp("crowd") / "crowd", model=embedder) as crowd:
        crowd.add(clips[:1])
        [state] = crowd._store.files().values()
        crowd.remove(video=clips[0])
        for film in range(8):
            n = 20 + 20 * film
            starts = np.sort(numbers.choice(3 * n, n, replace=False)).astype(float)
            vectors = numbers.normal(size=(n, embedder.dim)) + numbers.normal(size=embedder.dim)
            vectors[5::7] = vectors[4::7][: len(vectors[5::7])]  # equal scores
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            segments = [(start, start + 1 + i % 2) for i, start in enumerate(starts.tolist())]
            year = {"year": 2018 + film % 4}
            crowd._store.put_video(
                f"/{film}.mp4", state, 3.0 * n, segments, vectors.astype(np.float32), year
            )
            if film == 5:
                crowd.rebuild()
        ids, vectors = crowd._store.vectors()
        rows = crowd._store.segments(ids)
        pieces = [
            Piece(row.id, row.video, row.start_s, row.end_s, 2018 + int(row.video[1]) % 4, vector)
            for row, vector in zip((rows[id] for id in ids.tolist()), vectors, strict=True)
        ]
        yield crowd, pieces


def _expected(pieces: list[Piece], query: np.ndarray, up_to: int, **options: Any) -> list[Answer]:
    """The first `up_to` answers, from a look at every segment."""
    unit = (query / np.linalg.norm(query)).astype(np.float32)
    bounds = (options["where"] or {}).get("year", {})
    least = -2 if options["min_score"] is None else options["min_score"]
    scored = [(-float((p.vector.astype(float) * unit).sum()), p) for p in pieces]
    scored.sort(key=lambda pair: (pair[0], pair[1].id))
    gap = options["merge_gap_s"]
    answers: list[tuple[float, Answer]] = []
    for negative, piece in scored:
        if not (bounds.get("gte", 0) <= piece.year < bounds.get("lt", 3000)) or -negative < least:
            continue
        wider = [*answers, (negative, (piece.id, piece.video, piece.start_s, piece.end_s))]
        while gap is not None:  # any two that belong together, until there are none
            pair = next((pair for pair in combinations(wider, 2) if _are_near(*pair, gap)), None)
            if pair is None:
                break
            (score, (id, video, *_)), _ = min(pair), pair
            span = min(part[1][2] for part in pair), max(part[1][3] for part in pair)
            wider = [part for part in wider if part not in pair] + [(score, (id, video, *span))]
        if len(_grouped(wider, **options)) > up_to:
            break
        answers = wider
    return _grouped(answers, **options)


def _are_near(a: tuple[float, Answer], b: tuple[float, Answer], gap: float) -> bool:
    (_, (_, film, start, end)), (_, (_, other, other_start, other_end)) = a, b
    return film == other and start - other_end <= gap and other_start - end <= gap


def _grouped(answers: list[tuple[float, Answer]], **options: Any) -> list[Answer]:
    ranked = [answer for _, answer in sorted(answers)]
    if options["group_by"]:
        return [a for i, a in enumerate(ranked) if a[1] not in {b[1] for b in ranked[:i]}]
    return ranked


def _shown(hits: list[Hit]) -> list[Answer]:
    return [(hit.id, hit.video, hit.start_s, hit.end_s) for hit in hits]


@given(
    seed=st.integers(0, 5),
    k=st.sampled_from([1, 3, 10, 40, 1000]),
    offset=st.sampled_from([0, 1, 7, 100]),
    min_score=st.sampled_from([None, -0.2, 0.05, 0.2, 0.9]),
    group_by=st.sampled_from([None, "video"]),
    merge_gap_s=st.sampled_from([None, None, 0, 1, 2.5]),
    where=st.sampled_from([None, {"year": {"gte": 2019}}, {"year": {"gte": 2020, "lt": 2021}}]),
)
@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_filters_thresholds_groups_merges_and_pages_are_exact(
    crowd: tuple[Collection, list[Piece]], seed: int, k: int, offset: int, **options: Any
) -> None:
    collection, pieces = crowd
    # near to a film, so that most of the best are of one
    film = pieces[150 * seed % len(pieces)].vector
    query = film + 0.1 * np.random.default_rng(seed).normal(size=film.shape)
    if options["merge_gap_s"] is not None:
        offset, k = 0, min(k, 40)
    hits = collection.search(vector=query, k=k, offset=offset, **options)
    assert _shown(hits) == _expected(pieces, query, offset + k, **options)[offset:]
    assert all(hit.score >= (options["min_score"] or -1.1) for hit in hits)


def test_pages_are_the_list_in_pieces(crowd: tuple[Collection, list[Piece]]) -> None:
    collection, pieces = crowd
    query = pieces[77].vector
    pages = [collection.search(vector=query, k=7, offset=at) for at in range(0, 735, 7)]
    assert sum(pages, []) == collection.search(vector=query, k=1000)
    assert pages[-1] == []


def test_merging_joins_neighbours_of_one_video_only(
    cats: Collection, clips: list[Path], embedder: LayoutEmbedder
) -> None:
    cats.add(clips[:1])
    [state] = cats._store.files().values()
    good, bad = np.zeros((2, embedder.dim), np.float32)
    good[0], bad[1] = 1, 1
    better = good + 0.1 * bad
    better /= np.linalg.norm(better)
    spans = [(0.0, 2.0), (2.0, 4.0), (4.0, 6.0), (5.0, 9.0), (10.5, 11.0)]
    cats._store.put_video(
        "/a.mp4", state, 11.0, spans, np.stack([good, better, bad, good, good]), {"name": "a"}
    )
    cats._store.put_video("/b.mp4", state, 11.0, spans[:1], better[None])
    query = {"vector": better, "min_score": 0.9}

    def found(**options: Any) -> list[tuple[str, float, float, int]]:
        hits = cats.search(**query, **options)
        assert [hit.metadata for hit in hits if hit.video == "/a.mp4"][0] == {"name": "a"}
        return [(hit.video, hit.start_s, hit.end_s, hit.id) for hit in hits]

    first = min(
        id for id, row in cats._store.segments(np.arange(50)).items() if row.video == "/a.mp4"
    )
    a, b = "/a.mp4", "/b.mp4"
    assert found(merge_gap_s=0) == [
        (a, 0.0, 4.0, first + 1), (b, 0.0, 2.0, first + 5), (a, 5.0, 9.0, first + 3),
        (a, 10.5, 11.0, first + 4),
    ]  # fmt: skip
    assert found(merge_gap_s=1)[0] == (a, 0.0, 9.0, first + 1)
    assert len(found(merge_gap_s=1)) == 3
    assert found(merge_gap_s=1.5) == [(a, 0.0, 11.0, first + 1), (b, 0.0, 2.0, first + 5)]
    # what ranks below the last hit wanted widens none
    assert found(merge_gap_s=1, k=1) == [(a, 2.0, 4.0, first + 1)]
    assert found(merge_gap_s=0, group_by="video") == [
        (a, 0.0, 4.0, first + 1), (b, 0.0, 2.0, first + 5)
    ]  # fmt: skip


def test_several_queries_at_once_are_each_answered_as_alone(
    gallery: Collection, clips: list[Path]
) -> None:
    mix = [Query("a dog"), Query(video=clips[3], weight=0.5)]
    queries = ["a night sky", Query(video=clips[2]), mix, Query("a night sky")]
    together = gallery.search_many(queries, k=4, group_by="video")
    assert together[0] == gallery.search("a night sky", k=4, group_by="video") == together[3]
    assert together[1] == gallery.search(video=clips[2], k=4, group_by="video")
    assert together[2] == gallery.search(mix=mix, k=4, group_by="video")
    assert gallery.search_many([]) == []
    texts = gallery.search_many(["the moon", Query(video=clips[0])], target="text", k=2)
    assert texts[0] == gallery.search("the moon", target="text", k=2)
    with pytest.raises(ValueError, match="search_many takes a list of queries"):
        gallery.search_many("a night sky")


def test_texts_in_pages_and_above_a_score(cats: Collection) -> None:
    texts = [f"number {i} {i % 7}" for i in range(3000)]
    cats.add_texts(texts)
    query = cats.model.embed_text(["number 5"])[0]
    scores = (cats.model.embed_text(texts).astype(float) * query).sum(axis=1)
    order = np.lexsort((np.arange(3000), -scores)).tolist()
    found = [
        [hit.id - 1 for hit in cats.search("number 5", target="text", k=40, offset=at)]
        for at in range(0, 3000, 40)
    ]
    assert sum(found, []) == order
    least = float(np.sort(scores)[-25])
    hits = cats.search("number 5", target="text", k=1000, min_score=least - 1e-7)
    assert [hit.id - 1 for hit in hits] == order[: len(hits)] and len(hits) >= 25
    assert cats.search("number 5", target="text", min_score=2.0) == []
    cats.remove(text=texts[order[0]])
    cats.add_texts("number 5 again")
    assert order[0] + 1 not in {h.id for h in cats.search("number 5", target="text", k=3000)}
    assert cats.search("number 5 again", target="text", k=1)[0].id == 3001


def test_whole_numbers_of_numpy_are_whole_numbers(gallery: Collection) -> None:
    hits = gallery.search("a dog", k=np.int64(3), offset=np.uint8(2))  # type: ignore[arg-type]
    assert hits == gallery.search("a dog", k=3, offset=2)


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3", None])
def test_bad_k(gallery: Collection, k: object) -> None:
    with pytest.raises(ValueError, match="k must be a whole number, 1 or more; got"):
        gallery.search("a dog", k=k)  # type: ignore[arg-type]


def test_bad_queries(gallery: Collection, clips: list[Path], tmp_path: Path) -> None:
    dim = gallery.info()["dim"]
    for text in ("", "  \n"):
        with pytest.raises(ValueError, match="the query is empty"):
            gallery.search(text)
    for queries in ({}, {"text": "a", "video": clips[0]}, {"video": clips[0], "image": clips[0]}):
        with pytest.raises(ValueError, match="search takes one query"):
            gallery.search(**queries)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"\(3,\); collection 'gallery' holds vectors of {dim} "):
        gallery.search(vector=np.ones(3))
    for value in (0, np.nan, np.inf):
        with pytest.raises(ValueError, match="zero or not finite"):
            gallery.search(vector=np.full(dim, value))
    with pytest.raises(ValueError, match="is not an image"):
        gallery.search(image=clips[0])
    with pytest.raises(FileNotFoundError, match="nowhere.mp4"):
        gallery.search(video=tmp_path / "nowhere.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match="text.mp4"):
        gallery.search(video=tmp_path / "text.mp4")


def test_bad_options(gallery: Collection) -> None:
    with pytest.raises(ValueError, match='group_by must be "video" or None'):
        gallery.search("a", group_by="camera")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='target must be "video" or "text"'):
        gallery.search("a", target="image")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot go with target"):
        gallery.search("a", target="text", where={"camera": "north"})
    with pytest.raises(ValueError, match="where 'camera': for one of several values"):
        gallery.search("a", where={"camera": ["north"]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="where is of keys"):
        gallery.search("a", where=["camera"])  # type: ignore[arg-type]
    for query in (Path("a.mp4"), 3):
        with pytest.raises(ValueError, match="a query is a text, a Query"):
            gallery.search_many([query])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="cannot go with target"):
        gallery.search("a", target="text", merge_gap_s=0)
    for value in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match="offset must be a whole number, 0 or more; got"):
            gallery.search("a", offset=value)  # type: ignore[arg-type]
    for value in (-0.1, float("inf"), float("nan"), "3", True):
        with pytest.raises(ValueError, match="merge_gap_s must be a number of seconds, 0 or"):
            gallery.search("a", merge_gap_s=value)  # type: ignore[arg-type]
    for value in (float("-inf"), float("nan"), "0.3", False):
        with pytest.raises(ValueError, match="min_score must be a finite number; got"):
            gallery.search("a", min_score=value)  # type: ignore[arg-type]
