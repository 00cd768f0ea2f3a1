"""Vectors in Parquet files: whole or not there, the same as those that `add` makes, never mixed."""

import json
import os
import random
import resource
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from layout_embedder import LayoutEmbedder

from retrieval import Collection, Hit, ShardReport, embed_shard, exchange, shard_file
from retrieval.exchange import shard_of
from retrieval.shard_file import marker_of
from retrieval.store import VideoRow

WINDOW_S = 0.8
SHARDS = 3


@pytest.fixture
def files(tmp_path: Path, clips: list[Path]) -> Path:
    """Eight clips and a still."""
    folder = tmp_path / "files"
    folder.mkdir()
    for path in [*clips[:8], min((clips[0].parents[1] / "stills").iterdir())]:
        shutil.copy(path, folder)
    return folder


def embed(files: Path, folder: Path, model: LayoutEmbedder, **more: Any) -> list[ShardReport]:
    """All shards, as the jobs of an array write them."""
    settings = {"window_s": WINDOW_S, "metadata": {"camera": "north", "year": 2024}} | more
    return [
        embed_shard(files, folder, shard=(number, SHARDS), model=model, **settings)
        for number in range(SHARDS)
    ]


def create(folder: Path, model: LayoutEmbedder, **more: Any) -> Collection:
    return Collection.create(folder, model=model, **{"window_s": WINDOW_S, **more})


def answers(collection: Collection, *, ids: bool = True) -> list[Hit]:
    hits = collection.search(vector=np.linspace(-1, 1, 48), k=1000)
    hits += collection.search(vector=np.ones(48), k=5, where={"camera": "north"}, group_by="video")
    hits += collection.search("red", k=5, target="text")
    return hits if ids else [replace(hit, id=0) for hit in hits]


@pytest.fixture
def added(tmp_path: Path, embedder: LayoutEmbedder, files: Path) -> Collection:
    """What the imports are compared with."""
    made = create(tmp_path / "added", embedder)
    made.add(files, metadata={"camera": "north", "year": 2024})
    return made


def test_shards_imported_are_what_add_makes(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path, added: Collection
) -> None:
    reports = embed(files, tmp_path / "shards", embedder)
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert names == [
        f"{beginning}shard-0000{number}-of-0000{SHARDS}{ending}"
        for beginning, ending in (("_", ".done"), ("", ".parquet")) for number in range(SHARDS)
    ]  # fmt: skip
    assert sum(report.videos for report in reports) == 9
    assert sum(report.segments for report in reports) == len(added)
    with create(tmp_path / "c", embedder) as collection:
        report = collection.import_shards(tmp_path / "shards")
        assert (report.added, report.skipped, report.failed, report.missing) == (9, 0, {}, ())
        assert collection._store.files() == added._store.files()
        assert answers(collection, ids=False) == answers(added, ids=False)
        # again: nothing is new; and what is imported need not be added
        revision = collection._store.revision()
        report = collection.import_shards(tmp_path / "shards")
        assert (report.added, report.skipped) == (0, 9)
        assert collection.add(files).skipped == 9
        assert collection._store.revision() == revision
        assert collection.check().problems == ()


