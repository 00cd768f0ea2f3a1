"""docs/training.md, "Fine-tune on my captions": its code and its commands, run as they stand."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_cli import fluxclip

from fluxclip.evaluation.record import load_retrieval

ROOT = Path(__file__).resolve().parents[2]
NUM_CLIPS = 24


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Fine-tune on my captions\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.S | re.M)


@pytest.fixture
def place(tmp_path: Path, emoji: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's folder with clips and a table of captions, beside the recipes."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "mine" / "clips").mkdir(parents=True)
    with (tmp_path / "mine" / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption"])
        for record in json.loads((emoji / "train.json").read_text())[:NUM_CLIPS]:
            path = emoji / record["video"]
            shutil.copy(path, tmp_path / "mine" / "clips")
            table.writerows([path.name, caption] for caption in record["caption"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_the_document_prints_is_what_happens(place: Path) -> None:
    (code,) = blocks("python")
    exec(compile(code, "docs/training.md", "exec"), {})
    parts = [json.loads((place / "mine" / f"{name}.json").read_text()) for name in ("train", "val")]
    assert [len(part) for part in parts] == [NUM_CLIPS - 2, 2]
    assert len({record["video"] for part in parts for record in part}) == NUM_CLIPS
    shown = {}
    for line in "".join(blocks("sh")).splitlines():
        name, *arguments = shlex.split(line)
        assert name == "fluxclip"
        done = fluxclip(*arguments)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        shown[line] = done.stdout
    dry, *_, search = shown.values()
    assert "data: train.json, 22 records" in dry
    assert len(search.splitlines()) == 3
    before, after = load_retrieval(
        [Path("runs/before/record.json"), Path("runs/after/record.json")]
    )
    assert before.model.fingerprint != after.model.fingerprint
    assert before.data == after.data
