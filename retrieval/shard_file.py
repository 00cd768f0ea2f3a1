"""A Parquet file of segments or texts with their vectors, and the marker that says it is finished.

A row is a segment; the rows of a video stand together, in one file. What all of a file shares
(model, fingerprint, token budget, how videos were cut) is JSON in the schema's metadata, under the
key "fluxclip". The marker of `shard.parquet` is `_shard.done` beside it; readers of folders leave
out names with such a beginning.
Shape legend: N segments or texts, D width.
"""

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fluxclip.video import Cutting

from .conditions import encode_metadata
from .ingest import UNIT_TOLERANCE
from .store import FileState, VideoRow

FORMAT = 1
KEY = "fluxclip"  # in the metadata of the schema
SUFFIX, DONE = ".parquet", ".done"
ROWS_PER_GROUP = 16_384
_LEFT_AFTER_S = 86_400  # nobody writes at a file of another machine any more that is older

_COLUMNS = ("id", "video", "size", "mtime_ns", "sha256", "duration_s", "start_s", "end_s",
            "metadata", "vector")  # fmt: skip
_TEXT_COLUMNS = ("id", "text", "vector")
_ABOUT = ("model_source", "model_name", "fingerprint", "dim", "token_budget",
          "cut", "window_s", "stride_s")  # fmt: skip


class DamagedError(ValueError):
    """A file, or a part of it, is not what this module wrote."""


class ShardWriter:
    """A file of segments or texts on its way; it gets its name when it is left without an error."""

    def __init__(self, path: Path, about: Mapping[str, Any], *, content: str = "segments") -> None:
        import pyarrow
        from pyarrow import parquet

        text, whole, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
        kinds = {name: text for name in ("video", "sha256", "metadata", "text")}
        kinds |= {name: real for name in ("duration_s", "start_s", "end_s")}
        kinds["vector"] = pyarrow.list_(pyarrow.float32(), about["dim"])
        names = _COLUMNS if content == "segments" else _TEXT_COLUMNS
        self._schema = pyarrow.schema(
            [(name, kinds.get(name, whole)) for name in names],
            metadata={KEY: json.dumps({"format": FORMAT, "content": content, **about})},
        )
        self._path = path
        self._unfinished = _unfinished(path)
        self._columns: dict[str, list[Any]] = {name: [] for name in names}
        self.videos = self.rows = 0
        with _errors_named(path):
            # no dictionaries of vectors: none comes twice
            self._file = parquet.ParquetWriter(
                self._unfinished, self._schema, compression="zstd", write_page_checksum=True,
                use_dictionary=["video", "sha256", "metadata"], write_statistics=list(names[:-1]),
            )  # fmt: skip

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None
    ) -> None:
        try:
            with _errors_named(self._path):
                if kind is None:
                    self._write_group()
                self._file.close()
                if kind is None:
                    with self._unfinished.open("rb") as file:
                        os.fsync(file.fileno())
                    _unmark(self._path)  # what it says is about the file of before
                    self._unfinished.replace(self._path)
                    for name in (self._path.name, marker_of(self._path).name):
                        _remove_left(self._path.with_name(name))
        finally:
            self._unfinished.unlink(missing_ok=True)

    def add(self, video: VideoRow) -> None:
        """Append a video, with the ids of its segments where it has some."""
        num = len(video.segments)
        metadata = json.dumps(dict(video.metadata or {}), ensure_ascii=False)
        same = (video.path, *asdict(video.state).values(), video.duration_s, metadata)
        names = ("video", "size", "mtime_ns", "sha256", "duration_s", "metadata")
        for name, value in zip(names, same, strict=True):
            self._columns[name] += [value] * num
        self._columns["id"] += [None] * num if video.ids is None else video.ids
        self._columns["start_s"] += [start_s for start_s, _ in video.segments]
        self._columns["end_s"] += [end_s for _, end_s in video.segments]
        self._columns["vector"] += list(video.vectors_ND)
        self.videos += 1
        self.rows += num
        if len(self._columns["id"]) >= ROWS_PER_GROUP:
            self._write_group()

    def add_texts(self, texts: Sequence[tuple[int, str]], vectors_ND: np.ndarray) -> None:
        self._columns["id"] += [id for id, _ in texts]
        self._columns["text"] += [text for _, text in texts]
        self._columns["vector"] += list(vectors_ND)
        self.rows += len(texts)
        if len(self._columns["id"]) >= ROWS_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow

        if not self._columns["id"]:
            return
        *others, vectors = self._columns.values()
        kinds = self._schema.types
        arrays = [pyarrow.array(one, kind) for one, kind in zip(others, kinds[:-1], strict=True)]
        flat = np.concatenate(vectors).astype(np.float32, copy=False)
        arrays.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), type=kinds[-1]))
        with _errors_named(self._path):
            table = pyarrow.table(arrays, schema=self._schema)
            self._file.write_table(table, max(ROWS_PER_GROUP, len(table)))  # one group of them
        self._columns = {name: [] for name in self._columns}


