"""Records in an Arrow file of the cache folder: written once, then mapped into memory."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxclip.data.sources import Record, cache_folder
from fluxclip.data.sources._tables import ROWS, schema

if TYPE_CHECKING:
    import pyarrow as pa

_VERSION = 1  # of what is written
_STATE = b"fluxclip"  # where a file says what it was made of


class Stored(Sequence[Record]):
    """Records in an Arrow file, relative paths counted from `folder`.

    Pickled as names: each process maps the file itself, and the machine keeps its pages once.
    Raises ValueError if the file is of another state than `state`, or none.
    """

    def __init__(self, path: Path, state: str, *, folder: Path) -> None:
        import pyarrow as pa

        self.path, self.state, self.folder = path, state, folder
        try:
            self._pieces = pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is broken: {error}") from error
        if (self._pieces.schema.metadata or {}).get(_STATE) != state.encode():
            raise ValueError(f"{path} has been replaced since this run started")
        last = self._pieces.num_record_batches - 1
        self._columns: dict[int, list[pa.Array]] = {}
        self._size = last * ROWS + self._pieces.get_batch(last).num_rows

    def __reduce__(self) -> Any:
        return _opened, (self.path, self.state, self.folder)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        piece, row = divmod(range(self._size)[index], ROWS)
        if piece not in self._columns:  # where they lie in the file, not what they hold
            self._columns[piece] = self._pieces.get_batch(piece).columns
        videos, captions, families = self._columns[piece]
        return Record(
            self.folder / videos[row].as_py(), tuple(captions[row].as_py()), families[row].as_py()
        )


def _opened(path: Path, state: str, folder: Path) -> Stored:
    return Stored(path, state, folder=folder)


def prepared(
    source: Sequence[Any], *, state: Any, title: str, folder: Path,
    tables: Callable[[], Iterable["pa.Table"]],
) -> Stored:  # fmt: skip
    """What `tables` gives, from the cache folder if it is there, else written to it first.

    source: what is read, and how. title: a name for people. state: of the source now; of another
    one it is prepared anew, in the same place. Raises OSError if the folder cannot be written to,
    ValueError if there is no record.
    """
    from filelock import FileLock

    name, state = _hash(source), _hash([_VERSION, state])
    place = cache_folder() / "annotations"
    path = place / f"{re.sub(r'[^A-Za-z0-9-]', '_', title)[:60]}-{name[:16]}.arrow"
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()  # one process of a job prepares, the others wait
    try:
        try:
            return Stored(path, state, folder=folder)
        except (ValueError, FileNotFoundError):
            if not _write(path, tables(), state=state):
                raise ValueError(f"{source[0]} has no records") from None
        return Stored(path, state, folder=folder)
    finally:
        lock.release()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _write(path: Path, tables: Iterable["pa.Table"], *, state: str) -> int:
    """How many rows the tables have, written in pieces of ROWS: all or, of none, no file."""
    import pyarrow as pa

    partial, num_rows = path.with_suffix(".partial"), 0
    try:
        with ExitStack() as stack:
            with writing(path.parent):
                file = stack.enter_context(pa.OSFile(str(partial), "wb"))
                metadata = {_STATE: state.encode()}
                writer = pa.ipc.new_file(file, schema().with_metadata(metadata))
            for table in tables:
                num_rows += len(table)
                for start in range(0, len(table), ROWS):
                    with writing(path.parent):
                        writer.write_table(table.slice(start, ROWS).combine_chunks())
            with writing(path.parent):
                writer.close()
        if num_rows:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return num_rows


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Let an error say that it is about the cache folder, and how to choose another."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write to {folder}: {error.strerror or error}; set FLUXCLIP_CACHE to a folder "
            f"that has room and can be written to"
        ) from error
