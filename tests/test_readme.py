"""What the README shows is what happens: its Python and its commands are run as they stand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the checkout, where commands may leave files."""
    for name in ("assets", "configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_python_example_runs_and_gives_the_shapes_it_says(checkout: Path) -> None:
    (code,) = blocks("python")
    check = (
        "\nassert v.shape == t.shape == (2, model.dim), v.shape"
        "\nassert f'(2, {model.dim})' in open('README').read()"
        "\nassert similarity.shape == (2, 2)"
        "\nassert len(hits) == 5 and hits[0].end_s > hits[0].start_s"
    )
    (checkout / "README").write_text(code)
    done = subprocess.run(
        [sys.executable, "-c", code + check], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# `make demo` and `make test` are run by CI, this suite being part of the second
COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
RUN_HERE = [line for line in COMMANDS if not line.startswith("make ")]


def test_every_command_is_run_by_this_suite_or_by_ci() -> None:
    assert len(RUN_HERE) >= 5
    ci = (ROOT / ".ci" / "run").read_text()
    for line in set(COMMANDS) - set(RUN_HERE):
        assert line.partition("#")[0].strip() in ci


def test_the_commands_run_in_their_order(checkout: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in RUN_HERE:
        done = subprocess.run(
            line, shell=True, cwd=checkout, env=os.environ | {"PATH": path},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_files_and_links_of_the_documents_exist() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), target


def test_numbers_of_the_readme_are_those_of_the_records() -> None:
    """Both tables are those of the JSON under benchmarks/."""
    score = json.loads((ROOT / "benchmarks" / "emoji-tiny.json").read_text())
    for result in score["results"]:
        found = result["cosine"]["text_to_video"]
        row = f"| {result['num_tokens']} | {found['r1']:.1f} | {found['r10']:.1f} |"
        assert row in TEXT, row
    speed = json.loads((ROOT / "benchmarks" / "encoder-cpu.json").read_text())
    for result in speed["rows"]:
        if result["preset"] != "small" or "times_faster" not in result:
            continue
        row = f"| {result['ms_per_clip']:.0f} | {result['times_faster']:.2f} |"
        assert row in TEXT, row
