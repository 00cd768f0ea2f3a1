"""What a recipe calls its data: paths from its own folder, other names as they are, to the end."""

import io
import json
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from small_run import DEMO, QUIET, metrics, read

from fluxclip.data import sources
from fluxclip.data.sources import annotations
from fluxclip.training import recipe as recipes
from fluxclip.training.forward import RECORDS_READ, Forward
from fluxclip.training.loop import dataset, train

SYNTHETIC = ["data.0.source=synthetic", "data.0.annotations=40?seed=1", "data.0.cache_frames=0"]


def test_paths_count_from_the_recipe_and_other_names_stay() -> None:
    names = {
        "set.csv?video=path&caption=text": f"{DEMO.parent}/set.csv?video=path&caption=text",
        "../set.json": f"{DEMO.parent.parent}/set.json",
        "/set.jsonl": "/set.jsonl",
        "hf://datasets/org/name?split=train": "hf://datasets/org/name?split=train",
    }
    for name, wanted in names.items():
        recipe = recipes.read(DEMO, [f"data.0.annotations={json.dumps(name)}"])
        assert recipe.data[0].annotations == wanted
    assert recipes.read(DEMO, SYNTHETIC).data[0].annotations == "40?seed=1"
    with pytest.raises(ValueError, match="unknown source 'sythetic' .*did you mean 'synthetic'"):
        recipes.read(DEMO, ["data.0.source=sythetic"])


def test_people_are_told_the_end_of_a_name_and_no_secret() -> None:
    names = {
        "https://host/shards/?sig=SECRET": "shards",
        "https://host/{000..099}.tar?sig=a/b": "{000..099}.tar",
        "set.csv?folder=/data/clips": "set.csv",
        "hf://datasets/org/name?split=train": "name",
        "/data/train.json": "train.json",
        "1000?side=64": "1000",
    }
    assert {name: sources.shown(name) for name in names} == names


class Signed(SimpleHTTPRequestHandler):
    """Gives its files to those that know the word of the day, and notes what was read whole."""

    word: list[str]
    whole: list[str]

    def do_GET(self) -> None:
        path, _, word = self.path.partition("?")
        if word != f"sig={self.word[-1]}":
            self.send_error(403)
            return
        if "Range" not in self.headers:
            self.whole.append(path)
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_new_signature_of_an_address_is_the_same_data(
    emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read again, the new one is what is asked with, and nothing shows the old one."""
    monkeypatch.setenv("FLUXCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "site").mkdir()
    clips = annotations.read(emoji / "train.json")[:4]
    for number in range(2):
        with tarfile.open(tmp_path / "site" / f"{number}.tar", "w") as tar:
            for record in clips[2 * number :][:2]:
                text = io.BytesIO(record.captions[0].encode())
                about = tarfile.TarInfo(f"{record.video.stem}.txt")
                about.size = len(text.getvalue())
                tar.add(record.video, record.video.name)
                tar.addfile(about, text)
    known: dict[str, list[str]] = {"word": ["first"], "whole": []}
    handler = partial(type("Own", (Signed,), known), directory=tmp_path / "site")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        name = f"http://127.0.0.1:{server.server_port}/{{0..1}}.tar?sig="
        before = sources.fingerprint_of("webdataset", f"{name}first")
        first = sources.read("webdataset", f"{name}first")
        known["word"].append("second")
        assert sources.fingerprint_of("webdataset", f"{name}second") == before
        second = sources.read("webdataset", f"{name}second")
        assert known["whole"] == ["/0.tar", "/1.tar"]
        assert list(second) == list(first)
        assert [record.captions[0] for record in second] == [c.captions[0] for c in clips]
        for path in (tmp_path / "cache").rglob("*.tar"):
            path.unlink()
        for index in range(4):
            assert second.clip(index, num_frames=1).frames_THWC.size > 0
        assert known["whole"] == ["/0.tar", "/1.tar"] * 2
        server.shutdown()
    shown = [*map(repr, second), str(second.file(0))]
    kept = [path.read_bytes() for path in (tmp_path / "cache").rglob("*.json*")]
    assert kept and not any(b"sig=" in content for content in kept)
    assert not any("sig" in text for text in shown)


def test_a_run_on_synthetic_pairs_goes_on_with_its_own_only(
    changes: list[str], tmp_path: Path
) -> None:
    short = [*changes, *SYNTHETIC, "validation.every=2", "optimizer.warmup_steps=1"]
    command = "fluxclip train --set 'data.0.annotations=https://host/shards/?sig=SECRET'"
    train(read([*short, "optimizer.steps=2"]), console=QUIET, command=command)
    card = (tmp_path / "run" / "last" / "README.md").read_text()
    assert "- 40, 8 pairs a step" in card
    assert "https://host/shards/?...'" in card and "SECRET" not in card
    assert len([row for row in metrics(tmp_path / "run") if row.get("loss", 0) > 0]) == 2
    other = [*short, "optimizer.steps=2", "data.0.annotations=41"]
    with pytest.raises(ValueError, match="the file of data.0.annotations has changed"):
        train(read(other), resume=True, console=QUIET)


@pytest.mark.parametrize("number", [5000, RECORDS_READ + 1])
def test_captions_of_large_sets_are_not_looked_up(changes: list[str], number: int) -> None:
    """Few distinct captions among many records are; who asks for all names is told."""
    recipe = read([*changes, *SYNTHETIC, f"data.0.annotations={number}", "negatives=step"])
    few = number <= RECORDS_READ
    made = Forward(recipe.build(), dataset(recipe).sources, recipe)
    assert bool(made.rows) is few
    assert made.names == {}
    if not few:
        recipe = read([*changes, *SYNTHETIC, f"data.0.annotations={number}", "negatives=all"])
        with pytest.raises(ValueError, match="and these have more than 1,000,000 records"):
            Forward(recipe.build(), dataset(recipe).sources, recipe)
