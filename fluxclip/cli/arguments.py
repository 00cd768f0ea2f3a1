"""The arguments that several verbs take, and how they are read."""

from pathlib import Path
from typing import Annotated, Literal

import typer

MODEL_HELP = "folder, run folder, shipped name, hf:// or open_clip:"
Model = Annotated[str, typer.Option(help=MODEL_HELP)]
NewFolder = Annotated[Path, typer.Option("--output", help="a folder that does not exist yet")]
Captions = Literal["first", "all", "joined"]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object per line")]


def read_budgets(text: str) -> list[int | None]:
    """Token counts as in "all,256,64"; all is None. Raises ValueError for anything else."""
    budgets: list[int | None] = []
    for part in text.split(","):
        word = part.strip()
        if word == "all":
            budgets.append(None)
        elif word.isdecimal() and int(word) > 0:
            budgets.append(int(word))
        else:
            raise ValueError(f"--budgets takes token counts of 1 or more, or all, got {word!r}")
    return budgets


def new_folder(folder: Path) -> Path:
    """The folder itself. Raises FileExistsError if it exists already."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: choose another --output")
    return folder