class ShardFile:
    """A file that was written, opened for reading. Raises `DamagedError` for what is none."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self.path = path
        self.num_rows_read = 0
        # not kept open: an array may be of more files than a process may have open
        with _damage(), parquet.ParquetFile(path) as file:
            self.num_rows: int = file.metadata.num_rows
            schema = file.schema_arrow
        self._said = _said_in(schema)
        try:
            self.about: dict[str, Any] = json.loads(self._said)
            stated = {key: self.about[key] for key in ("format", "content", *_ABOUT)}
            Cutting.of(self.about)  # checks itself
        except (KeyError, ValueError, TypeError) as error:
            raise DamagedError(
                f"it does not say which model made it, under {KEY!r} in its schema's metadata: "
                "not a file of fluxclip embed or index export"
            ) from error
        if stated["format"] != FORMAT:
            raise DamagedError(f"it has format {stated['format']}, this program reads {FORMAT}")
        self.is_of_texts: bool = stated["content"] == "texts"
        wanted = _TEXT_COLUMNS if self.is_of_texts else _COLUMNS
        if lacking := [name for name in wanted if name not in schema.names]:
            raise DamagedError(f"it lacks the columns {', '.join(lacking)}")
        self._names = list(wanted)

    def videos(self) -> Iterator[list[VideoRow]]:
        """The videos in their order, as many at a time as make about `ROWS_PER_GROUP` rows."""
        seen: set[str] = set()
        video: VideoRow | None = None
        whole: list[VideoRow] = []
        num_rows = 0
        for piece in self._pieces():
            if video is not None and video.path == piece.path:
                video = _joined(video, piece)
                continue
            if video is not None:
                whole.append(video)
                num_rows += len(video.segments)
            if piece.path in seen:
                raise DamagedError(f"the rows of {piece.path!r} do not stand together")
            seen.add(piece.path)
            if num_rows >= ROWS_PER_GROUP:
                yield whole
                whole, num_rows = [], 0
            video = piece
        if video is not None:
            yield [*whole, video]

    def texts(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Texts and their vectors (N, D), so many at a time."""
        for columns, vectors_ND in self._batches():
            if not all(isinstance(text, str) and text.strip() for text in columns["text"]):
                raise DamagedError("a text is empty")
            yield list(columns["text"]), vectors_ND

    def _pieces(self) -> Iterator[VideoRow]:
        """Rows of one video that follow each other in one batch."""
        for columns, vectors_ND in self._batches():
            paths = columns["video"]
            start = 0
            for end in range(1, len(paths) + 1):
                if end == len(paths) or paths[end] != paths[start]:
                    yield _checked_video(columns, vectors_ND, start, end)
                    start = end

    def _batches(self) -> Iterator[tuple[dict[str, list[Any]], np.ndarray]]:
        """Columns but the vectors as lists, and the vectors (N, D), which are of length 1."""
        for batch in self._record_batches():
            columns = {name: batch.column(name) for name in self._names}
            for name, column in columns.items():
                if name != "id" and column.null_count:
                    raise DamagedError(f"column {name!r} has rows without a value")
            vector = columns.pop("vector")
            try:
                flat = vector.flatten().to_numpy(zero_copy_only=False)
                vectors_ND = np.asarray(flat, np.float32).reshape(len(vector), self.about["dim"])
            except (ValueError, TypeError, AttributeError) as error:
                raise DamagedError(f"its vectors are not of {self.about['dim']} numbers") from error
            # false for what is not a number
            is_unit_N = np.abs(np.linalg.norm(vectors_ND, axis=1) - 1) <= UNIT_TOLERANCE
            if not is_unit_N.all():
                row = self.num_rows_read + int(np.argmin(is_unit_N))
                raise DamagedError(f"the vector of row {row} is not of length 1")
            self.num_rows_read += len(vectors_ND)
            yield {name: column.to_pylist() for name, column in columns.items()}, vectors_ND

    def _record_batches(self) -> Iterator[Any]:
        from pyarrow import parquet

        with _damage():
            file = parquet.ParquetFile(self.path, page_checksum_verification=True)
        with file:
            if _said_in(file.schema_arrow) != self._said:
                raise DamagedError("it was replaced meanwhile: import again")
            # group by group: over all of them at once pyarrow keeps what it has read
            for group in range(file.num_row_groups):
                batches = file.iter_batches(
                    ROWS_PER_GROUP // 4, row_groups=[group], columns=self._names
                )
                while True:
                    with _damage():
                        batch = next(batches, None)
                    if batch is None:
                        break
                    yield batch


