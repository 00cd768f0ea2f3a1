"""The verbs for a first look: demo, doctor."""

from pathlib import Path
from typing import Annotated

import typer

from fluxclip.cli.arguments import AsJson
from fluxclip.cli.output import console, print_json

app = typer.Typer()


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train, score, index and search on real clips in a few minutes, and write a report."""
    from fluxclip.demo import run

    report = run(output, console=console("stderr"))
    print(f"report: {report}")


@app.command()
def doctor(json: AsJson = False) -> None:
    """Say what is installed, what it can do, and what is missing for what."""
    from fluxclip.doctor import findings

    found = findings()
    if json:
        print_json(found)
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")
