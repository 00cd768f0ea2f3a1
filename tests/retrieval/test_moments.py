"""Collections cut by windows and by shots: hits say where in a long video they are."""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from layout_embedder import LayoutEmbedder

from fluxclip import cli
from fluxclip.video import Segment, probe
from retrieval import Collection
from retrieval.database import DATABASE

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """scripts/bench_moments.py as a module."""
    sys.path.insert(0, str(SCRIPTS))
    import bench_moments

    yield bench_moments
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def joined(
    bench: ModuleType, emoji: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[tuple[Path, Segment]]]:
    """A video of ten clips, and where each of them is in it."""
    path = tmp_path_factory.mktemp("joined") / "long.mp4"
    clips = sorted((emoji / "clips").glob("*.mp4"))[::40][:10]
    return path, list(zip(clips, bench.join(clips, path), strict=True))


def moment_of(collection: Collection, clip: Path) -> Segment:
    [hit] = collection.search(video=clip, k=1)
    return Segment(hit.start_s, hit.end_s)


@pytest.mark.parametrize(
    ("options", "least"),
    [({"window_s": 3.0, "stride_s": 1.0}, 0.5), ({"cut": "shots"}, 0.8)],
)
def test_a_clip_is_found_where_it_was_put(
    bench: ModuleType,
    joined: tuple[Path, list[tuple[Path, Segment]]],
    embedder: LayoutEmbedder,
    tmp_path: Path,
    options: dict,
    least: float,
) -> None:
    path, parts = joined
    with Collection.create(tmp_path / "c", model=embedder, **options) as collection:
        collection.add(path)
        found = [(moment_of(collection, clip), truth) for clip, truth in parts]
    overlaps = [bench.overlap(moment, truth) for moment, truth in found]
    assert np.mean(overlaps) >= least
    assert sum(value > 0 for value in overlaps) >= 8


def test_joints_are_found(
    bench: ModuleType, joined: tuple[Path, list[tuple[Path, Segment]]]
) -> None:
    path, parts = joined
    counted = bench.cuts_found([bench.Moment("", str(path), truth) for _, truth in parts])
    assert counted["joints"] == 9
    assert counted["f1"] >= 0.9


def test_segments_are_cut_as_the_collection_says(
    film: Path, emoji: Path, embedder: LayoutEmbedder, tmp_path: Path
) -> None:
    still = sorted((emoji / "stills").iterdir())[0]
    with Collection.create(tmp_path / "c", model=embedder, cut="shots", window_s=4.0) as opened:
        report = opened.add([film, still])
        assert (report.added, report.failed) == (2, {})
        info = opened.info()
        assert (info["cut"], info["window_s"], info["stride_s"]) == ("shots", 4.0, None)
        hits = sorted(opened.search(video=film, k=100), key=lambda hit: hit.start_s)
    spans = [(hit.start_s, hit.end_s) for hit in hits if hit.video == str(film)]
    assert spans[0][0] == 0
    assert spans[-1][1] == probe(film).duration_s
    assert all(end_s - start_s < 1.25 * 4.0 for start_s, end_s in spans)
    assert [(hit.start_s, hit.end_s) for hit in hits if hit.video == str(still)] == [(0, 0)]


def test_windows_may_overlap(film: Path, embedder: LayoutEmbedder, tmp_path: Path) -> None:
    with Collection.create(
        tmp_path / "c", model=embedder, window_s=10.0, stride_s=5.0
    ) as collection:
        collection.add(film)
        starts_s = sorted(hit.start_s for hit in collection.search(video=film, k=100))
    assert starts_s == [0.0, 5.0, 10.0, pytest.approx(14.0)]


def test_a_collection_of_before_keeps_its_windows(
    film: Path, embedder: LayoutEmbedder, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    Collection.create(folder, model=embedder, window_s=6.0).close()
    with closing(sqlite3.connect(folder / DATABASE)) as database, database:
        done = database.execute("DELETE FROM settings WHERE key IN ('cut', 'stride_s')")
        assert done.rowcount == 2
    with Collection.open(folder, model=embedder) as collection:
        collection.add(film)
        assert len(collection) == 4


def test_the_command_line_refuses_what_would_leave_gaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "emoji-tiny", "--cut", "shots", "--window-s", "4", "--stride-s", "5"]
    command = ["fluxclip", "index", "create", str(tmp_path / "c"), *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "stride_s must be more than 0 and at most window_s=4" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