def test_a_shard_is_made_anew_only_if_something_has_changed(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    folder = tmp_path / "shards"
    first = embed(files, folder, embedder)
    states = [os.stat(report.file).st_mtime_ns for report in first]
    again = embed(files, folder, embedder)
    assert again == [replace(report, was_done=True) for report in first]
    assert [os.stat(report.file).st_mtime_ns for report in again] == states

    extra = files / "extra.mp4"
    shutil.copy(min(files.glob("*.mp4")), extra)
    number = shard_of(str(extra), SHARDS)
    done = [report.was_done for report in embed(files, folder, embedder)]
    assert done == [at != number for at in range(SHARDS)]
    os.utime(extra, ns=(0, 0))
    assert not embed(files, folder, embedder)[number].was_done
    for more in ({"token_budget": 32}, {"window_s": 1.0}, {"stride_s": 0.4}, {"metadata": {}}):
        assert not any(report.was_done for report in embed(files, folder, embedder, **more))
    other = LayoutEmbedder(contrast=0.5)
    assert not any(report.was_done for report in embed(files, folder, other))
    marker_of(Path(again[0].file)).unlink()
    done = [report.was_done for report in embed(files, folder, other)]
    assert done == [False, True, True]
    with open(again[1].file, "ab") as file:  # not the file that the marker is about
        file.write(b"x")
    assert not embed(files, folder, other)[1].was_done


def test_a_video_stays_in_its_shard_and_shards_are_about_equal() -> None:
    paths = [f"/videos/{number}.mp4" for number in range(4000)]
    shards = np.bincount([shard_of(path, 16) for path in paths], minlength=16)
    assert shards.sum() == 4000 and shards.min() > 190 and shards.max() < 310
    assert shard_of("/videos/é.mp4", 16) == shard_of("/videos/é.mp4", 16)


def test_unreadable_files_are_noted_and_tried_again_without_the_marker(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    broken = files / "broken.mp4"
    broken.write_bytes(b"")
    number = shard_of(str(broken), SHARDS)
    for was_done in (False, True):
        report = embed(files, tmp_path / "shards", embedder)[number]
        assert report.was_done == was_done
        assert list(report.failed) == [str(broken)] and report.named_failed == ()
    [named] = [
        embed_shard(broken, tmp_path / "named", shard=(0, 1), model=embedder)
    ]  # an array of one
    assert named.named_failed == (str(broken),) and named.videos == 0
    for shard in ((3, 3), (-1, 3)):
        with pytest.raises(ValueError, match="there is no shard"):
            embed_shard(files, tmp_path / "shards", shard=shard, model=embedder)


def test_what_cannot_be_looked_into_leaves_finished_shards_alone(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sub = files / "sub"
    sub.mkdir()
    shutil.copy(min(files.glob("*.mp4")), sub / "one.mp4")
    folder = tmp_path / "shards"
    embed(files, folder, embedder)
    states = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    def all_refuse(said: str, given: Any = files) -> None:
        for number in range(SHARDS):
            with pytest.raises(OSError, match=said):
                embed_shard(
                    given, folder, shard=(number, SHARDS), model=embedder, window_s=WINDOW_S,
                    metadata={"camera": "north", "year": 2024},
                )  # fmt: skip
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == states

    scandir = os.scandir

    def fail(path: Any) -> Any:  # root may look into every folder
        if str(path) == str(sub):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        all_refuse(f"{sub}: Permission denied; no shard is made without it")
    files.rename(tmp_path / "away")
    all_refuse(f"{files}: No such file")
    (tmp_path / "empty").mkdir()
    all_refuse("empty: no video or image in it", [tmp_path / "away", tmp_path / "empty"])


def test_a_file_on_its_way_is_left_to_whoever_may_be_at_work_on_it(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    here, shard = os.uname().nodename, ".shard-00000-of-00001.parquet"
    kept = {f"{shard}.{here}.{os.getppid()}.tmp", f"{shard}.other.host.1.tmp", f"{shard}.mine.tmp"}
    left = {
        f"{shard}.{here}.{ended.pid}.tmp",
        f"{shard}.other.host.2.tmp",
        f"._shard-00000-of-00001.done.{here}.{ended.pid}.tmp",
    }
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in kept | left:
        (folder / name).touch()
    os.utime(folder / f"{shard}.other.host.2.tmp", ns=(0, 0))
    embed_shard(files, folder, shard=(0, 1), model=embedder)
    assert {path.name for path in folder.glob(".*")} == kept


def test_a_shard_that_is_replaced_meanwhile_is_not_read_as_what_it_was(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    report = embed_shard(files, tmp_path / "s", shard=(0, 1), model=embedder)
    opened = shard_file.ShardFile(Path(report.file))
    other = LayoutEmbedder(contrast=0.5)  # of the same width
    embed_shard(files, tmp_path / "s", shard=(0, 1), model=other)
    with pytest.raises(shard_file.DamagedError, match="replaced meanwhile: import again"):
        next(opened.videos())


def test_too_little_memory_is_no_damage() -> None:
    with pytest.raises(MemoryError), shard_file._damage():
        raise MemoryError


def test_a_killed_job_leaves_no_shard(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def fail(*_: object) -> None:
        raise Killed

    folder = tmp_path / "shards"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)  # all is written, nothing has its name
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # nor is anything tidied up
        with pytest.raises(Killed):
            embed(files, folder, embedder)
    [left] = folder.iterdir()
    assert left.name.startswith(".")
    with create(tmp_path / "c", embedder) as collection:
        with pytest.raises(ValueError, match=r"no file that ends in \.parquet"):
            collection.import_shards(folder)
        ended = subprocess.Popen(["true"])
        ended.wait()
        left.rename(folder / left.name.replace(f".{os.getpid()}.", f".{ended.pid}."))
        embed(files, folder, embedder)
        assert not list(folder.glob(".*"))
        assert collection.import_shards(folder).added == 9


def test_export_and_import_give_the_same_answers_and_ids(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path, added: Collection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(exchange, "ROWS_PER_GROUP", 5)
    monkeypatch.setattr(shard_file, "ROWS_PER_GROUP", 8)
    some = min(files.glob("*.mp4"))
    added.remove(video=max(files.glob("*.mp4")))
    [*_, last] = [hit.id for hit in answers(added) if hit.video == str(some)]
    added.remove(id=last)  # a gap in the ids
    added.add_texts(["red", "green", "a blue sea"])
    report = added.export_shards(tmp_path / "exported", rows_per_file=9)
    assert (report.videos, report.segments, report.texts) == (8, len(added), 3)
    assert report.files >= 3
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(FileExistsError):
        added.export_shards(tmp_path / "exported")

    with Collection.create_for(tmp_path / "c", tmp_path / "exported", model=embedder) as copy:
        got = copy.import_shards(tmp_path / "exported")
        assert (got.added, got.skipped, got.texts, got.failed) == (8, 0, 3, {})
        assert answers(copy) == answers(added)
        for key in ("fingerprint", "token_budget", "cut", "window_s", "stride_s"):
            assert copy.info()[key] == added.info()[key]
        # the exporter goes on: what is new comes after what was imported, with its ids
        shutil.copy(some, files / "new.mp4")
        added.add(files)
        added.export_shards(tmp_path / "later")
        got = copy.import_shards(tmp_path / "later")
        assert (got.added, got.skipped, got.texts) == (2, 8, 0)
        assert answers(copy) == answers(added)
        # an id that was given out never comes again
        copy.remove(video=files / "new.mp4")
        assert copy.import_shards(tmp_path / "later").added == 1
        new = {hit.id for hit in answers(copy) if hit.video == str(files / "new.mp4")}
        assert min(new) > max(hit.id for hit in answers(added))

    # into a collection of others: under new ids
    with create(tmp_path / "others", embedder) as others:
        others.add(files / "new.mp4")
        held = {hit.id for hit in answers(others)}
        others.import_shards(tmp_path / "exported")
        found = [hit for hit in answers(others) if hit.video != str(files / "new.mp4")]
        assert not held & {hit.id for hit in found if hit.video}
        assert others._store.last_segment_id() == len(others)


def test_changed_videos_replace_what_was_there(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    one, two, *_ = sorted(files.glob("*.mp4"))
    embed(files, tmp_path / "shards", embedder)
    with create(tmp_path / "c", embedder) as collection:
        collection.import_shards(tmp_path / "shards")
        before = {hit.id for hit in answers(collection) if hit.video == str(one)}
        shutil.copy(two, one)
        embed(files, tmp_path / "shards", embedder)
        report = collection.import_shards(tmp_path / "shards")
        assert (report.added, report.skipped) == (1, 8)
        found = answers(collection)
        assert not before & {hit.id for hit in found}
        spans = [
            sorted({(hit.start_s, hit.score) for hit in found if hit.video == str(path)})
            for path in (one, two)
        ]
        assert spans[0] == spans[1]


def test_what_is_held_wins_over_older_shards(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    one, two, *_ = sorted(files.glob("*.mp4"))
    embed(files, tmp_path / "shards", embedder)
    with create(tmp_path / "c", embedder) as collection:
        shutil.copy(two, one)  # content and time are later than the shards
        os.utime(two)
        collection.add([one, two], metadata={"camera": "south"})
        held, before = collection._store.files(), answers(collection)
        report = collection.import_shards(tmp_path / "shards")
        assert (report.added, report.skipped) == (7, 2)
        assert held.items() <= collection._store.files().items()
        found = {hit.id: hit for hit in answers(collection)}
        # what was held is there as it was, with the keys it lacked if it is the same content
        for hit in before:
            year = {} if hit.video == str(one) else {"year": 2024}
            assert found[hit.id].metadata == {"camera": "south", **year}
        revision = collection._store.revision()
        collection.import_shards(tmp_path / "shards")
        assert collection._store.revision() == revision


def test_shards_of_two_arrays_in_a_folder_are_refused(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    embed(files, tmp_path / "s", embedder)
    report = embed_shard(files, tmp_path / "s", shard=(0, 1), model=embedder, window_s=WINDOW_S)
    with create(tmp_path / "c", embedder) as collection:
        with pytest.raises(ValueError, match="shards of arrays of 1 and of 3: remove"):
            collection.import_shards(tmp_path / "s")
        assert collection.import_shards(report.file).added == 9


def test_files_made_in_two_ways_make_no_collection(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    for name, window_s in (("a", 1.0), ("b", 2.0)):
        embed_shard(files, tmp_path / name, shard=(0, 1), model=embedder, window_s=window_s)
    with pytest.raises(ValueError, match="into collections of their own"):
        Collection.create_for(tmp_path / "c", [tmp_path / "a", tmp_path / "b"], model=embedder)
    assert not (tmp_path / "c").exists()


def test_an_export_removes_only_what_is_left_of_its_own_name(
    tmp_path: Path, added: Collection
) -> None:
    for name in (".e.123.unfinished", ".e.2.123.unfinished", ".e.x.unfinished"):
        (tmp_path / name).mkdir()
    added.export_shards(tmp_path / "e")
    left = {path.name for path in tmp_path.glob(".*")}
    assert left == {".e.2.123.unfinished", ".e.x.unfinished"}


def test_texts_go_out_in_blocks(
    tmp_path: Path, added: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "ROWS_PER_GROUP", 3)
    monkeypatch.setattr(shard_file, "ROWS_PER_GROUP", 3)
    added.add_texts([f"text {number}" for number in range(7)])
    assert added.export_shards(tmp_path / "e").texts == 7
    assert pq.read_metadata(tmp_path / "e" / exchange.TEXTS).num_row_groups == 3
    blocks = list(added._store.text_blocks(rows=3))
    texts, vectors_ND = added._store.texts()
    assert [row for rows, _ in blocks for row in rows] == texts
    np.testing.assert_array_equal(np.concatenate([vectors for _, vectors in blocks]), vectors_ND)


def test_ids_that_do_not_ascend_are_damage(
    tmp_path: Path, added: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_file, "ROWS_PER_GROUP", 8)  # read by two rows
    settings = added._store.settings()
    [state, *_] = added._store.files().values()
    _, vectors_ND = added._store.vectors()
    spans = [(float(i), float(i + 1)) for i in range(4)]
    video = VideoRow("/a.mp4", state, 4.0, spans, vectors_ND[:4], ids=[5, 6, 3, 4])
    with shard_file.ShardWriter(tmp_path / "a.parquet", settings) as file:
        file.add(video)
    with pytest.raises(shard_file.DamagedError, match="'/a.mp4': the ids of its segments do not"):
        list(shard_file.ShardFile(tmp_path / "a.parquet").videos())


def test_other_models_budgets_and_cuts_are_refused_in_one_line(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    embed(files, tmp_path / "shards", embedder, token_budget=32)
    others: list[tuple[LayoutEmbedder, dict[str, Any]]] = [
        (LayoutEmbedder(contrast=0.5), {"token_budget": 32}),
        (LayoutEmbedder(cells=2), {"token_budget": 32}),
        (embedder, {}),
        (embedder, {"token_budget": 32, "window_s": 1.0}),
        (embedder, {"token_budget": 32, "stride_s": 0.4}),
    ]
    for number, (model, settings) in enumerate(others):
        with create(tmp_path / str(number), model, **settings) as collection:
            with pytest.raises(ValueError, match="was made by layout@.*; collection") as said:
                collection.import_shards(tmp_path / "shards")
            assert "\n" not in str(said.value) and len(collection) == 0
    with create(tmp_path / "fits", embedder, token_budget=32, stride_s=WINDOW_S) as collection:
        assert collection.import_shards(tmp_path / "shards").added == 9
    with pytest.raises(ValueError, match="made by layout@.*this model is layout@"):
        Collection.create_for(tmp_path / "new", tmp_path / "shards", model=others[0][0])
    with pytest.raises(ValueError, match="'layout' that made these files cannot be loaded"):
        Collection.create_for(tmp_path / "new", tmp_path / "shards")
    assert not (tmp_path / "new").exists()


def test_without_a_marker_a_file_must_be_named(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    # which videos are in which shard is told by where this test runs
    reports = sorted(embed(files, tmp_path / "s", embedder), key=lambda report: -report.videos)
    first, second, third = (Path(report.file) for report in reports)
    marker_of(first).unlink()
    second.unlink()
    with create(tmp_path / "c", embedder) as collection:
        report = collection.import_shards(tmp_path / "s")
        assert list(report.failed) == [str(first)] and "marker" in report.failed[str(first)]
        assert report.missing == (str(second),)
        assert report.added == reports[2].videos
        report = collection.import_shards([tmp_path / "s", first])
        assert report.failed == {} and report.added == reports[0].videos >= 3
        with pytest.raises(ValueError, match=r"no file that ends in \.parquet"):
            collection.import_shards(files)
        assert "No such file" in collection.import_shards(second).failed[str(second)]
        assert "no Parquet" in collection.import_shards(min(files.iterdir())).failed.popitem()[1]


def test_a_damaged_file_is_named_and_nothing_wrong_is_stored(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path, added: Collection
) -> None:
    def rows(collection: Collection) -> dict[tuple[str, float], Hit]:
        hits = collection.search(vector=np.linspace(-1, 1, 48), k=1000)
        return {(hit.video, hit.start_s): replace(hit, id=0) for hit in hits}

    good = rows(added)
    whole = Path(embed_shard(
        files, tmp_path / "s", shard=(0, 1), model=embedder, window_s=WINDOW_S,
        metadata={"camera": "north", "year": 2024},
    ).file)  # fmt: skip
    content = whole.read_bytes()
    damaged = tmp_path / "damaged.parquet"
    rng = random.Random(0)
    named = []
    with create(tmp_path / "c", embedder) as collection:
        for trial in range(60):
            bad = bytearray(content)
            if trial % 4:
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            else:
                del bad[rng.randrange(len(bad)) :]
            damaged.write_bytes(bad)
            try:
                report = collection.import_shards(damaged)
            except ValueError as error:  # what it says of its model
                assert str(damaged) in str(error)
                named.append(trial)
                continue
            for reason in report.failed.values():
                assert "\n" not in reason
            named += [trial] if list(report.failed) == [str(damaged)] else []
            assert rows(collection).items() <= good.items()
            if report.added:
                collection.remove(video=list(collection._store.files()))
    # whatever was cut off is noticed; there are bits in a file's end that nothing is read from
    assert set(range(0, 60, 4)) <= set(named) and len(named) >= 40


def test_rows_that_are_wrong_are_refused(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path
) -> None:
    import pyarrow as pa

    report = embed_shard(files, tmp_path / "s", shard=(0, 1), model=embedder, window_s=WINDOW_S)
    table = pq.read_table(report.file)
    n = len(table)
    changes: dict[str, tuple[str, Any]] = {
        "not absolute": ("video", pa.array(["a.mp4"] * n)),
        "no JSON object": ("metadata", pa.array(["[1]"] * n)),
        "must be text": ("metadata", pa.array(['{"a": null}'] * n)),
        "a segment is": ("start_s", pa.array([9.0] * n)),
        "without a value": ("sha256", pa.array([None] * n, pa.string())),
        "not of length 1": (
            "vector", pa.FixedSizeListArray.from_arrays(pa.array(np.ones(48 * n, "f4")), 48)
        ),
    }  # fmt: skip
    wrong = tmp_path / "wrong.parquet"
    with create(tmp_path / "c", embedder) as collection:
        for reason, (name, column) in changes.items():
            at = table.schema.names.index(name)
            changed = table.set_column(at, name, column).replace_schema_metadata(
                table.schema.metadata
            )
            pq.write_table(changed, wrong)
            assert reason in collection.import_shards(wrong).failed[str(wrong)]
        pq.write_table(pa.concat_tables([table, table]), wrong)
        assert "do not stand together" in collection.import_shards(wrong).failed[str(wrong)]
        pq.write_table(table.replace_schema_metadata(), wrong)
        assert "which model made it" in collection.import_shards(wrong).failed[str(wrong)]
        pq.write_table(table.drop_columns(["size"]), wrong)
        assert "lacks the columns size" in collection.import_shards(wrong).failed[str(wrong)]


def test_an_import_takes_batches_of_bounded_size(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path, added: Collection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(shard_file, "ROWS_PER_GROUP", 8)
    embed(files, tmp_path / "s", embedder)
    most = max(len(video.segments) for video in exchange._stored_videos(added._store))
    with create(tmp_path / "c", embedder) as collection:
        sizes = []
        put_videos = collection._store.put_videos
        monkeypatch.setattr(
            collection._store, "put_videos",
            lambda videos: (
                sizes.append(sum(len(video.segments) for video in videos)), put_videos(videos)
            ),
        )  # fmt: skip
        done: list[tuple[int, int]] = []
        collection.import_shards(
            tmp_path / "s", progress=lambda now, total, path: done.append((now, total))
        )
        assert answers(collection, ids=False) == answers(added, ids=False)
        assert max(sizes) <= 8 + most and len(sizes) > SHARDS
        assert done == sorted(done) and done[-1] == (len(added), len(added))


def test_pyarrow_alone_reads_what_is_exported(tmp_path: Path, added: Collection) -> None:
    added.export_shards(tmp_path / "exported")
    table = pq.read_table(tmp_path / "exported")
    vectors = np.stack(table["vector"].to_numpy())
    about = json.loads(table.schema.metadata[b"fluxclip"])
    ids, stored = added._store.vectors()
    assert table["id"].to_pylist() == ids.tolist()
    np.testing.assert_array_equal(vectors, stored)
    assert (about["fingerprint"], about["dim"]) == (added.info()["fingerprint"], 48)
    assert json.loads(table["metadata"][0].as_py()) == {"camera": "north", "year": 2024}


def test_an_empty_collection_goes_out_and_in(tmp_path: Path, embedder: LayoutEmbedder) -> None:
    with create(tmp_path / "a", embedder) as empty:
        assert asdict(empty.export_shards(tmp_path / "e"))["files"] == 1
    with Collection.create_for(tmp_path / "b", tmp_path / "e", model=embedder) as collection:
        assert collection.import_shards(tmp_path / "e").added == 0


def test_a_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, embedder: LayoutEmbedder, files: Path, added: Collection
) -> None:
    """With a limit on the size of a file in place of a full disk: both are errors of writing."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*shard-00000-of-00001\.parquet"):
            embed_shard(files, tmp_path / "shards", shard=(0, 1), model=embedder)
        with pytest.raises(OSError, match="cannot write"):
            added.export_shards(tmp_path / "exported")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "shards").iterdir())
    assert not list(tmp_path.glob("*exported*"))
    assert added.export_shards(tmp_path / "exported").videos == 9
