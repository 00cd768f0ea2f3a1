"""Annotations as Arrow tables: columns "video", "captions" and "family", checked.

pyarrow and `datasets` are imported where they are used: with small JSON, nothing is.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fluxclip.data.sources import cache_folder

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

ROWS = 2**16  # in a piece of a table


class Row(NamedTuple):
    """What an annotation says of a video: its path as it stands there, captions, family."""

    video: str
    captions: Sequence[str]
    family: str | None


def schema() -> "pa.Schema":
    """Of every table here. Large: their offsets have 64 bits, so that no text is too long."""
    import pyarrow as pa

    text = pa.large_string()
    return pa.schema({"video": text, "captions": pa.large_list(text), "family": text})


def refuse_no_column(column: str, there: Sequence[str], what: str) -> None:
    """ValueError, with the columns that are there, if `column` is none or several of them."""
    if list(there).count(column) != 1:
        how_many = "no column" if column not in there else "several columns"
        raise ValueError(
            f"{what} has {how_many} {column!r}; it has: {', '.join(there) or 'nothing'}; "
            f"?video=...&caption=... after the name chooses others"
        )


def of_rows(rows: Iterable[Row]) -> Iterator["pa.Table"]:
    import pyarrow as pa

    rows = iter(rows)
    while piece := list(islice(rows, ROWS)):
        columns = [list(column) for column in zip(*piece, strict=True)]
        yield pa.table(columns, schema=schema())


def of_parquet(path: Path, *, columns: Sequence[str]) -> Iterator["pa.Table"]:
    """The rows of a Parquet file; ValueError if it is none, or not of this form."""
    with _quiet() as datasets:
        try:
            dataset = datasets.IterableDataset.from_parquet(str(path), cache_dir=_locks())
        except Exception as error:  # Arrow has many
            raise ValueError(f"{path} cannot be read as Parquet: {_line(error)}") from error
        yield from _checked(dataset, str(path), columns)


def of_hub(
    repository: str, what: str, *, columns: Sequence[str], split: str = "train",
    config: str | None = None, revision: str | None = None,
) -> Iterator["pa.Table"]:  # fmt: skip
    """The rows of ORG/NAME on the hub, or of a folder that looks like one.

    ValueError if it cannot be read.
    """
    with _quiet() as datasets:
        try:
            dataset = datasets.load_dataset(
                repository, config, split=split, revision=revision, streaming=True,
                cache_dir=_locks(),
            )  # fmt: skip
        except Exception as error:  # of the network, the hub, any format
            raise ValueError(f"{what} cannot be read: {_line(error)}") from error
        yield from _checked(dataset, what, columns)


def _locks() -> str:
    """Where `datasets` leaves its lock files; streaming, it keeps nothing else."""
    return str(cache_folder() / "datasets")


class _quiet:
    """The module `datasets`, which in here logs nothing: what fails is raised, and said once."""

    def __enter__(self) -> Any:
        import datasets

        self._was = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        return datasets

    def __exit__(self, *error: object) -> None:
        import datasets

        datasets.logging.set_verbosity(self._was)


def _checked(
    dataset: "datasets.IterableDataset", what: str, columns: Sequence[str]
) -> Iterator["pa.Table"]:
    import pyarrow as pa

    try:
        there = list(dataset.column_names or next(iter(dataset.take(1)), {}))
    except Exception as error:  # JSON, for one, has no columns before a row of it is read
        raise ValueError(f"{what} cannot be read: {_line(error)}") from error
    for column in columns:
        refuse_no_column(column, there, what)
    family = ["family"] if "family" in there and "family" not in columns else []
    pieces = dataset.select_columns([*columns, *family]).with_format("arrow").iter(ROWS)
    done = 0
    while True:
        try:
            piece = next(pieces, None)
        except Exception as error:
            raise ValueError(f"{what} cannot be read after row {done:,}: {_line(error)}") from error
        if piece is None:
            return
        videos, captions = (piece[column].combine_chunks() for column in columns)
        if (bad := _first_bad(videos)) is not None:
            raise ValueError(
                f"row {done + bad + 1} of {what}: {columns[0]!r} must be a path, "
                f"got {_shown(videos, bad)}"
            )
        families = piece["family"] if family else pa.nulls(len(piece))
        if str(families.type) not in ("string", "large_string", "null"):
            raise ValueError(f"{what}: column 'family' must hold texts, it is {families.type}")
        lists = _lists(captions, what, done)
        yield pa.table([videos, lists, families], names=schema().names).cast(schema())
        done += len(piece)


def _lists(captions: Any, what: str, done: int) -> Any:
    """A column of texts, or of lists of them, as lists; ValueError with the row of a wrong one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(captions.type) or pa.types.is_large_list(captions.type):
        lengths = pc.fill_null(pc.list_value_length(captions), 0).to_numpy()
        texts = captions.flatten()
        if not lengths.all():
            row = done + int(np.argmin(lengths != 0)) + 1
            raise ValueError(f"row {row} of {what} has no caption; at least one text is needed")
    else:
        lengths, texts = np.ones(len(captions), np.int64), captions
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (bad := _first_bad(texts)) is not None:
        row = done + int(np.searchsorted(ends, bad, side="right"))
        raise ValueError(f"row {row} of {what}: a caption must be a text, got {_shown(texts, bad)}")
    return pa.LargeListArray.from_arrays(ends, texts.cast(pa.large_string()))


def _first_bad(values: Any) -> int | None:
    """Number of the first value that is no text or a blank one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return 0 if len(values) else None
    blank = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(values, "")), "")
    at: int = pc.index(blank, True).as_py()
    return None if at < 0 else at


def _shown(values: Any, at: int) -> str:
    """A value on one line, cut short, with its type where that is the trouble."""
    text = _line(repr(values[at].as_py()))
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if "string" in str(values.type) else f"{text} ({values.type})"


def _line(text: object) -> str:
    return " ".join(str(text).split())


def joined(tables: Iterable["pa.Table"]) -> Iterator["pa.Table"]:
    """The rows, those of one video as one, where the first of them stands; all in memory."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = pa.concat_tables([*tables, schema().empty_table()])
    codes = pc.dictionary_encode(table["video"]).combine_chunks()
    if isinstance(codes, pa.ChunkedArray):  # no row, no chunk
        codes = pa.concat_arrays(codes.chunks)
    code_N = codes.indices.to_numpy()
    if len(codes.dictionary) == len(table):
        yield table
        return
    order = np.argsort(code_N, kind="stable")
    first = order[np.concatenate([[0], np.cumsum(np.bincount(code_N))[:-1]])]
    sorted_ = table["captions"].combine_chunks().take(pa.array(order))
    ends = np.concatenate([[0], np.cumsum(pc.list_value_length(sorted_).to_numpy())])
    of_video = np.concatenate([[0], np.cumsum(np.bincount(code_N))])
    captions = pa.LargeListArray.from_arrays(ends[of_video], sorted_.flatten())
    family = table["family"].combine_chunks().take(pa.array(first))
    yield pa.table([codes.dictionary, captions, family], schema=schema())
