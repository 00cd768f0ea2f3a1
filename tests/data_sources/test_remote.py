"""Shards behind an address: fetched once, again after a break, ahead of their turn."""

import errno
import http.client
import resource
import ssl
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from packed_pairs import (
    SAMPLING,
    Site,
    made,
    same,
)

from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.sources import webdataset

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
