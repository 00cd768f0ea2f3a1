"""The truth of a collection: videos, segments, vectors and metadata in one SQLite file.

Write-ahead logging: a search reads while a long `add` commits, neither waits for the other, and a
commit costs one flush. While it is open the file has `-wal` and `-shm` beside it, which belong to
it; they need shared memory, so all processes that open one collection run on one machine.
Shape legend: N vectors, D width.
"""

import errno
import fcntl
import json
import math
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

DATABASE = "collection.sqlite"
LOCK = "collection.lock"
BUSY_TIMEOUT_S = 5.0  # how long a write waits for another one

MetadataValue = str | int | float | bool

_APPLICATION_ID = 0x464C5558  # "FLUX": tells a collection from any other SQLite file
_ROWS_AT_ONCE = 4096

# Migration number n leads from PRAGMA user_version n to n + 1. Never edit one that was released.
# AUTOINCREMENT: an id that was removed is never given out again.
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE videos (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            path TEXT NOT NULL UNIQUE,
            size INTEGER NOT NULL,
            mtime_ns INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            duration_s REAL NOT NULL,
            added_at TEXT NOT NULL
        )""",
        """CREATE TABLE segments (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            video_id INTEGER NOT NULL REFERENCES videos (id) ON DELETE CASCADE,
            start_s REAL NOT NULL,
            end_s REAL NOT NULL,
            vector BLOB NOT NULL
        )""",
        "CREATE INDEX segments_by_video ON segments (video_id)",
        """CREATE TABLE metadata (
            video_id INTEGER NOT NULL REFERENCES videos (id) ON DELETE CASCADE,
            key TEXT NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (video_id, key)
        ) WITHOUT ROWID""",
        "CREATE INDEX metadata_by_value ON metadata (key, value)",
        """CREATE TABLE texts (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            text TEXT NOT NULL UNIQUE,
            vector BLOB NOT NULL
        )""",
    ),
    (
        """CREATE TABLE revisions (
            revision INTEGER PRIMARY KEY,
            token TEXT NOT NULL DEFAULT (hex(randomblob(16)))
        )""",
        "INSERT INTO revisions (revision) "
        "SELECT coalesce(max(CAST(value AS INTEGER)), 0) FROM settings WHERE key = 'revision'",
        "DELETE FROM settings WHERE key = 'revision'",
    ),
    (
        # with these an index of an older revision learns what it holds too much
        """CREATE TABLE removed (
            revision INTEGER NOT NULL,
            segment_id INTEGER NOT NULL,
            PRIMARY KEY (revision, segment_id)
        ) WITHOUT ROWID""",
        """CREATE TRIGGER note_removed AFTER DELETE ON segments BEGIN
            INSERT INTO removed SELECT max(revision) + 1, OLD.id FROM revisions;
        END""",
    ),
)


@dataclass(frozen=True)
class FileState:
    """What tells whether a file is still the one that was read."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class SegmentRow:
    """A stored segment: [start_s, end_s) of a video."""

    id: int
    video_id: int
    video: str
    start_s: float
    end_s: float


