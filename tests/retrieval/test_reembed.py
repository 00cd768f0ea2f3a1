"""Another model: only the switch changes answers, and then they are those of a new collection."""

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from layout_embedder import LayoutEmbedder

from retrieval import Collection, Hit, ReEmbedReport, reembed

QUERY = "query.mp4"
WINDOW_S = 0.8
TEXTS = ["red rocket", "blue sea", "green field"]


class Interrupted(Exception):
    """What a test stops a re-embedding with."""


class Watched(LayoutEmbedder):
    """Lets a test look, or stop, between two batches."""

    batches = 0

    def embed_video(self, videos: Sequence, *, token_budget: int | None = None) -> np.ndarray:  # type: ignore[type-arg]
        self.batches += 1
        self.at_batch()
        return super().embed_video(videos, token_budget=token_budget)

    def at_batch(self) -> None:
        return None


@pytest.fixture
def old(embedder: LayoutEmbedder) -> LayoutEmbedder:
    return embedder


@pytest.fixture
def new() -> Watched:
    return Watched("new", cells=2, contrast=0.5)


@pytest.fixture
def files(tmp_path: Path, clips: list[Path]) -> Path:
    """Eight clips, one of them under a name of its own, and a still."""
    folder = tmp_path / "files"
    folder.mkdir()
    stills = clips[0].parents[1] / "stills"
    for path in [*clips[:7], min(stills.iterdir())]:
        shutil.copy(path, folder)
    shutil.copy(clips[7], folder / QUERY)
    return folder


@pytest.fixture
def collection(tmp_path: Path, old: LayoutEmbedder, files: Path) -> Collection:
    made = Collection.create(tmp_path / "c", model=old, window_s=WINDOW_S)
    made.add(files, metadata={"camera": "north"})
    made.add_texts(TEXTS)
    return made


def answers(collection: Collection, model: LayoutEmbedder, files: Path) -> list[list[Hit]]:
    query = files / QUERY
    return [
        collection.search(video=query, k=200),
        collection.search("rocket", k=200),
        collection.search(video=query, k=20, where={"camera": "north"}, group_by="video"),
        collection.search(video=query, k=10, target="text"),
    ]


def assert_equal(found: list[list[Hit]], wanted: list[list[Hit]], *, ids: bool = True) -> None:
    for hits, others in zip(found, wanted, strict=True):
        assert len(hits) == len(others) > 0
        by_score = {(h.video, h.start_s, h.end_s, h.metadata.get("text")): h for h in others}
        for hit in hits:
            other = by_score[hit.video, hit.start_s, hit.end_s, hit.metadata.get("text")]
            assert hit.score == pytest.approx(other.score, abs=1e-6)
            assert hit.metadata == other.metadata
            assert not ids or hit.id == other.id


def test_answers_before_during_and_after(
    tmp_path: Path, collection: Collection, old: LayoutEmbedder, new: Watched, files: Path
) -> None:
    before = answers(collection, old, files)
    during = []

    def look() -> None:
        # another reader, as in another process: it has its own connection
        with Collection.open(tmp_path / "c", model=old) as reader:
            during.append(answers(reader, old, files))
            assert reader.info()["model_name"] == "layout"

    new.at_batch = look  # type: ignore[method-assign]
    open_all_along = Collection.open(tmp_path / "c", model=old)
    assert answers(open_all_along, old, files) == before
    seen: list[tuple[int, int]] = []
    report = collection.re_embed(new, progress=lambda done, total, path: seen.append((done, total)))
    assert (report.done, report.failed, report.switched) == (9, {}, True)
    assert seen == [(done, 9) for done in range(1, 10)]
    assert len(during) >= 2 and all(found == before for found in during)

    new.at_batch = lambda: None  # type: ignore[method-assign]
    fresh = Collection.create(tmp_path / "fresh", model=new, window_s=WINDOW_S)
    fresh.add(files, metadata={"camera": "north"})
    fresh.add_texts(TEXTS)
    wanted = answers(fresh, new, files)
    found = answers(collection, new, files)
    assert_equal(found, wanted, ids=False)
    # same ids of the same segments as before
    ids = {(hit.video, hit.start_s): hit.id for hit in before[0]}
    assert {(hit.video, hit.start_s): hit.id for hit in found[0]} == ids
    info = collection.info()
    assert (info["model_name"], info["dim"], info["fingerprint"]) == ("new", 12, new.fingerprint)
    assert collection.check().problems == () and collection.check().fixed == ()

    # one that was open all along, with the old model, sees the new vectors too
    vector = new.embed_video([files / QUERY])[0]
    [hit] = open_all_along.search(vector=vector, k=1)
    assert hit == collection.search(vector=vector, k=1)[0]
    # and what is added is added by the new model
    extra = tmp_path / "extra.mp4"
    shutil.copy(files / QUERY, extra)
    assert collection.add(extra).added == 1
    of_query = [hit for hit in found[0] if hit.video == str(files / QUERY)]
    with Collection.open(tmp_path / "c", model=new) as opened:
        assert len(opened) == len(fresh) + len(of_query)
    with pytest.raises(ValueError, match=r"was built by new@.*this model is layout@"):
        Collection.open(tmp_path / "c", model=old)


