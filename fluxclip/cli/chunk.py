"""The verb that cuts long videos into chunks that are quick to read from: chunk."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fluxclip.cli.output import list_failed, progress_bar

app = typer.Typer()


@app.command()
def chunk(
    videos: Annotated[list[Path], typer.Argument(help="files, or folders with all below them")],
    output: Annotated[Path, typer.Option(help="where a folder NAME.chunks is made of each")],
    seconds: Annotated[int, typer.Option(min=1, help="a chunk covers so many")] = 15,
    side: Annotated[int, typer.Option(min=16, help="pixels of the shorter side, at most")] = 288,
    gop: Annotated[int, typer.Option(min=1, help="frames from one keyframe to the next")] = 15,
    workers: Annotated[
        int | None, typer.Option(min=1, help="videos or chunks at once; by default one per core")
    ] = None,
) -> None:
    """Cut long videos into short chunks without sound, from which clips are read much faster.

    A folder of chunks is read like the video, at the same times. Stopped and run again, it goes on
    where it was. A video that cannot be read is listed, and the exit code is 2.
    """
    from fluxclip.video import chunk_writer
    from fluxclip.video.chunks import Settings

    settings = Settings(seconds=seconds, side=side, gop=gop)
    found = chunk_writer.find(videos, output)
    with progress_bar("chunk") as advance:
        report = chunk_writer.write(
            found, settings=settings, workers=workers or os.cpu_count() or 1, progress=advance
        )
    print(
        f"{output}: {len(report.written)} written, {len(report.kept)} there already, "
        f"{len(report.failed)} failed"
    )
    list_failed("not cut", report.failed)
    if report.failed:
        raise typer.Exit(2)
