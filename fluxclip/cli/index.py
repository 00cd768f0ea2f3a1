"""The verbs about collections of videos: index ..."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fluxclip.cli import exchange
from fluxclip.cli.arguments import AsJson, Cut, Model, StrideS, WindowS, key_values
from fluxclip.cli.output import list_failed, print_json, progress_bar, say

if TYPE_CHECKING:
    from retrieval import AddReport

app = typer.Typer()
index_app = typer.Typer(help="Build and keep a collection of videos.", no_args_is_help=True)
app.add_typer(index_app, name="index")
index_app.add_typer(exchange.app)


@index_app.command("create")
def index_create(
    collection: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    model: Model,
    token_budget: Annotated[int | None, typer.Option(help="tokens per segment")] = None,
    cut: Cut = "windows",
    window_s: WindowS = 10.0,
    stride_s: StrideS = None,
) -> None:
    """Make an empty collection for the vectors of one model."""
    from retrieval import Collection

    with Collection.create(
        collection,
        model=model,
        token_budget=token_budget,
        cut=cut,
        window_s=window_s,
        stride_s=stride_s,
    ) as made:
        info = made.info()
    print(
        f"{collection}: an empty collection for {info['model_name']}, {info['dim']} numbers "
        f"a segment"
    )
    if not info["text_encoder"]:
        say(
            "note: a search by text will load the model, which takes seconds; "
            "fluxclip export says why"
        )


@index_app.command("add")
def index_add(
    collection: Path,
    paths: Annotated[list[str], typer.Argument(help="files, folders, patterns")],
    meta: Annotated[
        list[str] | None, typer.Option(help="metadata of these videos, key=value; repeatable")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="remove videos whose file is gone from these folders")
    ] = False,
    json: AsJson = False,
) -> None:
    """Add videos and images; what is there already and unchanged is skipped."""
    from retrieval import Collection

    metadata = key_values(meta or [], "--meta")
    with Collection.open(collection) as opened, progress_bar("add") as advance:
        report = opened.add(
            paths, metadata=metadata, prune=prune,
            progress=lambda done, total, path: advance(done, total), say=say,
        )  # fmt: skip
        segments = len(opened)
    if json:
        print_json(
            {
                "added": report.added,
                "skipped": report.skipped,
                "moved": report.moved,
                "missing": report.missing,
                "failed": report.failed,
                "segments": segments,
            }
        )
    else:
        for old, new in report.moved.items():
            say(f"moved: {old} -> {new}")
        for path in report.missing:
            say(f"removed, its file is gone: {path}" if prune else f"its file is gone: {path}")
        if report.missing and not prune:
            say("note: these can still be found; --prune removes them")
        print(
            f"{collection}: {report.added} added, {report.skipped} skipped, "
            f"{len(report.failed)} failed; {segments} segments now"
        )
    _report_failures(report)


@index_app.command("remove")
def index_remove(
    collection: Path,
    videos: Annotated[list[str] | None, typer.Argument(help="paths as added")] = None,
    id: Annotated[list[int] | None, typer.Option(help="of a segment; repeatable")] = None,
) -> None:
    """Remove videos, or segments by their ids, in one step; the files themselves stay."""
    from retrieval import Collection

    if bool(videos) == bool(id):
        raise ValueError("index remove takes paths of videos, or --id of segments")
    with Collection.open(collection) as opened:
        removed = opened.remove(video=videos) if videos else opened.remove(id=id)
        print(f"{collection}: {removed} segments removed; {len(opened)} segments now")


@index_app.command("backup")
def index_backup(
    collection: Path,
    folder: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
) -> None:
    """Copy a collection into a new folder, while it may be in use."""
    from retrieval import Collection

    with Collection.open(collection) as opened:
        opened.backup(folder)
    with Collection.open(folder) as copy:
        print(f"{folder}: a copy of {len(copy)} segments")


@index_app.command("info")
def index_info(collection: Path, json: AsJson = False) -> None:
    """Say what a collection holds and which model made it."""
    from retrieval import Collection

    with Collection.open(collection) as opened:
        info = opened.info()
    if json:
        print_json(info)
        return
    for key, value in info.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {number}" for part, number in value.items())
        print(f"{key}: {value}")


@index_app.command("check")
def index_check(collection: Path) -> None:
    """Verify a collection and repair its index; exit code 2 if something cannot be mended."""
    from retrieval import Collection

    with Collection.open(collection) as opened:
        found = opened.check()
    for kind in ("problems", "fixed", "missing_files"):
        for line in getattr(found, kind):
            print(f"{kind.replace('_', ' ')}: {line}")
    if found.problems:
        raise typer.Exit(2)
    print(f"{collection} is sound")


@index_app.command("rebuild")
def index_rebuild(
    collection: Path,
    index: Annotated[
        str | None, typer.Option(help="auto, or a FAISS factory string, such as Flat")
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="auto: what the vectors that are searched may take")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="auto: what one search may take")] = None,
) -> None:
    """Make the index anew from what is stored."""
    from retrieval import Collection

    with Collection.open(collection) as opened:
        opened.rebuild(
            index,
            memory_limit=None if memory_gb is None else int(memory_gb * 1e9),
            latency_ms=latency_ms,
            say=say,
        )
        made = opened.info()["index_file"] or {}
        print(f"{collection}: {made.get('kind')} index of {len(opened)} segments")


def _report_failures(report: "AddReport") -> None:
    """List what could not be added; exit code 2 if it was named directly."""
    list_failed("not added", report.failed)
    if report.named_failed:
        raise typer.Exit(2)