def test_only_the_vectors_of_the_serving_space_stay(
    collection: Collection, new: Watched, old: LayoutEmbedder
) -> None:
    def tables() -> list[str]:
        rows = collection._store._rows("SELECT name FROM sqlite_schema WHERE name LIKE '%vectors%'")
        return sorted(name for (name,) in rows)

    assert tables() == ["text_vectors_1", "vectors_1"]
    collection.re_embed(new)
    assert tables() == ["text_vectors_2", "vectors_2"]
    collection.re_embed(old)
    assert tables() == ["text_vectors_3", "vectors_3"]
    assert collection.re_embed(old) == ReEmbedReport(0)


def test_interrupted_it_goes_on(
    tmp_path: Path, collection: Collection, new: Watched, old: LayoutEmbedder, files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(reembed, "SEGMENTS_PER_COMMIT", 4)
    before = answers(collection, old, files)

    def stop() -> None:
        if new.batches == 2:
            raise Interrupted

    new.at_batch = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        collection.re_embed(new)
    assert answers(collection, old, files) == before
    left = len(collection._store.unstaged_segments(1000))
    assert 0 < left < len(collection)

    # another one is refused, and the line says which is under way
    other = LayoutEmbedder("other", cells=1)
    for model, budget in ((other, None), (new, 64)):
        with pytest.raises(
            ValueError, match=r"re-embedded by new@.* at all tokens, not by"
        ) as said:
            collection.re_embed(model, token_budget=budget)
        assert "\n" not in str(said.value) and "--abandon" in str(said.value)
    # what is added meanwhile is by the old model, and gets its new vector in the end
    extra, num_before = tmp_path / "extra.mp4", len(collection)
    shutil.copy(files / QUERY, extra)
    collection.add(extra)
    collection.add_texts("a rocket again")
    new.at_batch, new.batches = lambda: None, 0  # type: ignore[method-assign]
    embedded = []
    videos = LayoutEmbedder.embed_video
    monkeypatch.setattr(
        LayoutEmbedder, "embed_video",
        lambda self, clips, **more: embedded.append(len(clips)) or videos(self, clips, **more),
    )  # fmt: skip
    assert collection.re_embed(new).switched
    assert sum(embedded) == left + len(collection) - num_before
    assert {hit.video for hit in collection.search(vector=np.ones(12), k=200)} >= {str(extra)}
    assert len(collection.search("rocket", k=10, target="text")) == 4


def test_given_up_it_leaves_nothing(
    tmp_path: Path, collection: Collection, new: Watched, old: LayoutEmbedder, files: Path
) -> None:
    assert not collection.abandon_re_embed()
    before = answers(collection, old, files)
    held = sorted(path.name for path in (tmp_path / "c").iterdir())

    def stop() -> None:
        raise Interrupted

    new.at_batch = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        collection.re_embed(new)
    assert collection.info()["staged"]["model_name"] == "new"
    assert collection.abandon_re_embed()
    assert "staged" not in collection.info()
    assert answers(collection, old, files) == before
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == held
    assert collection.re_embed(LayoutEmbedder("other", cells=1)).switched


def test_check_removes_what_a_killed_one_left(
    tmp_path: Path, collection: Collection, new: Watched, old: LayoutEmbedder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(reembed, "_clean", lambda store: [])  # killed before it
        assert collection.re_embed(new).switched
    for name in (".text_encoder-2.abc", "text_encoder-1", "text_encoder.mine"):
        (folder / name).mkdir()
    with Collection.open(folder, model=new) as other, other._store.sole_writer():
        assert collection.check().fixed == ()  # whoever writes may need it
    fixed = collection.check().fixed
    names = {"vectors_1", "text_vectors_1", ".text_encoder-2.abc", "text_encoder-1"}
    assert {line.split()[0] for line in fixed} == names
    assert [path.name for path in folder.glob("*text_encoder*")] == ["text_encoder.mine"]
    assert collection.check().fixed == () and len(answers(collection, new, folder.parent / "files"))


def test_the_same_model_at_another_budget(
    tmp_path: Path, collection: Collection, old: LayoutEmbedder, files: Path
) -> None:
    assert collection.re_embed(old, token_budget=32).switched
    assert collection.info()["token_budget"] == 32
    fresh = Collection.create(tmp_path / "fresh", model=old, window_s=WINDOW_S, token_budget=32)
    fresh.add(files, metadata={"camera": "north"})
    fresh.add_texts(TEXTS)
    assert_equal(answers(collection, old, files), answers(fresh, old, files), ids=False)


def test_files_that_are_gone_changed_or_broken_stop_the_switch(
    collection: Collection, new: Watched, old: LayoutEmbedder, files: Path
) -> None:
    gone, changed, broken, touched, *_ = sorted(files.glob("*.mp4"))
    shutil.copy(gone, changed)
    gone.unlink()
    os.utime(touched, ns=(0, 0))  # the same content
    state = broken.stat()
    content = bytearray(broken.read_bytes())
    content[:] = bytes(len(content))  # a broken disk: same size and time
    broken.write_bytes(content)
    os.utime(broken, ns=(state.st_atime_ns, state.st_mtime_ns))
    before = collection.search(vector=np.ones(48), k=200)
    report = collection.re_embed(new)
    assert (report.done, report.switched) == (6, False)
    assert set(report.failed) == {str(gone), str(changed), str(broken)}
    assert report.failed[str(gone)] == "No such file or directory"
    assert "add it again" in report.failed[str(changed)]
    assert collection.search(vector=np.ones(48), k=200) == before

    report = collection.re_embed(new, drop_failed=True)
    assert (report.done, report.switched, len(report.failed)) == (0, True, 3)
    found = {hit.id for hit in collection.search(vector=np.ones(12), k=200)}
    assert found == {hit.id for hit in before if hit.video not in report.failed}
    assert collection.check().problems == ()


def test_only_files_that_are_to_blame_are_dropped(
    collection: Collection, new: Watched, files: Path, tmp_path: Path
) -> None:
    other, away = tmp_path / "other", tmp_path / "away"
    other.mkdir()
    shutil.copy(files / QUERY, other)
    collection.add(other)
    before = collection.search(vector=np.ones(48), k=200)

    def refused(said: str) -> None:
        with pytest.raises(ValueError, match=said) as error:
            collection.re_embed(new, drop_failed=True)
        assert "\n" not in str(error.value)
        assert collection.search(vector=np.ones(48), k=200) == before

    other.rename(away)  # as by a disk that is not mounted: without its folder, or an empty one
    refused(r"query\.mp4: the folder is not there, empty .* is the disk mounted")
    other.mkdir()
    refused("is the disk mounted")
    collection.abandon_re_embed()
    files.rename(tmp_path / "files-away")
    refused(r"not one video of collection 'c' could be read .* and 9 more.* disk mounted")
    (tmp_path / "files-away").rename(files)
    (other / "another.mp4").touch()  # the folder is in use: the file is gone
    report = collection.re_embed(new, drop_failed=True)
    assert report.switched and list(report.failed) == [str(other / QUERY)]


def test_a_model_that_gives_no_vector_drops_nothing(collection: Collection, files: Path) -> None:
    class Broken(LayoutEmbedder):
        length = 1.0

        def embed_video(self, videos: Sequence, *, token_budget: int | None = None) -> np.ndarray:  # type: ignore[type-arg]
            vectors_ND = super().embed_video(videos, token_budget=token_budget)
            vectors_ND[0] *= self.length
            return vectors_ND

    min(files.glob("*.mp4")).unlink()
    before = collection.search(vector=np.ones(48), k=200)
    model = Broken(contrast=0.5)
    for model.length, said in ((np.nan, "not finite"), (0.5, "of length 0.5")):
        with pytest.raises(ValueError, match=f"{said}.*not the fault of a file"):
            collection.re_embed(model, drop_failed=True)
        assert collection.search(vector=np.ones(48), k=200) == before
        collection.abandon_re_embed()


def test_a_collection_with_index_and_text_tower(
    tmp_path: Path, emoji: Path, embedder: LayoutEmbedder
) -> None:
    """With a shipped model as the new one: its exported text tower serves after the switch."""
    from fluxclip import load_model

    with Collection.create(tmp_path / "c", model=embedder) as collection:
        collection.add(sorted((emoji / "clips").glob("*.mp4"))[:6])
        collection.rebuild()
        assert collection.re_embed(load_model("emoji-tiny")).switched
        assert (tmp_path / "c" / "text_encoder-2").is_dir()
    code = """
        import sys, json
        from retrieval import Collection
        with Collection.open(sys.argv[1]) as collection:
            hits = collection.search("a cyclone", k=3)
        print(json.dumps([hit.id for hit in hits]))
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "c")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 3
    with Collection.open(tmp_path / "c") as collection:
        collection.re_embed(embedder)
    assert not list((tmp_path / "c").glob("text_encoder*"))


def test_a_full_disk_stops_it_and_it_goes_on(
    collection: Collection, new: Watched, old: LayoutEmbedder, files: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With a limit on the size of a file in place of a full disk: both are errors of writing."""
    monkeypatch.setattr(reembed, "SEGMENTS_PER_COMMIT", 4)
    before = answers(collection, old, files)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))

    new.at_batch = fill  # type: ignore[method-assign]
    try:
        with pytest.raises(OSError, match="fails or is full"):
            collection.re_embed(new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert answers(collection, old, files) == before
    new.at_batch = lambda: None  # type: ignore[method-assign]
    assert collection.re_embed(new).switched
    assert collection.check().problems == ()
