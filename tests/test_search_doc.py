"""docs/search.md is run as it stands: its commands and its Python, in their order."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxclip import cli

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, assets: Path, emoji: Path) -> Iterator[Path]:
    """The working folder of somebody who reads along: some videos, and things to look for."""
    place = tmp_path_factory.mktemp("search")
    (place / "videos").mkdir()
    shutil.copy(assets / "film" / "film_720p.mp4", place / "videos" / "film.mp4")
    for clip in sorted((emoji / "clips").glob("1f6*.mp4"))[:8]:
        shutil.copy(clip, place / "videos")
    for still in sorted((emoji / "stills").iterdir())[:2]:
        shutil.copy(still, place / "videos")
    shutil.copy(emoji / "clips" / "1f483.mp4", place / "like-this.mp4")
    shutil.copy(next(path for path in (ROOT / "docs").glob("*.png")), place / "like-this.png")
    (place / "queries.txt").write_text("a rocket\na rabbit in a meadow\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        yield place


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The variables of the Python blocks, from one to the next."""
    return {}


def fluxclip(arguments: list[str]) -> int:
    """What the command does, in this process, which has torch already; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=range(len(BLOCKS)))
def test_what_the_page_shows_works(
    place: Path, names: dict[str, Any], language: str, code: str
) -> None:
    lines = code.replace("\\\n", " ").splitlines()
    if language == "python":
        exec(compile(code, "docs/search.md", "exec"), names)
    elif all(line.startswith("fluxclip ") for line in lines):
        for line in lines:
            assert fluxclip(shlex.split(line, comments=True)) == 0, line
    else:
        done = subprocess.run(["bash", "-e", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"


def test_what_the_page_left_behind(place: Path, names: dict[str, Any]) -> None:
    """After the blocks above."""
    with (place / "hits.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
    assert len(list((place / "cut-out").iterdir())) == 3
    assert len(list((place / "pictures").glob("*.jpg"))) == 3
    assert names["report"].added == 1  # the film, which was removed
    assert names["best"].end_s - names["best"].start_s <= 4.5
    assert all(hit.score >= 0.1 for hit in names["hits"])
    assert [len(names[name]) for name in ("first", "second")] == [3, 3]
    assert names["caption"].metadata["text"] in TEXT
    num_videos = len(list((place / "videos").iterdir()))
    assert (
        names["imported"].added == names["exported"].videos == names["replaced"].done == num_videos
    )
    assert names["shard"].file.endswith("shard-00001-of-00002.parquet")


def test_files_and_links_of_the_page_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert "://" in target or (ROOT / "docs" / target).exists(), target
