"""The arguments that several verbs take, and how they are read."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

MODEL_HELP = "folder, run folder, shipped name, hf:// or open_clip:"
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
NewFolder = Annotated[Path, typer.Option("--output", help="a folder that does not exist yet")]
Captions = Literal["first", "all", "joined"]
Cut = Annotated[
    Literal["windows", "shots"], typer.Option(help="how longer videos are cut into moments")
]
WindowS = Annotated[
    float, typer.Option(help="windows of so many seconds; shots longer than that are cut too")
]
StrideS = Annotated[
    float | None, typer.Option(help="a window begins every so many seconds; else without overlap")
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object per line")]


def read_budgets(text: str) -> list[int | None]:
    """Token counts as in "all,256,64"; all is None. Raises ValueError for anything else."""
    return [None if word == "all" else _count(word, ", or all") for word in _words(text)]


def read_counts(text: str) -> list[int]:
    """Token counts as in "256,64". Raises ValueError for anything else."""
    return [_count(word) for word in _words(text)]


def key_values(pairs: list[str], option: str) -> dict[str, str | int | float | bool]:
    """key=value pairs, values as `read_value` reads them. ValueError for what is no such pair."""
    values: dict[str, str | int | float | bool] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} takes key=value, got {pair!r}")
        values[key] = read_value(text)
    return values


def read_value(text: str) -> str | int | float | bool:
    """A JSON number, true or false, or a JSON text in quotes, as such; else the text itself."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, (str, int, float, bool)) else text


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _count(word: str, also: str = "") -> int:
    if not word.isdecimal() or int(word) < 1:
        raise ValueError(f"--budgets takes token counts of 1 or more{also}, got {word!r}")
    return int(word)


def new_folder(folder: Path) -> Path:
    """The folder itself. Raises FileExistsError if it exists already."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: choose another --output")
    return folder
