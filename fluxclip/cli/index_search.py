"""The verbs about collections of videos: index ..., search."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fluxclip.cli.arguments import AsJson, Model
from fluxclip.cli.output import list_failed, print_json, progress_bar, say

if TYPE_CHECKING:
    from retrieval import AddReport

app = typer.Typer()
index_app = typer.Typer(help="Build and keep a collection of videos.", no_args_is_help=True)
app.add_typer(index_app, name="index")


@index_app.command("create")
def index_create(
    collection: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    model: Model,
    token_budget: Annotated[int | None, typer.Option(help="tokens per segment")] = None,
    window_s: Annotated[
        float, typer.Option(help="longer videos are cut into windows of so many seconds")
    ] = 10.0,
) -> None:
    """Make an empty collection for the vectors of one model."""
    from retrieval import Collection

    with Collection.create(
        collection, model=model, token_budget=token_budget, window_s=window_s
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
    json: AsJson = False,
) -> None:
    """Add videos and images; what is there already and unchanged is skipped."""
    from retrieval import Collection

    metadata = _key_values(meta or [], "--meta")
    with Collection.open(collection) as opened, progress_bar("add") as advance:
        report = opened.add(
            paths, metadata=metadata,
            progress=lambda done, total, path: advance(done, total),
        )  # fmt: skip
        segments = len(opened)
    if json:
        print_json(
            {
                "added": report.added,
                "skipped": report.skipped,
                "failed": report.failed,
                "segments": segments,
            }
        )
    else:
        print(
            f"{collection}: {report.added} added, {report.skipped} skipped, "
            f"{len(report.failed)} failed; {segments} segments now"
        )
    _report_failures(report)


@index_app.command("remove")
def index_remove(
    collection: Path, videos: Annotated[list[str], typer.Argument(help="paths as added")]
) -> None:
    """Remove videos from a collection; the files themselves stay."""
    from retrieval import Collection

    with Collection.open(collection) as opened:
        for video in videos:
            removed = opened.remove(video=video)
            print(f"{video}: {removed} segments removed")


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
    index: Annotated[str | None, typer.Option(help="a FAISS factory string, such as Flat")] = None,
) -> None:
    """Make the index anew from what is stored."""
    from retrieval import Collection

    with Collection.open(collection) as opened:
        opened.rebuild(index=index)
        print(f"{collection}: {opened.info()['index']} index of {len(opened)} segments")


@app.command()
def search(
    collection: Path,
    text: Annotated[str | None, typer.Argument(help="what to look for")] = None,
    video: Annotated[str | None, typer.Option(help="look for what is like this video")] = None,
    image: Annotated[str | None, typer.Option(help="look for what is like this picture")] = None,
    k: Annotated[int, typer.Option("-k", help="hits")] = 10,
    where: Annotated[
        list[str] | None, typer.Option(help="only with this metadata, key=value; repeatable")
    ] = None,
    group_by: Annotated[
        Literal["video"] | None, typer.Option(help="video: the best segment of each only")
    ] = None,
    json: AsJson = False,
) -> None:
    """Find the moments that answer a sentence, a video or a picture."""
    from retrieval import Collection

    conditions = _key_values(where or [], "--where")
    with Collection.open(collection) as opened:
        hits = opened.search(
            text, video=video, image=image, k=k, where=conditions or None, group_by=group_by
        )
        size = len(opened)
    if json:
        for hit in hits:
            print_json(hit.to_dict())
    for place, hit in enumerate([] if json else hits, start=1):
        span = f"{hit.start_s:7.2f} - {hit.end_s:7.2f} s"
        print(f"{place:3d}  {hit.score:.3f}  {span}  {hit.video}")
    if len(hits) < k:
        what = "that match" if conditions else f"in a collection of {size} segments"
        say(f"note: {len(hits)} hits {what}; {k} were asked for")


def _key_values(pairs: list[str], option: str) -> dict[str, str | int | float | bool]:
    """key=value pairs; a value that reads as a JSON number or true/false is one."""
    values: dict[str, str | int | float | bool] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} takes key=value, got {pair!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        values[key] = value if isinstance(value, (str, int, float, bool)) else text
    return values


def _report_failures(report: "AddReport") -> None:
    """List what could not be added; exit code 2 if it was named directly."""
    list_failed("not added", report.failed)
    if report.named_failed:
        raise typer.Exit(2)
