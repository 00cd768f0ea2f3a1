"""The verb that packs pairs into tar files: shards write."""

from pathlib import Path
from typing import Annotated

import typer

from fluxclip.cli.output import list_failed, progress_bar

app = typer.Typer()
shards_app = typer.Typer(
    help="Pack videos and their captions into tar files for training.", no_args_is_help=True
)
app.add_typer(shards_app, name="shards")


@shards_app.callback()
def _shards() -> None:
    """So that one verb alone is still a verb."""


@shards_app.command()
def write(
    annotations: Annotated[str, typer.Argument(help="videos and captions, as in a recipe")],
    output: Annotated[Path, typer.Argument(help="a folder, new or begun by the same command")],
    side: Annotated[int, typer.Option(help="pixels of a video's short side, at most")] = 288,
    gop: Annotated[int, typer.Option(help="frames between keyframes, at most")] = 15,
    copy: Annotated[bool, typer.Option("--copy", help="take the files as they are")] = False,
    shard_mb: Annotated[float, typer.Option(help="million bytes of a shard, at most")] = 256,
    workers: Annotated[int, typer.Option(help="processes that transcode")] = 0,
    most_broken: Annotated[
        float, typer.Option(help="share of pairs whose videos may be unreadable")
    ] = 0.1,
    source: Annotated[str, typer.Option(help="what reads the annotations")] = "annotations",
) -> None:
    """Pack videos and captions into tar shards; started again, it goes on where it was stopped."""
    from fluxclip.data import shards

    with progress_bar("packing") as advance:
        written = shards.write(
            annotations, output, source=source, side=side, gop=gop, copy=copy, shard_mb=shard_mb,
            workers=workers, most_broken=most_broken, progress=advance,
        )  # fmt: skip
    list_failed("skipped", written.skipped)
    share = written.num_skipped / (written.records + written.num_skipped)
    print(
        f"{output}: {written.records:,} pairs in {written.shards:,} shards, "
        f"{written.bytes / 1e6:,.1f} MB; {written.num_skipped:,} skipped ({share:.1%})"
    )
