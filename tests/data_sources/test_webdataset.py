"""Tar shards give the pairs and tensors of the same files, wherever and whosever they are."""

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from packed_pairs import SAMPLING, Site, changed, copied, made, same, same_pairs

from fluxclip.data import shards
from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.sources import annotations, webdataset
from fluxclip.video import VideoError, probe


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
