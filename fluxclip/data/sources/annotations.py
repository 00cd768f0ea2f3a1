"""Annotations: pairs in a JSON, JSON lines, CSV or Parquet file, or a data set of the hub.

JSON is `[{"video": path, "caption": str | [str, ...]}]`, as UMT and VindLU have it; JSON lines have
such an object on each line. An image is a clip of one frame and stands under "video" too. Other
keys than "video", "caption" and "family" are left alone. A table (CSV, Parquet, hub) has columns of
those names, and its rows of one video are one record.

Small JSON is kept in memory. All else is read and checked once, written to the cache folder as
Arrow and from then on mapped into memory: processes share it, and opening it takes no time.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fluxclip.data.sources import (
    MissingFiles,
    Record,
    Records,
    fingerprint_of_file,
    looked_at,
    missing,
    split_settings,
)
from fluxclip.data.sources import _tables as tables
from fluxclip.data.sources._prepared import prepared

_SHOWN = 3  # missing files named in an error
_IN_MEMORY = 2**22  # bytes of JSON, some 40,000 records
_HUB = "hf://datasets/"
_OF_FILES = ("video", "caption", "folder")
_OF_HUB = (*_OF_FILES, "split", "config", "revision")
_FORM = 'expected a list of {"video": path, "caption": text or list of texts}'


class _Keys(NamedTuple):
    """Where a record's video and its captions stand."""

    video: str = "video"
    caption: str = "caption"


def files(name: str) -> list[Path]:
    """The annotation file; none for a data set of the hub."""
    return [] if name.startswith(_HUB) else [Path(name.partition("?")[0])]


def identity(name: str) -> str:
    """A hash of the file and, where they are not the usual ones, of the columns that are read.

    A data set of the hub, and a file that is not there, are told from others by name. Where the
    videos are does not count: the same files may lie elsewhere. ValueError for unknown settings.
    """
    if name.startswith(_HUB):
        return name
    source, given = split_settings(name, known=_OF_FILES)
    found, keys = fingerprint_of_file(Path(source)), _keys(given)
    if not found or keys == _Keys():
        return found or name
    return hashlib.sha256(json.dumps([found, *keys]).encode()).hexdigest()


def read(path: str | Path, *, check_files: bool = True, folder: Path | None = None) -> Records:
    """The records of an annotation file, in its order.

    path: a file, or "hf://datasets/ORG/NAME?split=train"; "set.csv?video=path&caption=text" reads
    other columns or keys, "&folder=DIR" says where the videos are. Relative paths count from
    `folder`, by default the annotation file's own, and for the hub the one the command runs in.
    Raises FileNotFoundError if the file is missing or, with `check_files`, if a video of it is
    (with the count and the first names; of many records some are looked at), ValueError, with the
    number from 1 of the record, line or row, if the file is not in this form, and OSError if the
    cache folder cannot be written to.
    """
    name = str(path)
    from_hub = name.startswith(_HUB)
    source, given = split_settings(name, known=_OF_HUB if from_hub else _OF_FILES)
    keys = _keys(given)
    home = Path() if from_hub else Path(source).parent
    folder = Path(given["folder"]) if "folder" in given else folder or home
    records: Sequence[Record]
    if from_hub:
        place = {key: given[key] for key in ("split", "config", "revision") if key in given}
        records = prepared(
            [source, *keys, place], folder=folder, title=source.rpartition("/")[2], state=None,
            tables=lambda: tables.joined(
                tables.of_hub(source.removeprefix(_HUB), name, columns=keys, **place)
            ),
        )  # fmt: skip
    else:
        records = _of_file(Path(source), keys, folder)
    found = Records(records)
    if check_files:
        _require_files(found, source, folder)
    return found


def _keys(given: Mapping[str, str]) -> _Keys:
    return _Keys(given.get("video", "video"), given.get("caption", "caption"))