class Store:
    """One open `collection.sqlite`. Belongs to the thread that opened it.

    SQLite's own errors come out as OSError (locked, full, read-only) or ValueError (damaged), in
    one line that names the collection.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self._connection: sqlite3.Connection | None = None
        with _plain_errors(folder):
            self._connection = _connect(folder / DATABASE)
            try:
                self._check_format()
                self.dim = int(self.settings()["dim"])
            except BaseException:
                self.close()
                raise

    @staticmethod
    def create(
        folder: Path, settings: Mapping[str, Any], *, beside: Callable[[Path], None] | None = None
    ) -> None:
        """Make a folder with an empty collection in it, in one step. FileExistsError if it exists.

        settings: whatever JSON can hold, `settings()` gives it back; "dim" is the vectors' width.
        beside: writes what else belongs into the folder, before it has its name.
        """
        refuse_existing(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
        try:
            with _plain_errors(folder):
                unfinished.mkdir()
                _fill_new(unfinished / DATABASE, settings)
                if beside is not None:
                    beside(unfinished)
                unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def remove_unfinished(self) -> list[str]:
        """Remove what was left where making this folder was killed once; says what that was."""
        pattern = re.compile(rf"\.{re.escape(self.name)}\.\d+\.unfinished")
        # nobody is at work there: under a name that is taken nothing is made
        beside = self.folder.parent.glob(".*.unfinished")
        left = [path for path in beside if pattern.fullmatch(path.name)]
        for path in left:
            shutil.rmtree(path)
        return [f"{path.name} was removed: a killed process left it" for path in left]

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # -- reading

    def settings(self) -> dict[str, Any]:
        """What `create` was given; a missing one is a ValueError, as is any damage."""
        with _plain_errors(self.folder):
            rows = self._rows("SELECT key, value FROM settings")
            return _Settings(self.folder, {key: json.loads(value) for key, value in rows})

    def revision(self) -> tuple[int, str]:
        """A number that grows with every committed write, and a random token of that write.

        After a restored backup a number may come again, a token never does.
        """
        number, token = self._rows("SELECT max(revision), token FROM revisions")[0]
        return number, token

    def has_revision(self, revision: tuple[int, str]) -> bool:
        """Whether what is stored now came from that revision."""
        sql = "SELECT 1 FROM revisions WHERE (revision, token) = (?, ?)"
        return bool(self._rows(sql, revision))

    def counts(self) -> dict[str, int]:
        """Number of videos, segments and texts."""
        tables = ("videos", "segments", "texts")
        return {name: self._rows(f"SELECT count(*) FROM {name}")[0][0] for name in tables}

    def files(self) -> dict[str, FileState]:
        """Every video's path and the state of its file when it was read."""
        rows = self._rows("SELECT path, size, mtime_ns, sha256 FROM videos ORDER BY path")
        return {path: FileState(*state) for path, *state in rows}

    def segment_ids(self, where: Mapping[str, MetadataValue] | None = None) -> np.ndarray:
        """Ids (N,) of the segments whose video has all of this metadata; int64, ascending."""
        condition = " AND ".join(
            "video_id IN (SELECT video_id FROM metadata WHERE key = ? AND value = ?)"
            for _ in where or ()
        )
        rows = self._rows(
            f"SELECT id FROM segments WHERE {condition or 'TRUE'}",
            [part for item in encode_metadata(where).items() for part in item],
        )
        return np.sort(np.fromiter((row[0] for row in rows), np.int64, len(rows)))

    def removed_since(self, revision: int) -> np.ndarray:
        """Ids (N,) of the segments that were removed after a revision; int64."""
        rows = self._rows("SELECT segment_id FROM removed WHERE revision > ?", [revision])
        return np.fromiter((row[0] for row in rows), np.int64, len(rows))

    def vectors(
        self, ids_N: np.ndarray | None = None, *, after: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids (N,) ascending and vectors (N, D) float32: those of `ids_N` that there are, or all.

        after: of all, only ids above it. Raises ValueError for a vector of the wrong size.
        """
        parameter: int | str = after
        sql = "FROM segments WHERE id > ?"
        if ids_N is not None:
            sql = "FROM segments WHERE id IN (SELECT value FROM json_each(?))"
            parameter = json.dumps(ids_N.tolist())
        with self.snapshot(), _plain_errors(self.folder):
            n = self._db.execute(f"SELECT count(*) {sql}", [parameter]).fetchone()[0]
            ids = np.empty(n, np.int64)
            vectors_ND = np.empty((n, self.dim), np.float32)
            cursor = self._db.execute(f"SELECT id, vector {sql} ORDER BY id", [parameter])
            at = 0
            while rows := cursor.fetchmany(_ROWS_AT_ONCE):
                if any(len(row[1]) != 4 * self.dim for row in rows):
                    raise _damaged(self.folder, "a vector has the wrong size")
                to = at + len(rows)
                ids[at:to] = [row[0] for row in rows]
                data = b"".join([row[1] for row in rows])
                vectors_ND[at:to] = np.frombuffer(data, "<f4").reshape(-1, self.dim)
                at = to
        return ids, vectors_ND

    def raw_vectors(self) -> Iterator[tuple[int, str, bytes]]:
        """Segment id, path of its video and the vector's bytes, unchecked, one at a time."""
        with _plain_errors(self.folder):
            yield from self._db.execute(
                "SELECT segments.id, path, vector FROM segments "
                "JOIN videos ON videos.id = video_id ORDER BY segments.id"
            )

    def segments(self, ids_N: np.ndarray) -> dict[int, SegmentRow]:
        """The segments of these ids that there are, by id."""
        rows = self._rows(
            "SELECT segments.id, video_id, path, start_s, end_s FROM segments "
            "JOIN videos ON videos.id = video_id "
            "WHERE segments.id IN (SELECT value FROM json_each(?))",
            [json.dumps(ids_N.tolist())],
        )
        return {row[0]: SegmentRow(*row) for row in rows}

    def metadata(self, video_id: int) -> dict[str, MetadataValue]:
        """A video's metadata, sorted by key."""
        with _plain_errors(self.folder):
            rows = self._rows(
                "SELECT key, value FROM metadata WHERE video_id = ? ORDER BY key", [video_id]
            )
            return {key: json.loads(value) for key, value in rows}

    def texts(self) -> tuple[list[tuple[int, str]], np.ndarray]:
        """Every text with its id, ascending, and their vectors (N, D) float32."""
        rows = self._rows("SELECT id, text, vector FROM texts ORDER BY id")
        if any(len(row[2]) != 4 * self.dim for row in rows):
            raise _damaged(self.folder, "a text's vector has the wrong size")
        data = b"".join([row[2] for row in rows])
        return [row[:2] for row in rows], np.frombuffer(data, "<f4").reshape(-1, self.dim)

    def problems(self) -> list[str]:
        """What SQLite itself finds wrong with its file; empty if nothing."""
        try:
            lines = [row[0] for row in self._rows("PRAGMA integrity_check") if row[0] != "ok"]
            orphans = self._rows("PRAGMA foreign_key_check")
        except ValueError as error:  # damaged so badly that the look itself fails
            return [str(error)]
        return lines + [f"{row[0]} {row[1]} belongs to no {row[2]}" for row in orphans]

    # -- writing: each call is one transaction

    def put_video(
        self,
        path: str,
        state: FileState,
        duration_s: float,
        segments: Sequence[tuple[float, float]],
        vectors_ND: np.ndarray,
        metadata: Mapping[str, MetadataValue] | None = None,
    ) -> None:
        """Store a video with its segments [start_s, end_s) and their vectors.

        Replaces the segments of a video that is there under this path; `metadata` is merged.
        """
        with self._transaction():
            [(video_id,)] = self._rows(
                "INSERT INTO videos (path, size, mtime_ns, sha256, duration_s, added_at) "
                "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (path) DO UPDATE SET size = excluded.size, "
                "mtime_ns = excluded.mtime_ns, sha256 = excluded.sha256, "
                "duration_s = excluded.duration_s, added_at = excluded.added_at RETURNING id",
                [path, state.size, state.mtime_ns, state.sha256, duration_s, now()],
            )
            self._db.execute("DELETE FROM segments WHERE video_id = ?", [video_id])
            self._db.executemany(
                "INSERT INTO segments (video_id, start_s, end_s, vector) VALUES (?, ?, ?, ?)",
                [
                    (video_id, start_s, end_s, vector.astype("<f4").tobytes())
                    for (start_s, end_s), vector in zip(segments, vectors_ND, strict=True)
                ],
            )
            self._put_metadata(video_id, metadata)

    def touch_video(
        self,
        path: str,
        state: FileState,
        metadata: Mapping[str, MetadataValue] | None = None,
    ) -> None:
        """Note a new state of a file with the same content, and merge `metadata`; if any is new."""
        [(video_id, *known)] = self._rows(
            "SELECT id, size, mtime_ns, sha256 FROM videos WHERE path = ?", [path]
        )
        held = encode_metadata(self.metadata(video_id))
        if FileState(*known) == state and encode_metadata(metadata).items() <= held.items():
            return
        with self._transaction():
            self._db.execute(
                "UPDATE videos SET size = ?, mtime_ns = ?, sha256 = ? WHERE id = ?",
                [state.size, state.mtime_ns, state.sha256, video_id],
            )
            self._put_metadata(video_id, metadata)

    def remove_video(self, path: str) -> int:
        """Remove a video with all its segments; returns how many these were, 0 if it is unknown."""
        with self._transaction():
            count: int = self._rows(
                "SELECT count(*) FROM segments JOIN videos ON videos.id = video_id WHERE path = ?",
                [path],
            )[0][0]
            self._db.execute("DELETE FROM videos WHERE path = ?", [path])
        return count

    def remove_segment(self, segment_id: int) -> int:
        """Remove one segment, and its video with the last; returns 1, or 0 if it is unknown."""
        with self._transaction():
            rows = self._rows("DELETE FROM segments WHERE id = ? RETURNING video_id", [segment_id])
            for (video_id,) in rows:
                self._db.execute(
                    "DELETE FROM videos WHERE id = ? "
                    "AND NOT EXISTS (SELECT 1 FROM segments WHERE video_id = videos.id)",
                    [video_id],
                )
        return len(rows)

    def remove_text(self, text: str) -> int:
        """Remove a text; returns 1, or 0 if it is unknown."""
        with self._transaction():
            return self._db.execute("DELETE FROM texts WHERE text = ?", [text]).rowcount

    def put_texts(self, texts: Sequence[str], vectors_ND: np.ndarray) -> None:
        """Store texts that are not there yet, with their vectors."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO texts (text, vector) VALUES (?, ?)",
                [
                    (text, vector.astype("<f4").tobytes())
                    for text, vector in zip(texts, vectors_ND, strict=True)
                ],
            )

    def set_setting(self, key: str, value: Any) -> None:
        """Change a setting to a value that JSON can hold."""
        with self._transaction():
            self._db.execute("REPLACE INTO settings VALUES (?, ?)", [key, json.dumps(value)])

    # -- transactions, locks, errors

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read inside is of one revision. May be nested."""
        if self._db.in_transaction:
            yield
            return
        with _plain_errors(self.folder):
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                if self._db.in_transaction:  # after some errors SQLite has ended it itself
                    self._db.execute("COMMIT")

    @contextmanager
    def sole_writer(self, *, wait_s: float | None = None) -> Iterator[None]:
        """Be the only process that writes; OSError if another one does for `wait_s` from now.

        Kept through a whole `add`, so that two of them do not embed the same files. The system
        drops the lock with the process, however that ends. wait_s: BUSY_TIMEOUT_S unless given, as
        a search may hold the lock while it writes its index.
        """
        path = self.folder / LOCK
        try:
            # not the database's own file: closing it would drop SQLite's locks of this process
            file = path.open("a")
        except OSError as error:
            raise PermissionError(
                f"collection {self.name!r} cannot be written: {error.strerror} ({path})"
            ) from error
        give_up_s = time.monotonic() + (BUSY_TIMEOUT_S if wait_s is None else wait_s)
        with file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= give_up_s:
                        raise BlockingIOError(
                            f"another process is writing to collection {self.name!r}: "
                            "try again when it is done"
                        ) from error
                time.sleep(0.02)
            yield

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ValueError(f"collection {self.name!r} is closed: open it again")
        return self._connection

    def _rows(self, sql: str, parameters: Iterable[Any] = ()) -> list[Any]:
        with _plain_errors(self.folder):
            return self._db.execute(sql, tuple(parameters)).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _plain_errors(self.folder):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("INSERT INTO revisions DEFAULT VALUES")
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _put_metadata(self, video_id: int, metadata: Mapping[str, MetadataValue] | None) -> None:
        self._db.executemany(
            "REPLACE INTO metadata VALUES (?, ?, ?)",
            [(video_id, key, value) for key, value in encode_metadata(metadata).items()],
        )

    def _check_format(self) -> None:
        [(application_id,)] = self._db.execute("PRAGMA application_id").fetchall()
        [(version,)] = self._db.execute("PRAGMA user_version").fetchall()
        if application_id != _APPLICATION_ID:
            raise ValueError(f"{str(self.folder / DATABASE)!r} is not the file of a collection")
        if version > len(_MIGRATIONS):
            raise ValueError(
                f"collection {self.name!r} has format {version}, this program reads up to "
                f"{len(_MIGRATIONS)}: install a newer fluxclip"
            )
        if version < len(_MIGRATIONS):
            with self._transaction():
                _migrate(self._db)


def encode_metadata(metadata: Mapping[str, MetadataValue] | None) -> dict[str, str]:
    """Metadata as it is stored and compared: JSON per value, equal exactly when the values are.

    Values are text, finite numbers, or True and False; 1 and 1.0 are equal, 1, "1" and True are
    not. Raises ValueError for anything else.
    """
    return {_checked_key(key): _encode(key, value) for key, value in (metadata or {}).items()}


def refuse_existing(folder: Path) -> None:
    """Raise FileExistsError if there is anything under this name."""
    if os.path.lexists(folder):
        raise FileExistsError(
            f"{str(folder)!r} exists already: choose another name, or open it if it is a collection"
        )


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _checked_key(key: object) -> str:
    if not isinstance(key, str) or not key:
        raise ValueError(f"a metadata key must be text and not empty, got {key!r}")
    return key


def _encode(key: str, value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        # up to 2**53 a whole number has one value as int and as float
        whole = value.is_integer() and abs(value) <= 2**53
        return json.dumps(int(value) if whole else float(value))
    if isinstance(value, str | bool | int):
        return json.dumps(value)
    raise ValueError(
        f"metadata {key!r} must be text, a finite number, or True or False; got {value!r}"
    )


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Turn errors about the file into OSError and ValueError that name the collection.

    Mistakes of ours are let through as they are.
    """
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise OSError(
                f"collection {folder.name!r} is locked by another process: "
                "try again when it is done"
            ) from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN):
            raise PermissionError(
                f"collection {folder.name!r} cannot be opened or written: {error} ({folder})"
            ) from error
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise _full(folder, error) from error
        if isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError):
            raise
        raise _damaged(folder, str(error)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(folder, error) from error
        raise
    except json.JSONDecodeError as error:
        raise _damaged(folder, f"a value is not JSON: {error}") from error


class _Settings(dict[str, Any]):
    """Settings of which every one that is asked for must be there."""

    def __init__(self, folder: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._folder = folder

    def __missing__(self, key: str) -> Any:
        raise _damaged(self._folder, f"it has no setting {key!r}")


def _full(folder: Path, error: Exception) -> OSError:
    return OSError(
        f"the disk of collection {folder.name!r} fails or is full: {error} ({folder}); "
        "what was committed is kept"
    )


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"collection {folder.name!r} is damaged ({what}): restore {str(folder / DATABASE)!r} "
        "from a copy, or add the videos to a new collection"
    )


def _connect(path: Path) -> sqlite3.Connection:
    """Open for writing where that is allowed, else for reading."""
    mode = "rw"
    if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        # Without a log beside it nobody is writing; SQLite would want to make one to read.
        logged = path.with_name(path.name + "-wal").exists()
        mode = "ro" if logged else "ro&immutable=1"
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
    )
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def _fill_new(path: Path, settings: Mapping[str, Any]) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN")
        _migrate(connection)
        connection.executemany(
            "INSERT INTO settings VALUES (?, ?)",
            [(key, json.dumps(value)) for key, value in settings.items()],
        )
        connection.execute("COMMIT")
    finally:
        connection.close()


def _migrate(connection: sqlite3.Connection) -> None:
    """Bring a database to the newest format, inside the caller's transaction."""
    # read here: since the caller looked, another process may have done it
    [(version,)] = connection.execute("PRAGMA user_version").fetchall()
    for statements in _MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")
