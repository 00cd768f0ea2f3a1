"""`fluxclip shards write`: the same bytes whatever happens on the way."""

import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from packed_pairs import SHARD_MB, changed, contents, copied

from fluxclip.data import shards
from fluxclip.data.sources import annotations, webdataset


def run(*arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fluxclip.cli", "shards", "write", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **options)  # type: ignore[call-overload,no-any-return]  # fmt: skip


def test_two_runs_are_equal_whatever_the_workers(pairs: Path, packed: Path, tmp_path: Path) -> None:
    shards.write(str(pairs), tmp_path / "again", side=96, shard_mb=SHARD_MB, workers=2)
    assert contents(tmp_path / "again") == contents(packed)


def test_killed_at_any_moment_it_goes_on(pairs: Path, packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    arguments = pairs, folder, "--side", 96, "--shard-mb", SHARD_MB
    for number, wait_s in ((0, 0.0), (1, 0.01), (2, 0.0)):
        with run(*arguments) as writer:
            while writer.poll() is None:
                if (folder / f"shard-{number:06d}.tar.part").exists():
                    time.sleep(wait_s)
                    writer.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.001)
        if number == 2 and json.loads((folder / "index.json").read_text())["complete"]:
            break  # the last shard takes but a moment
        assert writer.returncode == -signal.SIGKILL
        with pytest.raises(ValueError, match="not finished"):
            webdataset.read(folder)
    shards.write(str(pairs), folder, side=96, shard_mb=SHARD_MB)
    assert contents(folder) == contents(packed)


def test_stopped_before_a_shard_counts_it_is_written_again(
    pairs: Path, packed: Path, tmp_path: Path
) -> None:
    """All files are there and have grown, but the index is still the one before."""
    folder = copied(packed, tmp_path / "shards")
    index = json.loads((folder / "index.json").read_text())
    first = index["shards"][:1]
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    begun = first[0]["records"]
    number = int(json.loads(lines[begun])["name"].partition(".")[0])
    changed(
        folder, complete=False, shards=first, records=begun, following=number, sha256={},
        skipped=1 if number > 4 else 0,
        lengths={"records.jsonl": len(b"".join(lines[:begun])),
                 "skipped.jsonl": (folder / "skipped.jsonl").stat().st_size * (number > 4)},
    )  # fmt: skip
    shards.write(str(pairs), folder, side=96, shard_mb=SHARD_MB)
    assert contents(folder) == contents(packed)


def test_a_full_disk_is_one_line_and_leaves_nothing_half(
    pairs: Path, packed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    arguments = pairs, folder, "--side", 96, "--shard-mb", SHARD_MB
    limit = (60_000, 60_000)  # bytes of a file: as on a full disk, writing fails
    with run(*arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)) as w:
        _, said = w.communicate()
    assert w.returncode == 2
    assert said.count("\n") == 1 and "run the same command again" in said
    assert {path.name for path in folder.iterdir()} == {"index.json", "records.jsonl",
                                                       "skipped.jsonl"}  # fmt: skip
    with run(*arguments) as w:
        said, _ = w.communicate()
    assert w.returncode == 0 and "12 pairs in" in said and "1 skipped (7.7%)" in said
    assert contents(folder) == contents(packed)


def test_other_settings_other_pairs_and_other_things_are_refused(
    pairs: Path, packed: Path, tmp_path: Path
) -> None:
    folder = copied(packed, tmp_path / "shards")
    shards.write(str(pairs), folder, side=96, shard_mb=SHARD_MB)  # nothing to do
    assert contents(folder) == contents(packed)
    with pytest.raises(ValueError, match="begun with side = 96, not 64"):
        shards.write(str(pairs), folder, side=64, shard_mb=SHARD_MB)
    items = json.loads(pairs.read_text("utf-8"))
    items[3]["caption"] = "another"
    other = pairs.with_name("other.json")
    other.write_text(json.dumps(items), "utf-8")
    with pytest.raises(ValueError, match="begun with other pairs"):
        shards.write(str(other), folder, side=96, shard_mb=SHARD_MB)
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "mine").touch()
    with pytest.raises(ValueError, match="holds other things .mine."):
        shards.write(str(pairs), tmp_path / "things")
    with pytest.raises(ValueError, match="side must be at least 16"):
        shards.write(str(pairs), tmp_path / "new", side=8)


def test_files_of_the_user_stay_whatever_they_are_called(
    pairs: Path, packed: Path, tmp_path: Path
) -> None:
    folder = copied(packed, tmp_path / "shards")
    for name in ("mine.tar", "film.mkv.part", "shard-000099.tar"):
        (folder / name).write_text(name)
    shards.write(str(pairs), folder, side=96, shard_mb=SHARD_MB)
    changed(folder, complete=False)
    shards.write(str(pairs), folder, side=96, shard_mb=SHARD_MB)
    mine = {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".json"
            and path.name not in contents(packed)}  # fmt: skip
    assert set(mine) == {"mine.tar", "film.mkv.part", "shard-000099.tar"}
    assert all(name == text for name, text in mine.items())
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "film.mkv.part").touch()
    with pytest.raises(ValueError, match="holds other things .film.mkv.part"):
        shards.write(str(pairs), tmp_path / "parts")