def _of_file(path: Path, keys: _Keys, folder: Path) -> Sequence[Record]:
    """The records of a file, from memory or from what an earlier start prepared of it."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "not found"
        raise FileNotFoundError(
            f"annotation file {path}: {what}; expected a JSON, JSON lines, CSV or Parquet file"
        )
    suffix, status = path.suffix.lower(), path.stat()
    make: Callable[[], Any]
    if suffix == ".parquet":
        make = lambda: tables.joined(tables.of_parquet(path, columns=keys))  # noqa: E731
    elif suffix in (".csv", ".tsv"):
        make = lambda: tables.joined(tables.of_rows(_csv(path, keys)))  # noqa: E731
    else:
        rows = _lines if suffix in (".jsonl", ".ndjson") else _json
        if status.st_size <= _IN_MEMORY:
            return [
                Record(folder / video, tuple(captions), family)
                for video, captions, family in rows(path, keys)
            ]
        make = lambda: tables.of_rows(rows(path, keys))  # noqa: E731
    return prepared(
        [str(path.resolve()), *keys], folder=folder, title=path.stem,
        state=[status.st_size, status.st_mtime_ns, fingerprint_of_file(path)], tables=make,
    )  # fmt: skip


def _json(path: Path, keys: _Keys) -> Iterator[tables.Row]:
    items = _load(path)
    for number, item in enumerate(items, start=1):
        yield _row(item, keys, where=f"record {number} of {len(items)} in {path}")


def _lines(path: Path, keys: _Keys) -> Iterator[tables.Row]:
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _row(json.loads(line), keys, where=f"line {number} of {path}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text; expected JSON lines") from error
        except (json.JSONDecodeError, RecursionError) as error:
            why = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise ValueError(f"line {number} of {path} is not JSON: {why}") from error


def _csv(path: Path, keys: _Keys) -> Iterator[tables.Row]:
    """Rows by Python's own reader: pandas', which `datasets` uses, takes a comma too many in the
    first row for a column of its own and moves all others."""
    number = 0  # data rows
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            lines = csv.reader(file, "excel-tab" if path.suffix.lower() == ".tsv" else "excel")
            header = next(lines, [])
            for key in keys:
                tables.refuse_no_column(key, header, str(path))
            for number, fields in enumerate((fields for fields in lines if fields), start=1):
                where = f"row {number} of {path}"
                if len(fields) != len(header):
                    raise ValueError(
                        f"{where} has {len(fields)} fields where the header has {len(header)}; a "
                        f"text with a comma, tab or line break stands in double quotes"
                    )
                item: dict[str, Any] = dict(zip(header, fields, strict=True))
                yield _row({**item, "family": item.get("family") or None}, keys, where=where)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text; expected CSV") from error
        except csv.Error as error:
            raise ValueError(f"row {number + 1} of {path} is not CSV: {error}") from error


def _load(path: Path) -> list[Any]:
    """The list in a JSON file; raises if it is not JSON, no list or empty."""
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; {_FORM} in JSON") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}; {_FORM}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; {_FORM}") from error
    if not isinstance(items, list):
        raise ValueError(f"{path} holds a JSON {_json_type(items)}; {_FORM}")
    if not items:
        raise ValueError(f"{path} is an empty list; {_FORM}")
    return items


def _row(item: object, keys: _Keys, *, where: str) -> tables.Row:
    """One item of a file, checked."""
    if not isinstance(item, dict):
        raise ValueError(
            f"{where} is a {_json_type(item)}; expected an object with "
            f'"{keys.video}" and "{keys.caption}"'
        )
    for key in keys:
        if key not in item:
            raise ValueError(f"{where} has no {key!r}; it has: {', '.join(item) or 'nothing'}")
    video, caption, family = item[keys.video], item[keys.caption], item.get("family")
    if not isinstance(video, str) or not video:
        raise ValueError(f"{where}: {keys.video!r} must be a path, got {_shown(video)}")
    captions = caption if isinstance(caption, list) else [caption]
    if not captions:
        raise ValueError(f"{where}: {keys.caption!r} is an empty list; at least one text is needed")
    for text in captions:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: a caption must be a text, got {_shown(text)}")
    if family is not None and not isinstance(family, str):
        raise ValueError(f"{where}: 'family' must be a string, got {_shown(family)}")
    return tables.Row(video, captions, family)


def _require_files(records: Records, source: str, folder: Path) -> None:
    """Raise MissingFiles if a video does not exist; of many records some are looked at."""
    if not (gone := missing(records)):
        return
    numbers = looked_at(len(records))
    num_files = len({records[i].video for i in numbers})
    some = len(numbers) < len(records)
    by = f" (by {len(numbers):,} of {len(records):,} records)" if some else ""
    more = ", ..." if len(gone) > _SHOWN else ""
    raise MissingFiles(
        f"{source}: {len(gone)} of {num_files} video files not found{by}: "
        f"{', '.join(map(str, gone[:_SHOWN]))}{more}; relative paths count from {folder}/",
        share=len(gone) / num_files,
    )


def _json_type(value: object) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _shown(value: object) -> str:
    """A value as JSON on one line, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
