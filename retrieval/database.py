"""`collection.sqlite` as a file: opening, snapshots, transactions, locks, copies, errors."""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from .schema import fill_new, is_newest, migrate

DATABASE = "collection.sqlite"
LOCK = "collection.lock"
BUSY_TIMEOUT_S = 5.0  # how long a write waits for another one

_log = logging.getLogger(__name__)


class Database:
    """One open `collection.sqlite`: its settings, revisions, transactions and locks.

    Belongs to the thread that opened it. SQLite's own errors come out as OSError (locked, full,
    read-only) or ValueError (damaged), in one line that names the collection.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self._connection: sqlite3.Connection | None = None
        self._held_settings: dict[str, Any] | None = None  # those read in the present snapshot
        with plain_errors(folder):
            self._connection = _connect(folder / DATABASE)
            try:
                if not is_newest(self._db, folder / DATABASE):
                    if not _is_writable(folder / DATABASE):
                        raise PermissionError(
                            f"collection {self.name!r} has an older format and cannot be written: "
                            "open it once where it may be, which brings it to the newest"
                        )
                    # of a large collection it takes a minute
                    _log.info("collection %r: its file is brought to a newer format", self.name)
                    with self._transaction():
                        migrate(self._db)
                for needed in ("space", "dim"):  # a file that lacks them is refused at once
                    self._setting(needed)
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
        with _new_folder(folder) as unfinished:
            fill_new(unfinished / DATABASE, settings)
            if beside is not None:
                beside(unfinished)

    def backup(self, folder: Path, *, beside: Callable[[Path], None] | None = None) -> None:
        """Copy the file as it is now into a new folder, in one step, whoever writes meanwhile.

        beside: writes what else belongs into the folder, before it has its name; called before the
        copy is made, and again after it. Raises FileExistsError if there is such a folder.
        """
        with _new_folder(folder) as unfinished:
            if beside is not None:
                beside(unfinished)
            with closing(sqlite3.connect(unfinished / DATABASE)) as copy:
                self._db.backup(copy)
            if beside is not None:
                beside(unfinished)

    def remove_unfinished(self) -> list[str]:
        """Remove what was left where making this folder was killed once; says what that was."""
        left = remove_unfinished(self.folder)
        return [f"{name} was removed: a killed process left it" for name in left]

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def settings(self) -> dict[str, Any]:
        """What `create` was given; a missing one is a ValueError, as is any damage."""
        with plain_errors(self.folder):
            rows = self._rows("SELECT key, value FROM settings")
            return _Settings(self.folder, {key: json.loads(value) for key, value in rows})

    def set_settings(self, settings: Mapping[str, Any]) -> None:
        """Change settings, all in one step, to values that JSON can hold."""
        with self._transaction():
            for key, value in settings.items():
                self._put_setting(key, value)

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

    def problems(self) -> list[str]:
        """What SQLite itself finds wrong with its file; empty if nothing."""
        try:
            lines = [row[0] for row in self._rows("PRAGMA integrity_check") if row[0] != "ok"]
            orphans = self._rows("PRAGMA foreign_key_check")
        except ValueError as error:  # damaged so badly that the look itself fails
            return [str(error)]
        return lines + [f"{row[0]} {row[1]} belongs to no {row[2]}" for row in orphans]

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read inside is of one revision. May be nested."""
        if self._db.in_transaction:
            yield
            return
        with plain_errors(self.folder):
            self._db.execute("BEGIN")
            self._held_settings = {}
            try:
                yield
            finally:
                self._held_settings = None
                if self._db.in_transaction:  # after some errors SQLite has ended it itself
                    self._db.execute("COMMIT")

    @contextmanager
    def flushed_at_the_end(self) -> Iterator[None]:
        """What is committed inside is on the disk at the end of it, not with each commit.

        A kill takes nothing of it away; a power cut may take the last commits, whole ones.
        """
        self._db.execute("PRAGMA synchronous = NORMAL")
        try:
            yield
        finally:
            with plain_errors(self.folder):
                self._db.execute("PRAGMA synchronous = FULL")
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
                # it flushes nothing where somebody still reads what was before
                with (self.folder / f"{DATABASE}-wal").open("rb") as log:
                    os.fsync(log.fileno())

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
        with plain_errors(self.folder):
            return self._db.execute(sql, tuple(parameters)).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with plain_errors(self.folder):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("INSERT INTO revisions DEFAULT VALUES")
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _setting(self, key: str, *, or_none: bool = False) -> Any:
        if self._held_settings is None:
            return self._read_setting(key, or_none=or_none)
        if key not in self._held_settings:  # every search asks for some again and again
            self._held_settings[key] = self._read_setting(key, or_none=or_none)
        return self._held_settings[key]

    def _read_setting(self, key: str, *, or_none: bool) -> Any:
        with plain_errors(self.folder):
            rows = self._rows("SELECT value FROM settings WHERE key = ?", [key])
            if not rows and not or_none:
                raise damaged(self.folder, f"it has no setting {key!r}")
            return json.loads(rows[0][0]) if rows else None

    def _put_setting(self, key: str, value: Any) -> None:
        self._db.execute("REPLACE INTO settings VALUES (?, ?)", [key, json.dumps(value)])


