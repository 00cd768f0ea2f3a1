"""The wheel holds both packages and the shipped weights, and nothing else."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def _files(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if "__pycache__" not in path.parts]


def test_every_file_of_the_packages_and_of_the_models_is_in_the_wheel(
    wheel: zipfile.ZipFile,
) -> None:
    code = [path for package in ("fluxclip", "retrieval") for path in _files(ROOT / package)]
    models = _files(ROOT / "assets" / "models")
    sources = {path.relative_to(ROOT).as_posix(): path for path in code}
    sources |= {f"fluxclip/{path.relative_to(ROOT).as_posix()}": path for path in models}
    assert models
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == set(sources)
    for name, path in sources.items():
        assert wheel.getinfo(name).file_size == path.stat().st_size


def test_metadata_names_licence_command_and_one_faiss_per_extra(wheel: zipfile.ZipFile) -> None:
    info = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    names = set(wheel.namelist())
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names
    assert "fluxclip = fluxclip.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    faiss = [line for line in metadata.get_all("Requires-Dist", []) if "faiss" in line]
    assert [line.replace('"', "'").rpartition("; ")[2] for line in sorted(faiss)] == [
        "extra == 'cpu'",
        "extra == 'gpu'",
    ]


def test_constraints_name_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all(len(line.split("==")) == 2 and "/" not in line for line in pins)
