"""Shards: written whole whatever stops the writer, read to the same tensors wherever they lie."""

import errno
import gzip
import http.client
import io
import json
import os
import pickle
import resource
import signal
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fluxclip.data import remote, shards
from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.order import Groups, place_in_epoch
from fluxclip.data.sources import Records, annotations, webdataset
from fluxclip.data.workers import steps
from fluxclip.tokens.budget import FluxSampling
from fluxclip.video import VideoError, probe

SAMPLING = FluxSampling((2, 3, 1), (28, 56, 28), (4, 64), (16, 8))
SHARD_MB = 0.12  # four or five clips


@pytest.fixture(scope="module")
def pairs(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotations of 9 clips, 3 stills and one file that is no video."""
    folder = tmp_path_factory.mktemp("pairs")
    items = json.loads((emoji / "train.json").read_text("utf-8"))[:9]
    items += json.loads((emoji / "stills.json").read_text("utf-8"))[:3]
    for item in items:
        name = Path(item["video"]).name
        (folder / name).write_bytes((emoji / item["video"]).read_bytes())
        item["video"] = name
    (folder / "bad.mp4").write_text("no video")
    items.insert(4, {"video": "bad.mp4", "caption": "bad"})
    (folder / "set.json").write_text(json.dumps(items), "utf-8")
    return folder / "set.json"


@pytest.fixture(scope="module")
def packed(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "shards"
    written = shards.write(str(pairs), folder, side=96, shard_mb=SHARD_MB)
    assert (written.shards, written.records) == (len(list(folder.glob("*.tar"))), 12)
    assert list(written.skipped) == ["bad.mp4"]
    assert "not a video" in written.skipped["bad.mp4"]
    return folder


@pytest.fixture(scope="module")
def unpacked(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the shards and annotations of them, made with nothing but tar and JSON."""
    folder = tmp_path_factory.mktemp("unpacked")
    items = []
    for path in sorted(packed.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".json"):
                    about = json.loads(file.read())
                else:
                    (folder / member.name).write_bytes(file.read())
                    items.append({"video": member.name, "caption": about["captions"],
                                  "family": about["family"]})  # fmt: skip
    (folder / "set.json").write_text(json.dumps(items), "utf-8")
    return folder / "set.json"


class Site(NamedTuple):
    url: str
    folder: Path
    asked: Counter[str]
    failing: Counter[str]  # how often yet to break off in the middle of a file
    whole: set[str]  # files that are sent whole, whatever part is asked for


class Handler(SimpleHTTPRequestHandler):
    asked: Counter[str]
    failing: Counter[str]
    whole: set[str]

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        path = Path(self.translate_path(self.path))
        span = self.headers.get("Range", "")
        self.asked[name] += span != "bytes=0-0"
        span = "" if name in self.whole else span
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        start, _, stop = span.removeprefix("bytes=").partition("-")
        part = content[int(start or 0) : int(stop) + 1 if stop else None]
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{stop}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.failing[name] > 0 and span != "bytes=0-0":
            self.failing[name] -= 1
            part = part[: len(part) // 2]
            self.close_connection = True
        self.wfile.write(part)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The shards behind a web server, and an empty cache for them."""
    folder = tmp_path / "site"
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("FLUXCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "WAITS_S", (0.01, 0.01, 0.01))
    asked: Counter[str] = Counter()
    failing: Counter[str] = Counter()
    whole: set[str] = set()
    own = {"asked": asked, "failing": failing, "whole": whole}
    handler = type("OwnHandler", (Handler,), own)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Site(f"http://127.0.0.1:{server.server_port}", folder, asked, failing, whole)
        server.shutdown()


def made(
    records: Records, *, start: int = 0, stop: int = 6, workers: int = 0
) -> list[list[torch.Tensor]]:
    """The frames of steps: all six are more than an epoch."""
    data = Steps([Source(records, 3)], SAMPLING, Augment(), seed=1)
    found = list(steps(data, start=start, stop=stop, workers=workers))
    assert not any(step.unreadable for step in found)
    return [[batch.frames_BTHWC for batch in step.batches] for step in found]


def same(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return all(
        torch.equal(x, y)
        for step, other in zip(a, b, strict=True)
        for x, y in zip(step, other, strict=True)
    )


def same_pairs(a: Records, b: Records) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert (x.captions, x.family, x.is_still) == (y.captions, y.family, y.is_still)
        known, other = a.info(i), b.info(i)
        assert known.path == x.video
        assert (known.duration_s, known.width, known.num_frames, known.fps, known.is_image) == (
            other.duration_s, other.width, other.num_frames, other.fps, other.is_image
        )  # fmt: skip
        frames, others = (records.clip(i, num_frames=2, side=32) for records in (a, b))
        assert np.array_equal(frames.frames_THWC, others.frames_THWC)


def test_shards_give_the_steps_of_the_same_files_with_annotations(
    packed: Path, unpacked: Path
) -> None:
    there, files = webdataset.read(packed), annotations.read(unpacked)
    same_pairs(there, files)
    files.groups = there.groups
    expected = made(files)
    assert same(made(there), expected)
    assert same(made(there, workers=3), expected)


def test_captions_and_videos_are_those_of_the_pairs(pairs: Path, packed: Path) -> None:
    originals = [r for r in annotations.read(pairs) if r.captions != ("bad",)]
    there = webdataset.read(packed)
    assert [r.captions for r in there] == [r.captions for r in originals]
    assert [r.family for r in there] == [r.family for r in originals]
    for i, original in enumerate(originals):
        before, now = probe(original.video), there.info(i)
        if before.is_image:
            assert there.clip(i, num_frames=1).frames_THWC.shape[1:3] == (before.height,) * 2
            continue
        assert now.num_frames == before.num_frames
        assert now.duration_s == pytest.approx(before.duration_s, abs=1e-3)
        assert min(now.width, now.height) == 96
    lines = (packed / "records.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["video"] for line in lines] == [r.video.name for r in originals]


def test_behind_an_address_they_are_the_same_from_any_step_and_number_of_workers(
    packed: Path, site: Site
) -> None:
    there = webdataset.read(f"{site.url}/index.json")
    assert not any(name.endswith(".tar") for name in site.asked.elements())
    same_pairs(webdataset.read(packed), there)
    whole = made(there)
    assert same(whole, made(webdataset.read(packed)))
    assert webdataset.identity(str(packed)) == webdataset.identity(f"{site.url}/")
    assert same(made(webdataset.read(f"{site.url}/"), start=2, stop=5), whole[2:5])
    assert same(made(there, workers=1), whole)
    assert same(made(there, start=1, workers=3), whole[1:])
    fetched = {name: count for name, count in site.asked.items() if name.endswith(".tar")}
    assert set(fetched.values()) == {1} and len(fetched) == len(list(packed.glob("*.tar")))


def test_what_travels_to_workers_is_small(packed: Path, site: Site) -> None:
    for name in (packed, f"{site.url}/index.json"):
        records = webdataset.read(name)
        records.clip(0, num_frames=1)
        travelled = pickle.dumps(records)
        assert len(travelled) < 1000
        assert list(pickle.loads(travelled)) == list(records)


def test_others_tar_files_give_the_same_pairs(
    packed: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = webdataset.read(packed)
    numbers = f"{{000000..{len(list(packed.glob('*.tar'))) - 1:06d}}}"
    same_pairs(webdataset.read(f"{packed}/*.tar"), ours)
    same_pairs(webdataset.read(f"{packed}/shard-{numbers}.tar"), ours)
    far = f"{site.url}/shard-{numbers}.tar"
    same_pairs(webdataset.read(far), ours)
    same_pairs(webdataset.read(far), ours)
    assert max(site.asked.values()) == 1  # looked through once


START_TOGETHER = """
import sys, time
from fluxclip.data.sources import webdataset
while time.time() < float(sys.argv[2]):
    pass
print(len(webdataset.read(sys.argv[1])))
"""


@pytest.mark.parametrize("name", ["", "shard-{000000..000002}.tar"])
def test_processes_that_start_at_once_fetch_each_file_once(site: Site, name: str) -> None:
    command = [sys.executable, "-c", START_TOGETHER, f"{site.url}/{name}", str(time.time() + 4)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate() for process in started]
    assert {error for _, error in said} == {""}
    assert len({number for number, _ in said}) == 1
    del site.asked["index.json"]  # each asks for it
    assert max(site.asked.values()) == 1
    assert not list((site.folder.parent / "cache").rglob("*.part"))


def put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"a/b.json": {"caption": "x"}}, ("x",)),
        ({"a/b.json": {"text": ["x", "y"]}}, ("x", "y")),
        ({"a/b.json": {"width": 3}, "a/b.txt": " z\n"}, ("z",)),
        ({"a/b.txt": "z", "a/b.json": {"captions": ["x"], "family": "f"}}, ("x",)),
        ({}, "has no caption; .* it has .mp4"),
        ({"a/b.json": {"width": 3}}, "has no caption"),
        ({"a/b.json": {"caption": 3}}, "a caption must be a text, got 3"),
        ({"a/b.json": {"caption": ["x", " "]}}, "a caption must be a text"),
        ({"a/b.json": {"caption": []}}, "list of captions is empty"),
        ({"a/b.json": "no JSON {"}, "a/b.json is not JSON"),
        ({"c/b.json": {"caption": "x"}}, "a/b has no caption"),
    ],
)
def test_captions_of_others_tar_files(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, object],
    captions: tuple[str, ...] | str,
) -> None:  # fmt: skip
    monkeypatch.setenv("FLUXCLIP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        put(tar, "README.txt", b"no pair")
        put(tar, "a/b.mp4", (emoji / "clips/1f308.mp4").read_bytes())
        for name, content in members.items():
            put(tar, name, (content if isinstance(content, str) else json.dumps(content)).encode())
    if isinstance(captions, tuple):
        (record,) = webdataset.read(path)
        assert record.captions == captions
        assert record.video == path / "b.mp4"
        return
    with pytest.raises(ValueError, match=captions) as caught:
        webdataset.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_are_no_tar_files(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLUXCLIP_CACHE", str(tmp_path / "cache"))
    content = (packed / "shard-000000.tar").read_bytes()
    with tarfile.open(packed / "shard-000000.tar") as tar:
        third = tar.getmembers()[2].offset
    flipped = bytearray(content)
    flipped[third + 150] ^= 1  # in the checksum of its header
    for name, bad in (("text", b"x" * 2000), ("packed", gzip.compress(content)),
                      ("short", content[: len(content) // 2]), ("flipped", bytes(flipped)),
                      ("cut", content[:third]), ("two", content + content)):  # fmt: skip
        (tmp_path / f"{name}.tar").write_bytes(bad)
        with pytest.raises(ValueError, match=f"{name}.tar is no whole tar file"):
            webdataset.read(tmp_path / f"{name}.tar")
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        put(tar, "a.txt", b"a caption of nothing")
    with pytest.raises(ValueError, match="no pair of a video and its captions in 1 shards"):
        webdataset.read(tmp_path / "empty.tar")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        webdataset.read(tmp_path / "none-*.tar")
    with pytest.raises(FileNotFoundError, match="shards not found: .*b.tar"):
        webdataset.read(tmp_path / "{short,b}.tar")


def copied(packed: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def changed(folder: Path, **values: object) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **values}))


def test_shards_that_are_not_what_their_index_says(packed: Path, tmp_path: Path) -> None:
    folder = copied(packed, tmp_path / "shards")
    first = folder / "shard-000000.tar"
    content = first.read_bytes()

    def refused(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message) as caught:
            webdataset.read(folder)
        assert "\n" not in str(caught.value)

    first.write_bytes(content[:-512])
    refused("shard-000000.tar has .* bytes, its index says")
    assert len(webdataset.read(folder, check_files=False)) == 12
    first.unlink()
    refused("1 of . shards not found: shard-000000.tar", FileNotFoundError)
    first.write_bytes(content)
    changed(folder, complete=False)
    refused("run the same `fluxclip shards write` again")
    changed(folder, complete=True, version=2)
    refused("is of version 2, this is for version 1")
    changed(
        folder, version=1, shards=[{"name": "../a.tar", "bytes": 1, "sha256": "", "records": 1}]
    )
    refused("names a shard '../a.tar'")
    changed(folder, shards=[{"name": "a.tar", "bytes": 1, "sha256": "../../a", "records": 1}])
    refused("has a SHA-256 that is none")
    index = json.loads((packed / "index.json").read_text())
    changed(folder, **index)
    changed(folder, sha256={})
    refused("no SHA-256 of records.jsonl")
    changed(folder, sha256=index["sha256"], records=13)
    refused("is of 13 pairs, its shards of 12")
    changed(folder, records=12, lengths={**index["lengths"], "records.offsets": 8})
    refused("its records.offsets of others")
    (folder / "index.json").write_text("{")
    refused("is no index of shards")
    (folder / "index.json").unlink()
    refused("no .*index.json: write it with", FileNotFoundError)


def test_a_member_that_has_changed_is_a_broken_file(packed: Path, tmp_path: Path) -> None:
    folder = copied(packed, tmp_path / "shards")
    line = json.loads((folder / "records.jsonl").read_text("utf-8").splitlines()[1])
    with (folder / "shard-000000.tar").open("r+b") as file:
        file.seek(line["offset"] + line["bytes"] // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    records = webdataset.read(folder)
    with pytest.raises(VideoError, match="00000001.mp4: its bytes in the shard are not those"):
        records.clip(1, num_frames=1)
    records.clip(0, num_frames=1)
    data = Steps([Source(records, 12)], SAMPLING, Augment(), seed=0)
    assert list(data[0].unreadable) == [str(folder / "shard-000000.tar" / "00000001.mp4")]


@pytest.mark.parametrize(
    "values",
    [
        {"shard": 7}, {"shard": -1}, {"shard": None}, {"offset": -1}, {"bytes": 10**15},
        {"captions": None}, {"captions": []}, {"captions": [3]}, {"name": 3}, {"family": 3},
        {"info": {"x": 1}}, {"info": 3},
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_true_is_named(
    packed: Path, tmp_path: Path, values: dict[str, object]
) -> None:
    folder = copied(packed, tmp_path / "shards")
    lines = (folder / "records.jsonl").read_text("utf-8").splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | values, ensure_ascii=False)
    (folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    shards.write_offsets(folder / "records.jsonl", folder / "records.offsets")
    index = json.loads((folder / "index.json").read_text())
    length = (folder / "records.jsonl").stat().st_size
    changed(folder, lengths={**index["lengths"], "records.jsonl": length})
    records = webdataset.read(folder)
    assert records[1].captions
    with pytest.raises(ValueError, match=f"line 3 of {folder}/records.jsonl") as caught:
        records[2]
    assert "\n" not in str(caught.value)


def test_a_member_that_the_system_gives_in_pieces_is_read_whole(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = webdataset.read(packed)
    whole = records.clip(0, num_frames=2).frames_THWC
    pread = os.pread  # of which one call gives no more than 2 GiB
    monkeypatch.setattr(os, "pread", lambda number, size, at: pread(number, min(size, 1000), at))
    assert np.array_equal(records.clip(0, num_frames=2).frames_THWC, whole)


def test_a_member_that_names_other_files_reaches_none(
    emoji: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(emoji / "clips")
    with pytest.raises(VideoError, match="a.mp4: cannot be opened"):
        probe("a.mp4", content=b"ffconcat version 1.0\nfile 1f308.mp4\n")


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_connection_that_breaks_off_is_made_again(
    packed: Path, site: Site, knows_ranges: bool
) -> None:
    if not knows_ranges:
        site.whole.update(path.name for path in packed.iterdir())
    there = webdataset.read(f"{site.url}/index.json")
    site.failing["shard-000000.tar"] = 2
    there.fetch(0)
    assert site.asked["shard-000000.tar"] == 3
    ours = webdataset.read(packed).clip(0, num_frames=2)
    assert np.array_equal(there.clip(0, num_frames=2).frames_THWC, ours.frames_THWC)


def test_a_connection_that_gets_further_each_time_is_made_again_as_often_as_it_takes(
    site: Site,
) -> None:
    there = webdataset.read(f"{site.url}/")
    site.failing["shard-000000.tar"] = 7  # of four tries that get no further
    there.fetch(0)
    site.whole.add("shard-000001.tar")  # from its beginning: no further than half
    site.failing["shard-000001.tar"] = 7
    second = next(i for i in range(12) if "shard-000001" in str(there[i].video))
    with pytest.raises(ValueError, match="shard-000001.tar cannot be fetched .the connection"):
        there.fetch(second)


def test_whatever_the_network_does_is_tried_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = webdataset.read(f"{site.url}/")
    faults: list[Exception] = [
        ssl.SSLError("bad record"), OSError(errno.EHOSTUNREACH, "No route to host"),
        http.client.IncompleteRead(b""),
    ]  # fmt: skip
    read = http.client.HTTPResponse.read

    def failing(answer: http.client.HTTPResponse, amount: int | None = None) -> bytes:
        if faults:
            raise faults.pop()
        return read(answer, amount)

    monkeypatch.setattr(http.client.HTTPResponse, "read", failing)
    there.fetch(0)
    faults += [OSError(errno.EHOSTUNREACH, "No route to host")] * 9
    with pytest.raises(ValueError, match="http://.*/shard-.*.tar cannot be fetched .*No route"):
        there.fetch(11)


def test_a_cache_that_cannot_be_written_says_how_to_choose_another(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = webdataset.read(f"{site.url}/")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="cannot write to .*set FLUXCLIP_CACHE"):
            there.fetch(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    there.fetch(0)  # goes on from there
    monkeypatch.setenv("FLUXCLIP_CACHE", "/proc/x")
    for name in ("", "shard-000000.tar"):
        with pytest.raises(OSError, match="cannot write to /proc/x/shards.*set FLUXCLIP_CACHE"):
            webdataset.read(f"{site.url}/{name}")


def test_the_shard_that_comes_next_is_fetched_meanwhile(site: Site) -> None:
    data = Steps([Source(webdataset.read(f"{site.url}/"), 1)], SAMPLING, Augment(), seed=0)
    _ = data[0]  # of one pair
    for _ in range(500):
        if sum(count for name, count in site.asked.items() if name.endswith(".tar")) == 2:
            return
        time.sleep(0.01)
    raise AssertionError(site.asked)


def test_what_cannot_be_reached_ends_in_one_line_before_any_step(site: Site) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            webdataset.read(name)
        assert "\n" not in str(caught.value)

    refused(f"{site.url}/none/", "none/index.json cannot be fetched .HTTP 404")
    refused("http://127.0.0.1:9/index.json", "cannot be fetched .*refused")
    (site.folder / "shard-000001.tar").write_bytes(b"other")
    refused(f"{site.url}/", "shard-000001.tar has 5 bytes, its index says")
    (site.folder / "shard-000001.tar").unlink()
    refused(f"{site.url}/", "shard-000001.tar cannot be fetched .HTTP 404")


def test_a_shard_that_is_lost_on_the_way_stops_a_run_and_is_not_replaced(site: Site) -> None:
    there = webdataset.read(f"{site.url}/")
    first = site.folder / "shard-000000.tar"
    content = first.read_bytes()
    first.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match="is not what its index says"):
        made(there)
    first.write_bytes(content)
    made(there)  # nothing of it has stayed


def test_the_cache_keeps_to_its_size(
    packed: Path, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [path.stat().st_size for path in packed.glob("*.tar")]
    monkeypatch.setenv("FLUXCLIP_CACHE_GB", str(2 * max(sizes) / 1e9))
    there = webdataset.read(f"{site.url}/")
    whole = made(there)
    kept = list((tmp_path / "cache" / "shards").glob("*.tar"))
    assert sum(path.stat().st_size for path in kept) <= 2 * max(sizes) < sum(sizes)
    for path in kept:  # as another process may, in the middle of a run
        path.unlink()
    assert same(made(webdataset.read(f"{site.url}/")), whole)
    monkeypatch.setenv("FLUXCLIP_CACHE_GB", "much")
    with pytest.raises(ValueError, match="FLUXCLIP_CACHE_GB must be a number above 0"):
        made(webdataset.read(f"{site.url}/"))


def test_an_order_by_groups_has_every_record_and_few_groups_at_a_time() -> None:
    sizes = np.random.default_rng(0).integers(1, 60, 40)
    groups = Groups(np.cumsum([0, *sizes]))
    group_of = np.repeat(np.arange(40), sizes)
    epochs = []
    for epoch in range(3):
        order = [
            place_in_epoch((5, 0, epoch), len(group_of), at, groups=groups)
            for at in range(len(group_of))
        ]
        assert sorted(order) == list(range(len(group_of)))
        used = group_of[order]
        first = np.array([np.argmax(used == group) for group in range(40)])
        last = len(used) - 1 - np.array([np.argmax(used[::-1] == group) for group in range(40)])
        at_once = [np.sum((first <= at) & (last >= at)) for at in range(len(used))]
        # those of a turn, and at its ends those of the next or the last one
        assert max(at_once) <= 4 + 3
        assert np.mean(used[:-1] != used[1:]) > 0.5
        epochs.append(order)
    assert epochs[0] != epochs[1] != epochs[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
