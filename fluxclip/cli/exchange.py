"""The verbs that bring vectors into a collection, or out: index re-embed, import, export."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fluxclip.cli.arguments import MODEL_HELP, AsJson
from fluxclip.cli.output import list_failed, print_json, progress_bar, say

app = typer.Typer()


@app.command("re-embed")
def re_embed(
    collection: Path,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
    token_budget: Annotated[int | None, typer.Option(help="tokens per segment")] = None,
    drop_failed: Annotated[
        bool, typer.Option("--drop-failed", help="remove videos that cannot be read any more")
    ] = False,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="give up what an interrupted one has made")
    ] = False,
    json: AsJson = False,
) -> None:
    """Let another model make the vectors; the old ones serve until all of the new ones are there.

    Started again after an interruption, it goes on. Segments, ids and metadata stay as they are.
    """
    from retrieval import Collection

    if abandon == (model is not None):
        raise ValueError("index re-embed takes either --model or --abandon")
    with Collection.open(collection) as opened:
        if model is None:
            given_up = opened.abandon_re_embed()
            print(f"{collection}: {'given up' if given_up else 'nothing was under way'}")
            return
        with progress_bar("re-embed") as advance:
            report = opened.re_embed(
                model, token_budget=token_budget, drop_failed=drop_failed,
                progress=lambda done, total, path: advance(done, total),
            )  # fmt: skip
        name = opened.info()["model_name"]
    if json:
        print_json(
            {"done": report.done, "failed": report.failed, "switched": report.switched,
             "model_name": name}
        )  # fmt: skip
    else:
        serves = f"{name} serves now" if report.switched else f"the old vectors of {name} serve"
        print(f"{collection}: {report.done} videos re-embedded; {serves}")
    list_failed("not re-embedded", report.failed)
    if not report.switched:
        say(
            f"fluxclip: {collection} still answers by its old vectors: bring these "
            f"{len(report.failed)} files back or add them again, and start anew, or remove them "
            "with --drop-failed"
        )
        raise typer.Exit(2)


@app.command("import")
def import_(
    collection: Path,
    files: Annotated[
        list[str], typer.Argument(help="Parquet files of embed --shard or index export; folders")
    ],
    create: Annotated[
        bool,
        typer.Option("--create", help="make the collection, as the files say, if it is not there"),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="with --create: where the model of these files is now")
    ] = None,
    json: AsJson = False,
) -> None:
    """Add videos with their vectors, without embedding; what is there and unchanged is skipped."""
    from retrieval import Collection

    if model is not None and not create:
        raise ValueError("--model goes with --create; a collection knows its model")
    if create and not os.path.lexists(collection):
        into = Collection.create_for(collection, files, model=model)
    else:  # with --create: of a call that was stopped
        into = Collection.open(collection, model=model)
    with into as opened, progress_bar("import") as advance:
        report = opened.import_shards(
            files, progress=lambda done, total, path: advance(done, total), say=say
        )
        segments = len(opened)
    if json:
        print_json(
            {"added": report.added, "skipped": report.skipped, "texts": report.texts,
             "failed": report.failed, "missing": report.missing, "segments": segments}
        )  # fmt: skip
    else:
        print(
            f"{collection}: {report.added} videos added, {report.skipped} skipped, "
            f"{report.texts} texts added; {segments} segments now"
        )
    for file in report.missing:
        say(f"note: {file} is not there (yet)")
    list_failed("not imported", report.failed)
    if report.failed:
        raise typer.Exit(2)


@app.command("export")
def export(
    collection: Path,
    folder: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    rows_per_file: Annotated[
        int, typer.Option(help="a file that has so many segments ends with its last video")
    ] = 1_000_000,
) -> None:
    """Write all segments and texts with their vectors as Parquet; index import reads them."""
    from retrieval import Collection

    with Collection.open(collection) as opened, progress_bar("export") as advance:
        report = opened.export_shards(
            folder, rows_per_file=rows_per_file,
            progress=lambda done, total, path: advance(done, total),
        )  # fmt: skip
    print(
        f"{folder}: {report.videos} videos, {report.segments} segments, {report.texts} texts "
        f"in {report.files} files"
    )
