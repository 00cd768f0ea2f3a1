"""Broken files among good ones: counted by kind, replaced by the next, and never a wrong frame."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from faulty_source import FaultyRecords

from fluxclip.data import workers as pool
from fluxclip.data.batch import Step
from fluxclip.data.faults import Fault
from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.sources import Record, Records
from fluxclip.data.sources.annotations import read
from fluxclip.data.workers import steps
from fluxclip.tokens.budget import FluxSampling
from fluxclip.video import Clip, read_clip

SAMPLING = FluxSampling((2, 4, 1), (28, 56, 28), (4, 64), (16, 8))


def remuxed(source: Path, path: Path, *, table: str, most: int = 1000) -> bytes:
    """`most` of the coded pictures, with an mp4's table of contents at the "start" or the "end"."""
    with av.open(str(source)) as old:
        options = {"movflags": "+faststart"} if table == "start" else {}
        with av.open(str(path), "w", options=options) as new:
            stream = old.streams.video[0]
            target = new.add_stream_from_template(stream)
            new.start_encoding()
            for packet in islice(old.demux(stream), most):
                if packet.dts is not None:
                    packet.stream = target
                    new.mux(packet)
    return path.read_bytes()


def break_files(folder: Path, good: Path) -> dict[Path, str]:
    """Files broken in every way, made from a good one, and the kind that each is counted as."""
    headed = remuxed(good, folder / "headed.mp4", table="start")
    tailed = remuxed(good, folder / "tailed.mp4", table="end")
    matroska = remuxed(good, folder / "good.mkv", table="end")
    data = headed.index(b"mdat") + 4
    size = len(headed)
    contents = {
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"this is no video\n" * 200, "not a video"),
        "picture.png": (headed, "not a video"),
        "without-table.mp4": (tailed[: tailed.rindex(b"moov") - 4], "truncated"),
        "head-only.mp4": (headed[:data], "truncated"),
        "zeroed.mp4": (headed[: size // 3] + bytes(size // 3) + headed[2 * size // 3 :], "damaged"),
        "cut.mkv": (matroska[: len(matroska) // 2], "truncated"),
        "few-bytes.png": (headed[:40], "not a video"),
        "no-frames.avi": (remuxed(good, folder / "none.avi", table="end", most=0), "no frames"),
        **{
            f"cut-{percent}.mp4": (headed[: data + (size - data) * percent // 100], "truncated")
            for percent in (30, 60, 90)
        },
    }
    kinds = {folder / "missing.mp4": "missing"}
    for name, (content, kind) in contents.items():
        (folder / name).write_bytes(content)
        kinds[folder / name] = kind
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    kinds |= {folder / "folder.mp4": "not a video", folder / "pipe.mp4": "not a video"}
    if os.geteuid() != 0:  # who may read everything
        shutil.copy(good, folder / "locked.mp4")
        (folder / "locked.mp4").chmod(0)
        kinds[folder / "locked.mp4"] = "not readable"
    return kinds


def among_good(broken: list[Path], emoji: Path) -> list[Record]:
    """A good record after each broken one, and between some of them."""
    good = read(emoji / "train.json")[: len(broken)]
    bad = [Record(path, (path.name,), None) for path in broken]
    # the last one is broken, so that the next is the first
    order = [record for pair in zip(good, bad, strict=True) for record in pair]
    return [*order[2:4:-1], *order[4:], *order[:4]]


def mended(records: list[Record], broken: list[Path]) -> Records:
    """The records, with each broken one replaced by the next that is good."""
    size = len(records)
    nexts = ([records[(i + step) % size] for step in range(size)] for i in range(size))
    return Records([next(r for r in these if r.video not in broken) for these in nexts])


def made(records: Records, *, count: int, workers: int = 0, timeout_s: float = 60.0) -> list[Step]:
    data = Steps([Source(records, 4)], SAMPLING, Augment(), seed=1)
    return list(steps(data, start=0, stop=count, workers=workers, timeout_s=timeout_s))


def assert_equal(one: list[Step], other: list[Step]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.number, a.draw) == (b.number, b.draw)
        for p, q in zip(a.batches, b.batches, strict=True):
            assert torch.equal(p.frames_BTHWC, q.frames_BTHWC)
            assert (p.captions, p.names, p.places) == (q.captions, q.names, q.places)


def faults(found: list[Step]) -> dict[str, Fault]:
    return {path: fault for step in found for path, fault in step.unreadable.items()}


def test_every_kind_of_broken_file_is_counted_and_the_next_takes_its_place(
    emoji: Path, tmp_path: Path
) -> None:
    kinds = break_files(tmp_path, emoji / "clips" / "1f300.mp4")
    records = among_good(list(kinds), emoji)
    count = -(-len(records) // 4)  # an epoch
    alone = made(Records(records), count=count)
    found = faults(alone)
    assert {path: fault.kind for path, fault in found.items()} == {
        str(path): kind for path, kind in kinds.items()
    }
    for path, fault in found.items():
        assert fault.reason and path not in fault.reason and "\n" not in fault.reason
    assert_equal(alone, made(mended(records, list(kinds)), count=count))
    for workers in (0, 2):
        again = made(Records(records), count=count, workers=workers)
        assert_equal(alone, again)
        assert [step.unreadable for step in again] == [step.unreadable for step in alone]


def nearest(found: Clip, clip: Clip) -> list[int]:
    """For each frame found, the number of the frame of the whole clip that it is like."""
    one, other = (c.frames_THWC.astype(np.float32) for c in (found, clip))
    return [int(np.abs(frame - other).mean((1, 2, 3)).argmin()) for frame in one]


def test_a_file_broken_anywhere_is_refused_or_gives_its_own_frames_each_once(
    emoji: Path, tmp_path: Path
) -> None:
    good = emoji / "clips" / "1f300.mp4"
    whole = remuxed(good, tmp_path / "whole.mp4", table="start")
    clip = read_clip(tmp_path / "whole.mp4", num_frames=6)
    outcomes = set()
    for twentieth in range(1, 20):
        cut, zeroed = tmp_path / "cut.mp4", tmp_path / "zeroed.mp4"
        at = len(whole) * twentieth // 20
        cut.write_bytes(whole[:at])
        zeroed.write_bytes(whole[: at - 200] + bytes(200) + whole[at:])
        for path in (cut, zeroed):
            try:
                found = read_clip(path, num_frames=6)
            except ValueError as error:
                outcomes.add(getattr(error, "kind", None))
            else:
                assert (found.times_s == clip.times_s).all()
                # what the coding itself cannot tell may be a wrong patch, but no other frame
                assert nearest(found, clip) == list(range(6)), (path, twentieth)
    assert {"truncated", "damaged"} <= outcomes and None not in outcomes


def test_a_file_that_goes_while_a_run_reads_is_missing(emoji: Path, tmp_path: Path) -> None:
    good = read(emoji / "train.json")[:3]
    shutil.copy(good[0].video, tmp_path / "gone.mp4")
    records = Records([Record(tmp_path / "gone.mp4", ("gone",), None), *good])
    data = Steps([Source(records, 4)], SAMPLING, Augment(), seed=1)
    assert data[0].unreadable == {}
    (tmp_path / "gone.mp4").unlink()
    assert [fault.kind for fault in data[1].unreadable.values()] == ["missing"]
    # what was known of the file makes no difference
    assert_equal([data[1]], made(records, count=2)[1:])


def faulty(names: list[str], emoji: Path, folder: Path) -> tuple[FaultyRecords, list[Path]]:
    """Good clips, of which some make the decoder do as they are called."""
    good = read(emoji / "train.json")[:6]
    bad = [folder / f"{name}.mp4" for name in names]
    for path in bad:
        shutil.copy(good[0].video, path)
    pairs = [Record(path, (path.name,), None) for path in bad]
    return FaultyRecords([*good[:3], *pairs, *good[3:]]), bad


def test_a_decoder_that_hangs_or_crashes_is_cut_off_and_its_file_passed_over(
    emoji: Path, tmp_path: Path
) -> None:
    records, bad = faulty(["hang", "segfault", "strange"], emoji, tmp_path)
    data = Steps([Source(records, 4)], SAMPLING, Augment(), seed=1)
    found = []
    for step in steps(data, start=0, stop=5, workers=2, timeout_s=8):
        found.append(step)
        for process in multiprocessing.active_children():
            for number in (signal.SIGINT, signal.SIGTERM):  # are the parent's to answer
                os.kill(process.pid or 0, number)
    assert multiprocessing.active_children() == []
    expected = {
        str(bad[0]): Fault("timeout", "not read within 8 s"),
        str(bad[1]): Fault("crash", "its decoder crashed (SIGSEGV)"),
        str(bad[2]): Fault("error", "RuntimeError: no idea"),
    }
    assert faults(found) == expected
    assert_equal(found, made(mended(list(records), bad), count=5))
    # and nobody opens them again, who would hang or crash here
    hopeless = {path: expected[path] for path in map(str, bad[:2])}
    assert data.hopeless == hopeless
    again = list(steps(data, start=0, stop=5, workers=0))
    assert_equal(found, again)
    assert [step.unreadable for step in again] == [step.unreadable for step in found]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("killed", r"ended by SIGKILL while it read .*killed\.mp4; if memory ran out, lower"),
        ("exit", r"ended by exit code 3 while it read .*exit\.mp4"),
    ],
)
def test_a_worker_that_ends_otherwise_stops_the_run(
    emoji: Path, tmp_path: Path, name: str, reason: str
) -> None:
    records, _ = faulty([name], emoji, tmp_path)
    with pytest.raises(ChildProcessError, match=reason):
        made(records, count=2, workers=1)
    assert multiprocessing.active_children() == []


def test_where_file_after_file_hangs_it_is_not_the_files(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, _ = faulty(["hang-1", "hang-2"], emoji, tmp_path)
    monkeypatch.setattr(pool, "MOST_LOST", 2)
    with pytest.raises(ChildProcessError, match=r"2 files in a row ended a worker .*hang-\d\.mp4"):
        made(FaultyRecords(records[3:5]), count=1, workers=1, timeout_s=4)


def test_what_goes_wrong_in_a_worker_comes_home_as_it_was(emoji: Path, tmp_path: Path) -> None:
    records = Records([Record(tmp_path / "none.mp4", ("none",), None)])
    with pytest.raises(ValueError, match=r"^no file of a source can be read: .*none\.mp4: no such"):
        made(records, count=1, workers=1)


def test_workers_end_with_a_run_that_is_killed(emoji: Path, tmp_path: Path) -> None:
    """Even those that hang in a decoder."""
    shutil.copy(emoji / "clips" / "1f300.mp4", tmp_path / "sleep.mp4")
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from faulty_source import FaultyRecords
        from test_faults import SAMPLING
        from fluxclip.data.loader import Augment, Source, Steps
        from fluxclip.data.workers import steps
        from fluxclip.data.sources import Record
        if __name__ == "__main__":
            import multiprocessing, threading, time
            records = FaultyRecords([Record(Path({str(tmp_path / "sleep.mp4")!r}), ("a",), None)])
            data = Steps([Source(records, 1)], SAMPLING, Augment(), seed=0)
            made = steps(data, start=0, stop=1, workers=1, timeout_s=600)
            threading.Thread(target=next, args=(made,), daemon=True).start()
            while not multiprocessing.active_children():
                time.sleep(0.1)
            print(multiprocessing.active_children()[0].pid, flush=True)
            time.sleep(600)
    """)
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = Path(f"/proc/{parent.stdout.readline().strip()}")
        opened = tmp_path / "sleep.mp4"
        assert worker.exists() and opened.exists()
        parent.kill()
    for _ in range(600):
        if not worker.exists():
            return
        time.sleep(0.1)
    raise AssertionError("the worker goes on")
