"""Plugins: found by file name, nothing imported before it is asked for."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxclip import plugins


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package `plugin_shop.scorers` outside the project, with three modules and a private one."""
    package = tmp_path / "plugin_shop" / "scorers"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py"):
        file.touch()
    for name in ("uniform", "random_drop", "group_dynamic", "_shared"):
        (package / f"{name}.py").write_text(f"NAME = {name!r}\n")
    (package / "needs_library.py").write_text("import no_such_library\n")
    (package / "explodes.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "plugin_shop.scorers"
    for name in [name for name in sys.modules if name.partition(".")[0] == "plugin_shop"]:
        del sys.modules[name]


def test_available_lists_files_sorted_without_private_ones(folder: str) -> None:
    names = ["explodes", "group_dynamic", "needs_library", "random_drop", "uniform"]
    assert plugins.available(folder) == names


def test_available_imports_no_module_of_the_folder(folder: str) -> None:
    plugins.available(folder)
    assert not [name for name in sys.modules if name.startswith(f"{folder}.")]


def test_short_name_is_a_file_in_the_folder(folder: str) -> None:
    module = plugins.load(folder, "uniform")
    assert module.__name__ == f"{folder}.uniform"
    assert vars(module)["NAME"] == "uniform"


def test_dotted_name_comes_from_outside(folder: str) -> None:
    assert plugins.load("fluxclip.tokens.scorers", f"{folder}.random_drop").__name__ == (
        f"{folder}.random_drop"
    )


def test_unknown_name_answers_with_the_nearest_and_the_known_ones(folder: str) -> None:
    with pytest.raises(ValueError) as caught:
        plugins.load(folder, "unifrom")
    assert str(caught.value) == (
        "unknown scorer 'unifrom' in plugin_shop.scorers: did you mean 'uniform'? "
        "known: explodes, group_dynamic, needs_library, random_drop, uniform"
    )


@pytest.mark.parametrize("name", ["", "zzz", "_shared", "__init__", "../uniform/x"])
def test_names_that_are_no_plugin_are_refused(folder: str, name: str) -> None:
    with pytest.raises(ValueError, match="scorer"):
        plugins.load(folder, name)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("needs_library", "No module named 'no_such_library'"),
        ("plugin_shop.scorers.needs_library", "No module named 'no_such_library'"),
        ("plugin_shop.scorers.explodes", "RuntimeError: two lines"),
        ("plugin_shop.nothing", "No module named 'plugin_shop.nothing'"),
        (".relative", "relative"),
    ],
)
def test_broken_import_names_the_module_and_the_cause(folder: str, name: str, cause: str) -> None:
    with pytest.raises(ValueError) as caught:
        plugins.load(folder, name)
    message = str(caught.value)
    assert repr(name) in message
    assert cause in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None


def test_plugins_import_nothing_heavy() -> None:
    script = (
        "import sys, fluxclip.plugins; heavy = {'torch', 'numpy', 'transformers', 'faiss'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
