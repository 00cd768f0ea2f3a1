"""Plugins: a name in a config is a file in a folder, or a dotted name of a module from outside."""

import difflib
import pkgutil
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def available(package: str) -> list[str]:
    """Names of the modules in a package's folder, sorted, without importing any of them.

    Names that start with "_" are private to the folder and left out.
    """
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    names = (module.name for module in pkgutil.iter_modules(spec.submodule_search_locations))
    return sorted(name for name in names if not name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """The module that `name` stands for: a file in the package's folder, or a dotted name.

    `load("fluxclip.tokens.scorers", "uniform")` imports that file, a name with a dot
    ("my_package.my_scorer") is imported from outside. Raises ValueError for an unknown name
    (with the nearest and all known ones) and for a module that cannot be imported (with the
    cause).
    """
    kind = package.rpartition(".")[2].removesuffix("s")
    if "." in name:
        try:
            return import_module(name)
        except Exception as error:  # code from outside can fail in any way
            raise ValueError(
                f"cannot import {kind} {name!r}: {_cause(error)}; a dotted name must be a module "
                "that Python finds (is its folder on PYTHONPATH?)"
            ) from error
    # reading clips asks for a decoder each time, which need not list the folder
    if f"{package}.{name}" in sys.modules:
        return import_module(f"{package}.{name}")  # waits for a thread that is at it
    known = available(package)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown {kind} {name!r} in {package}: {hint}known: {', '.join(known)}")
    try:
        return import_module(f"{package}.{name}")
    except ImportError as error:
        raise ValueError(f"cannot import {kind} {name!r}: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
