"""Searching: exact against NumPy for every kind of query and filter, and clear refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from layout_embedder import LayoutEmbedder

from fluxclip.video import read_clip
from retrieval import Collection, Hit

CAMERAS = ("north", "south", "east")


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


def test_an_empty_collection_answers_with_nothing(cats: Collection) -> None:
    assert cats.search("a dog") == [] and len(cats) == 0
    assert cats.search("a dog", where={"camera": "north"}, group_by="video") == []


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
    with pytest.raises(ValueError, match="metadata 'camera' must be text"):
        gallery.search("a", where={"camera": ["north"]})  # type: ignore[dict-item]
