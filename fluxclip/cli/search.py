"""The verb `search`: its many ways to ask, and to show the answers."""

import io
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fluxclip.cli.arguments import AsJson, read_value
from fluxclip.cli.output import list_failed, print_json, say

if TYPE_CHECKING:
    from retrieval import Hit, Query

# Of --minus. As heavy as the query itself, it would also take away what the two have in common.
MINUS_WEIGHT = -0.5

app = typer.Typer()

_BOUNDS = {">=": "gte", "<=": "lte", ">": "gt", "<": "lt"}
_CONDITION = re.compile(
    r"(?P<key>.+?)(?:\s*(?P<sign>>=|<=|>|<|=)\s*|\s+(?P<word>in)\s+)(?P<value>.*)"
)
_EXISTS = re.compile(r"(?P<key>.+?)(?P<no>\s+not)?\s+exists\s*")


@app.command()
def search(
    collection: Path,
    text: Annotated[str | None, typer.Argument(help="what to look for")] = None,
    video: Annotated[str | None, typer.Option(help="look for what is like this video")] = None,
    image: Annotated[str | None, typer.Option(help="look for what is like this picture")] = None,
    plus: Annotated[
        list[str] | None, typer.Option(help="text that counts as much as the rest; repeatable")
    ] = None,
    minus: Annotated[
        list[str] | None, typer.Option(help="text that leads away, by half; repeatable")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="instead: a file of texts to look for, one per line")
    ] = None,
    token_budget: Annotated[
        int | None, typer.Option(help="tokens of --video or --image; else the collection's")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="hits")] = 10,
    offset: Annotated[int, typer.Option(help="leave out so many of the best: the next page")] = 0,
    where: Annotated[
        list[str] | None,
        typer.Option(
            help="only videos with this metadata: key=value, 'key>=2020', 'key<5', 'key in a,b', "
            "'key exists', 'key not exists'; repeatable, all must hold"
        ),
    ] = None,
    min_score: Annotated[float | None, typer.Option(help="only scores from here on")] = None,
    group_by: Annotated[
        Literal["video"] | None, typer.Option(help="video: the best moment of each only")
    ] = None,
    merge: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="hits of a video at most so far apart are one (0: those that touch)",
        ),
    ] = None,
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="write a table of the hits; - prints it")
    ] = None,
    save_clips: Annotated[
        Path | None, typer.Option(help="a folder for the moments, cut out of their videos")
    ] = None,
    thumbnails: Annotated[Path | None, typer.Option(help="a folder for a picture of each")] = None,
    json: AsJson = False,
) -> None:
    """Find the moments that answer a sentence, a video or a picture."""
    from retrieval import Collection

    options: dict[str, Any] = {
        "k": k, "offset": offset, "where": _where(where or []), "min_score": min_score,
        "group_by": group_by, "merge_gap_s": merge,
    }  # fmt: skip
    if csv == "-" and json:
        raise ValueError("--csv - and --json both print: give one of them")
    with Collection.open(collection) as opened:
        if queries is not None:
            if text or video or image or plus or minus or csv or save_clips or thumbnails:
                raise ValueError("--queries takes the place of any other query, and prints only")
            texts = _lines(queries)
            answers = opened.search_many(texts, token_budget=token_budget, **options)
            for line, hits in zip(texts, answers, strict=True):
                if json:
                    for hit in hits:
                        print_json({"query": line, **hit.to_dict()})
                else:
                    print(f"{line}:")
                    _print(hits, offset)
            return
        hits = opened.search(
            mix=_mix(text, video, image, plus or [], minus or []),
            token_budget=token_budget,
            **options,
        )
        size = len(opened)
    if json:
        for hit in hits:
            print_json(hit.to_dict())
    elif csv != "-":
        _print(hits, offset)
    if len(hits) < k:
        narrowed = where or offset or min_score is not None
        what = "that match" if narrowed else f"in a collection of {size} segments"
        say(f"note: {len(hits)} hits {what}; {k} were asked for")
    if csv is not None:
        _write_csv(hits, csv)
    failed = _save(hits, save_clips, "clips") | _save(hits, thumbnails, "thumbnails")
    if failed:
        list_failed("not saved", failed)
        raise typer.Exit(2)


def _mix(
    text: str | None, video: str | None, image: str | None, plus: list[str], minus: list[str]
) -> "list[Query]":
    """The query and what is to be added to it or taken away."""
    from retrieval import Query

    main = [part for part in (text, video, image) if part is not None]
    if len(main) > 1 or not (main or plus):
        raise ValueError("search takes one query: a text, --video or --image")
    mix = [Query(text, video=video, image=image)] if main else []
    mix += [Query(part) for part in plus]
    return mix + [Query(part, weight=MINUS_WEIGHT) for part in minus]


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if not (texts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"no query in {file}: write one per line")
    return texts


def _where(given: list[str]) -> dict[str, Any] | None:
    """Conditions as `Collection.search` takes them; several bounds of one key go together."""
    where: dict[str, Any] = {}
    for line in given:
        key, condition = _condition(line)
        held = where.setdefault(key, condition)
        if held is not condition:
            if not isinstance(held, dict) or not isinstance(condition, dict):
                raise ValueError(f"--where names {key!r} twice: {line!r}")
            if held.keys() & condition.keys():
                raise ValueError(f"--where bounds {key!r} twice: {line!r}")
            held.update(condition)
    return where or None


def _condition(line: str) -> tuple[str, Any]:
    if match := _CONDITION.fullmatch(line):
        key, value = match["key"].strip(), match["value"]
        # "year!=2020" would be about a key "year!", "year==2020" about a text "=2020"
        if key.endswith(("!", " not")) or value.startswith(("=", "<", ">")):
            raise ValueError(
                f"--where knows =, >, >=, <, <=, in, exists and not exists, got {line!r}; a text "
                'that begins like these goes in quotes: key="=2020"'
            )
        if match["word"]:
            return key, {"in": [read_value(part.strip()) for part in value.split(",")]}
        if match["sign"] == "=":
            return key, read_value(value)
        return key, {_BOUNDS[match["sign"]]: read_value(value)}
    if match := _EXISTS.fullmatch(line):
        return match["key"].strip(), {"exists": not match["no"]}
    raise ValueError(
        "--where takes key=value, 'key>=2020', 'key in a,b', 'key exists' or 'key not exists', "
        f"got {line!r}"
    )


def _print(hits: "list[Hit]", offset: int) -> None:
    for place, hit in enumerate(hits, start=offset + 1):
        span = f"{hit.start_s:7.2f} - {hit.end_s:7.2f} s"
        print(f"{place:3d}  {hit.score:.3f}  {span}  {hit.video}")


def _write_csv(hits: "list[Hit]", to: str) -> None:
    from retrieval import write_csv

    table = io.StringIO(newline="")
    write_csv(hits, table)
    # a path that is not UTF-8 is escaped, as in JSON
    content = table.getvalue().encode("utf-8", "backslashreplace")
    if to == "-":
        sys.stdout.write(content.decode("utf-8"))
    else:
        Path(to).write_bytes(content)


def _save(
    hits: "list[Hit]", folder: Path | None, what: Literal["clips", "thumbnails"]
) -> dict[str, str]:
    if folder is None:
        return {}
    from retrieval import save_all

    failed = save_all(hits, folder, what=what)
    say(f"{folder}: {len(hits) - len(failed)} {what}")
    return failed