def test_offsets_that_were_lost_are_written_again(
    pairs: Path, packed: Path, tmp_path: Path
) -> None:
    folder = copied(packed, tmp_path / "shards")
    (folder / "records.offsets").unlink()
    with pytest.raises(FileNotFoundError, match="write it again"):
        webdataset.read(folder)
    shards.write(str(pairs), folder, side=96, shard_mb=SHARD_MB)
    assert contents(folder) == contents(packed)


def test_too_many_broken_videos_end_it(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 13 .* more than 5%.*bad.mp4.*raise --most-broken"):
        shards.write(str(pairs), tmp_path / "a", side=32, most_broken=0.05)
    alone = pairs.with_name("alone.json")
    alone.write_text(json.dumps([{"video": "gone.mp4", "caption": "x"}]))
    for _ in range(2):  # the second time it was found before
        with pytest.raises(ValueError, match="no video of the 1 .*the first gone.mp4: no such fil"):
            shards.write(str(alone), tmp_path / "b", most_broken=1)
    with pytest.raises(ValueError, match="most_broken must be a share from 0 to 1, not 10"):
        shards.write(str(alone), tmp_path / "c", most_broken=10)


def test_pairs_of_one_missing_video_all_count(pairs: Path, tmp_path: Path) -> None:
    items = json.loads(pairs.read_text("utf-8"))[:2]
    gone = [{"video": "gone.mp4", "caption": f"{number}"} for number in range(5)]
    name = pairs.with_name("one_missing.json")
    name.write_text(json.dumps(items + gone), "utf-8")
    written = shards.write(f"{name}?caption=caption", tmp_path / "s", copy=True, most_broken=1)
    assert (written.records, written.num_skipped) == (2, 5)
    assert list(written.skipped) == ["gone.mp4"]


def test_pairs_without_files_and_folders_are_no_videos(
    pairs: Path, packed: Path, tmp_path: Path
) -> None:
    for source, name in (("synthetic", "20"), ("webdataset", str(packed))):
        with pytest.raises(ValueError, match=f"source '{source}' have no files of their own"):
            shards.write(name, tmp_path / "s", source=source)
    pairs.with_name("film.mp4.chunks").mkdir()
    chunked = pairs.with_name("chunked.json")
    chunked.write_text(json.dumps([{"video": "film.mp4.chunks", "caption": "x"}]))
    with pytest.raises(ValueError, match="film.mp4.chunks: it is a folder; shards take files"):
        shards.write(str(chunked), tmp_path / "s", most_broken=1)


def listed(pairs: Path, *names: str) -> Path:
    """The clips of the pairs, and others after the third."""
    items = [item for item in json.loads(pairs.read_text("utf-8"))[:9] if item["caption"] != "bad"]
    items[3:3] = [{"video": name, "caption": "x"} for name in names]
    path = pairs.with_name(f"{'-'.join(names)}.json")
    path.write_text(json.dumps(items), "utf-8")
    return path


CRASHING = "data_sources.crashing_source"


def test_a_video_that_crashes_or_hangs_its_decoder_is_skipped(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    (pairs.with_name("segfault.mp4")).write_bytes(b"")
    os.mkfifo(pairs.with_name("hang.mp4"))
    written = shards.write(
        str(listed(pairs, "segfault.mp4", "hang.mp4")), tmp_path / "s", copy=True, workers=2,
        source=CRASHING, timeout_s=5, most_broken=0.5,
    )  # fmt: skip
    assert written.skipped == {
        "segfault.mp4": "its decoder crashed (SIGSEGV)",
        "hang.mp4": "its decoder gave nothing for 5 s",
    }
    shards.write(str(listed(pairs)), tmp_path / "good", copy=True)
    there, good = webdataset.read(tmp_path / "s"), webdataset.read(tmp_path / "good")
    assert [r.captions for r in there] == [r.captions for r in good]


def test_a_worker_that_is_killed_is_not_the_fault_of_a_video(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    (pairs.with_name("killed.mp4")).write_bytes(b"")
    with pytest.raises(ChildProcessError, match="ended .SIGKILL. as it read .*killed.mp4"):
        shards.write(
            str(listed(pairs, "killed.mp4")), tmp_path / "s", copy=True, workers=1,
            source=CRASHING,
        )  # fmt: skip


def test_no_shard_is_larger_than_asked(pairs: Path, tmp_path: Path) -> None:
    shards.write(str(pairs), tmp_path / "s", copy=True, shard_mb=0.06144)
    several = 0
    for path in (tmp_path / "s").glob("*.tar"):
        with tarfile.open(path) as tar:
            several += (more := len(tar.getmembers()) > 2)
        assert not more or path.stat().st_size <= 61_440
    assert several


def test_copies_are_the_files_bit_for_bit(pairs: Path, tmp_path: Path) -> None:
    shards.write(str(pairs), tmp_path / "shards", copy=True)
    records = webdataset.read(tmp_path / "shards")
    originals = [r for r in annotations.read(pairs) if r.captions != ("bad",)]
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as tar:
        for record, original in zip(records, originals, strict=True):
            assert record.video.suffix == original.video.suffix
            file = tar.extractfile(record.video.name)
            assert file is not None and file.read() == original.video.read_bytes()