def _said_in(schema: Any) -> bytes:
    """What a schema's metadata hold under `KEY`; empty if nothing."""
    said: bytes = (schema.metadata or {}).get(KEY.encode(), b"")
    return said


def _checked_video(
    columns: Mapping[str, list[Any]], vectors_ND: np.ndarray, start: int, end: int
) -> VideoRow:
    """The video that the rows [start, end) of a batch are of."""
    path = columns["video"][start]
    try:
        metadata = json.loads(columns["metadata"][start])
        if not isinstance(metadata, dict):
            raise ValueError("its metadata are no JSON object")
        encode_metadata(metadata)
        video = VideoRow(
            path,
            FileState(*(columns[name][start] for name in ("size", "mtime_ns", "sha256"))),
            columns["duration_s"][start],
            list(zip(columns["start_s"][start:end], columns["end_s"][start:end], strict=True)),
            vectors_ND[start:end],
            metadata,
            None if None in columns["id"][start:end] else columns["id"][start:end],
        )
        if not os.path.isabs(path):
            raise ValueError("its path is not absolute")
        if not 0 <= video.duration_s < math.inf:
            raise ValueError(f"it lasts {video.duration_s} s")
        for start_s, end_s in video.segments:
            if not 0 <= start_s <= end_s < math.inf:
                raise ValueError(f"a segment is [{start_s}, {end_s})")
        if video.ids is not None and (np.diff([0, *video.ids]) <= 0).any():
            raise ValueError("the ids of its segments do not ascend from 1")
    except (ValueError, TypeError) as error:
        raise DamagedError(f"video {path!r}: {error}") from error
    return video


def _joined(video: VideoRow, more: VideoRow) -> VideoRow:
    if video.ids is not None and more.ids is not None:
        ids: Sequence[int] | None = [*video.ids, *more.ids]
        if more.ids[0] <= video.ids[-1]:
            raise DamagedError(f"video {video.path!r}: the ids of its segments do not ascend")
    else:
        ids = None
    return replace(
        video,
        segments=[*video.segments, *more.segments],
        vectors_ND=np.concatenate([video.vectors_ND, more.vectors_ND]),
        ids=ids,
    )


def marker_of(file: Path) -> Path:
    """Where the marker of a file is."""
    return file.with_name(f"_{file.stem.lstrip('_')}{DONE}")


def read_marker(file: Path) -> dict[str, Any] | None:
    """What the marker of a file says; None unless it is there and about this very file."""
    try:
        said = json.loads(marker_of(file).read_text(encoding="utf-8"))
        is_of_it = (said["format"], said["bytes"]) == (FORMAT, file.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return said if is_of_it else None


def write_marker(file: Path, said: Mapping[str, Any]) -> None:
    marker = marker_of(file)
    unfinished = _unfinished(marker)
    text = json.dumps({"format": FORMAT, "bytes": file.stat().st_size, **said}, indent=2)
    with _errors_named(marker):
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(marker)


def _unmark(file: Path) -> None:
    marker_of(file).unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    """The name of a file on its way, of this process alone: others may be at work on the same."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def _remove_left(path: Path) -> None:
    """Remove what killed processes left of a file; whoever may still be at work keeps its own."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(.+)\.(\d+)\.tmp")
    for left in path.parent.glob(".*.tmp"):
        if not (match := pattern.fullmatch(left.name)):
            continue
        host, pid = match.groups()
        with suppress(FileNotFoundError):
            is_old = time.time() - left.stat().st_mtime > _LEFT_AFTER_S
            if is_old or (host == os.uname().nodename and not _is_running(int(pid))):
                left.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Name the file that cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise OSError(f"cannot write {path}: {reason}") from error


@contextmanager
def _damage() -> Iterator[None]:
    """Turn what pyarrow says about a file that is none, or damaged, into one line."""
    try:
        yield
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # OSError, ValueError and more, by where the damage is
        reason = " ".join(str(error).split())
        raise DamagedError(f"it is damaged, or no Parquet file: {reason[:200]}") from error