def refuse_existing(folder: Path) -> None:
    """Raise FileExistsError if there is anything under this name."""
    if os.path.lexists(folder):
        raise FileExistsError(
            f"{str(folder)!r} exists already: choose another name, or open it if it is a collection"
        )


def make_unfinished(folder: Path) -> Path:
    """Make the folder in which this process works at one before it gets its name.

    FileExistsError if there is one: on a shared disk it may be of another machine.
    """
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir()
    except FileExistsError as error:
        raise FileExistsError(
            f"{str(unfinished)!r} is there: another process is making {folder.name!r}, or was "
            "killed; then remove it"
        ) from error
    return unfinished


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what is left of makings of a folder that is there now; returns the names."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.\d+\.unfinished")
    # nobody is at work there: under a name that is taken nothing is made
    beside = folder.parent.glob(".*.unfinished")
    left = [path for path in beside if pattern.fullmatch(path.name)]
    for path in left:
        shutil.rmtree(path)
    return [path.name for path in left]


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder under another name, which gets its own when it is complete."""
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with plain_errors(folder):
        unfinished = make_unfinished(folder)
    try:
        with plain_errors(folder):
            yield unfinished
            unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


class _Settings(dict[str, Any]):
    """Settings of which every one that is asked for must be there."""

    def __init__(self, folder: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._folder = folder

    def __missing__(self, key: str) -> Any:
        raise damaged(self._folder, f"it has no setting {key!r}")


def _connect(path: Path) -> sqlite3.Connection:
    """Open for writing where that is allowed, else for reading."""
    mode = "rw"
    if not _is_writable(path):
        # Without a log beside it nobody is writing; SQLite would want to make one to read.
        logged = path.with_name(path.name + "-wal").exists()
        mode = "ro" if logged else "ro&immutable=1"
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
    )
    connection.execute("PRAGMA foreign_keys = ON")
    # at SQLite's 2 MB not even the inner pages of a million segments stay in memory
    connection.execute("PRAGMA cache_size = -65536")  # KB, at most
    return connection


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


@contextmanager
def plain_errors(folder: Path) -> Iterator[None]:
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
        raise damaged(folder, str(error)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _full(folder, error) from error
        raise
    except json.JSONDecodeError as error:
        raise damaged(folder, f"a value is not JSON: {error}") from error


def damaged(folder: Path, what: str) -> ValueError:
    """The error that says what is wrong inside a collection, and the way out."""
    return ValueError(
        f"collection {folder.name!r} is damaged ({what}): restore {str(folder / DATABASE)!r} "
        "from a copy, or add the videos to a new collection"
    )


def _full(folder: Path, error: Exception) -> OSError:
    return OSError(
        f"the disk of collection {folder.name!r} fails or is full: {error} ({folder}); "
        "what was committed is kept"
    )
