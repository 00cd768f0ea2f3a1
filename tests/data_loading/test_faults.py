"""Broken files among good ones: counted by kind, replaced by the next, and never a wrong frame."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import av
import numpy as np
import pytest
import torch
from faulty_source import FaultyRecords
from safetensors.torch import save_file

from fluxclip.data import workers as pool
from fluxclip.data.batch import Step
from fluxclip.data.faults import Fault
from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.sources import Record, Records
from fluxclip.data.sources.annotations import read
from fluxclip.data.teacher import TeacherFeatures
from fluxclip.data.workers import steps
from fluxclip.tokens.budget import FluxSampling
from fluxclip.video import Clip, VideoError, read_clip

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
    with pytest.raises(ChildProcessError, match="2 files in a row ended a worker ") as error:
        made(FaultyRecords(records[3:5]), count=1, workers=1, timeout_s=4)
    assert "hang-1.mp4" in str(error.value) and "hang-2.mp4" in str(error.value)


def test_files_that_crash_between_others_of_one_step_are_not_in_a_row(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, bad = faulty(["segfault-1", "segfault-2"], emoji, tmp_path)
    good = [record for record in records if record.video not in bad]
    data = Steps([Source(records, 3)], SAMPLING, Augment(), seed=5)
    # a good one is read before each of the bad
    _, second, third = data.order(0, 0)
    assert third != second + 1
    placed = [good[i % len(good)] for i in range(len(records))]
    placed[second], placed[third] = (Record(path, (path.name,), None) for path in bad)
    data.sources = [Source(FaultyRecords(placed), 3)]
    monkeypatch.setattr(pool, "MOST_LOST", 2)
    found = list(steps(data, start=0, stop=1, workers=1))
    assert faults(found).keys() == set(map(str, bad))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_many_files_given_up_do_not_block_a_worker_that_waits_to_be_heard(emoji: Path) -> None:
    """Steps and lists here are both larger than what a pipe holds."""
    long = "word " * 100_000
    pairs = [Record(pair.video, (long,), None) for pair in read(emoji / "train.json")[:4]]
    data = Steps([Source(Records(pairs), 4)], SAMPLING, Augment(), seed=1)
    fault = Fault("timeout", "not read within 60 s")
    data.give_up({f"clips/{number:0100}.mp4": fault for number in range(5000)})
    with within(90):
        for step in steps(data, start=0, stop=5, workers=1):
            time.sleep(0.5)  # the next step is made meanwhile, and waits to be fetched
            data.give_up({f"clips/new-{step.number}.mp4": fault})
    assert len(data.hopeless) == 5005


def test_a_disk_that_is_gone_ends_a_run_before_all_of_it_was_asked_for(tmp_path: Path) -> None:
    asked = []

    class Gone(Records):
        def info(self, index: int) -> Any:
            asked.append(index)
            return super().info(index)

    # of two captions each
    names = [tmp_path / f"{number // 2}.mp4" for number in range(5000)]
    data = Steps(
        [Source(Gone([Record(path, (path.name,), None) for path in names]), 4)],
        SAMPLING, Augment(), seed=1,
    )  # fmt: skip
    reason = r"^1,000 files in a row cannot be read, the first .*\.mp4: no such file; is their disk"
    with pytest.raises(ValueError, match=reason):
        data[0]
    assert len(asked) <= 2000


def test_what_this_machine_lacks_is_no_fault_of_a_file(emoji: Path, tmp_path: Path) -> None:
    stills_and_clips = [read(emoji / f"{name}.json")[0] for name in ("stills", "train")]
    assert [pair.is_still for pair in stills_and_clips] == [True, False]
    for path in (pair.video for pair in stills_and_clips):
        data = Steps(
            [Source(Records([Record(path, ("a",), None)]), 1)], SAMPLING, Augment(), seed=1
        )
        assert not data[0].unreadable
        data.sources[0]._infos.clear()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(OSError, match=f"^Too many open files, while reading {path}: raise"):
                data[0]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    for said, wrapped, found in [
        (MemoryError(), False, "^Cannot allocate memory, while reading .*: lower workers$"),
        (OSError(errno.ENOSPC, "full"), True, "^No space left on device, while reading .*: make"),
        # of a damaged file that claims to be huge
        (MemoryError(), True, "^no file of a source can be read: .*: cannot be opened"),
    ]:
        with pytest.raises((OSError, ValueError), match=found):
            made(LackingRecords(read(emoji / "train.json")[:4], said, wrapped), count=1)


class LackingRecords(Records):
    """Whose decoder raises an error, or a VideoError from it."""

    def __init__(self, records: Sequence[Record], error: Exception, wrapped: bool) -> None:
        super().__init__(records)
        self.error, self.wrapped = error, wrapped

    def clip(self, index: int, **wanted: Any) -> Clip:
        if self.wrapped:
            raise VideoError(self[index].video, "cannot be opened") from self.error
        raise self.error


def test_features_that_cannot_be_read_are_no_fault_of_a_video(emoji: Path, tmp_path: Path) -> None:
    pairs = read(emoji / "train.json")[:4]
    path = tmp_path / "features.safetensors"
    names = json.dumps([pair.video.name for pair in pairs])
    save_file({"features": torch.zeros(4, 2, 4, 4, 8).half()}, path, metadata={"videos": names})
    source = Source(Records(pairs), 4, teacher=TeacherFeatures(path, pairs))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="features"):
        Steps([source], SAMPLING, Augment(), seed=1)[0]


class Once(Records):
    """Travels to one worker."""

    times = 0

    def __getstate__(self) -> dict[str, Any]:
        Once.times += 1
        if Once.times > 1:
            raise OSError("no more of these")
        return {"_records": []}


def test_workers_end_if_another_cannot_be_started(emoji: Path) -> None:
    data = Steps([Source(Once(read(emoji / "train.json")[:4]), 4)], SAMPLING, Augment(), seed=1)
    with pytest.raises(OSError, match="no more of these") as kept:
        pool.Workers(data, range(2), count=2, timeout_s=60).__enter__()
    assert kept.value and multiprocessing.active_children() == []


def test_what_goes_wrong_in_a_worker_comes_home_as_it_was(emoji: Path, tmp_path: Path) -> None:
    records = Records([Record(tmp_path / "none.mp4", ("none",), None)])
    with pytest.raises(ValueError, match=r"^no file of a source can be read: .*none\.mp4: no such"):
        made(records, count=1, workers=1)
    # also what cannot travel
    with pytest.raises(RuntimeError, match=r"^Torn: far/away$"):
        made(TornRecords(read(emoji / "train.json")[:4]), count=1, workers=1)


class Torn(Exception):
    """Cannot be made anew from what it says."""

    def __init__(self, folder: str, name: str) -> None:
        super().__init__(f"{folder}/{name}")


class TornRecords(Records):
    def fetch(self, index: int) -> None:
        raise Torn("far", "away")


def test_a_script_that_starts_itself_again_is_told_how_not_to(emoji: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        from fluxclip.data.loader import Augment, Source, Steps
        from fluxclip.data.sources.annotations import read
        from fluxclip.data.workers import steps
        from fluxclip.tokens.budget import FluxSampling
        data = Steps(
            [Source(read({str(emoji / "train.json")!r}), 4)],
            FluxSampling((2, 4, 1), (28, 56, 28), (4, 64), (16, 8)), Augment(), seed=0,
        )
        next(steps(data, start=0, stop=1, workers=1))
    """)
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    last = ran.stderr.splitlines()[-1]
    assert "ended by exit code 1 while it read no file; what it said is above" in last
    assert 'needs `if __name__ == "__main__":`' in last and "RuntimeError" in ran.stderr


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
