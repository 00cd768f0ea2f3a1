"""A dozen pairs, packed into shards, unpacked again, and behind a web server."""

import json
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from packed_pairs import SHARD_MB, Handler, Site

from fluxclip.data import remote, shards


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
