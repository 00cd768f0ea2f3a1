"""The tables of `collection.sqlite`, in numbered migrations."""

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .conditions import encode_metadata

_APPLICATION_ID = 0x464C5558  # "FLUX": tells a collection from any other SQLite file
# Of new files. At SQLite's 4096, a vector of 512 numbers has a page for itself and wastes half.
_PAGE_BYTES = 16384


def vector_tables(space: int) -> tuple[str, str]:
    """SQL that makes the tables of an embedding space: the vectors of segments and of texts."""
    return (
        f"""CREATE TABLE vectors_{space} (
            segment_id INTEGER PRIMARY KEY REFERENCES segments (id) ON DELETE CASCADE,
            vector BLOB NOT NULL
        )""",
        f"""CREATE TABLE text_vectors_{space} (
            text_id INTEGER PRIMARY KEY REFERENCES texts (id) ON DELETE CASCADE,
            vector BLOB NOT NULL
        )""",
    )


# Migration number n leads from PRAGMA user_version n to n + 1. Never edit one that was released.
# AUTOINCREMENT: an id that was removed is never given out again.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
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
    (
        # vectors leave for tables of their space, so that a second space may grow beside the first
        *vector_tables(1),
        "INSERT INTO vectors_1 SELECT id, vector FROM segments",
        "INSERT INTO text_vectors_1 SELECT id, vector FROM texts",
        "ALTER TABLE segments DROP COLUMN vector",
        "ALTER TABLE texts DROP COLUMN vector",
        "INSERT INTO settings VALUES ('space', '1')",
        # metadata are no longer JSON, whose order is not that of its values
        "ALTER TABLE metadata RENAME TO json_metadata",
        "DROP INDEX metadata_by_value",
        """CREATE TABLE metadata (
            video_id INTEGER NOT NULL REFERENCES videos (id) ON DELETE CASCADE,
            key TEXT NOT NULL,
            kind TEXT NOT NULL,
            value NOT NULL,
            PRIMARY KEY (video_id, key)
        ) WITHOUT ROWID""",
        "INSERT INTO metadata SELECT video_id, key, kind_of_json(value), value_of_json(value) "
        "FROM json_metadata",
        "DROP TABLE json_metadata",
        "CREATE INDEX metadata_by_value ON metadata (key, kind, value, video_id)",
    ),
)


def fill_new(path: Path, settings: Mapping[str, Any]) -> None:
    """Make the file of an empty collection."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN")
        migrate(connection)
        connection.executemany(
            "INSERT INTO settings VALUES (?, ?)",
            [(key, json.dumps(value)) for key, value in settings.items()],
        )
        connection.execute("COMMIT")
    finally:
        connection.close()


def is_newest(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether a file has the newest format; ValueError for one of the future, or of others."""
    [(application_id,)] = connection.execute("PRAGMA application_id").fetchall()
    [(version,)] = connection.execute("PRAGMA user_version").fetchall()
    if application_id != _APPLICATION_ID:
        raise ValueError(f"{str(path)!r} is not the file of a collection")
    if version > len(MIGRATIONS):
        raise ValueError(
            f"collection {path.parent.name!r} has format {version}, this program reads up to "
            f"{len(MIGRATIONS)}: install a newer fluxclip"
        )
    return bool(version == len(MIGRATIONS))


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a database to the newest format, inside the caller's transaction."""
    # read here: since the caller looked, another process may have done it
    [(version,)] = connection.execute("PRAGMA user_version").fetchall()
    for name, part in (("kind_of_json", 0), ("value_of_json", 1)):
        connection.create_function(name, 1, lambda text, part=part: _of_json(text)[part])
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _of_json(text: str) -> tuple[str, str | int | float]:
    """Kind and value of metadata as formats 1 to 3 held it; what can no longer be is near to it."""
    value = json.loads(text)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = float(value)
    if isinstance(value, str):
        value = value.encode(errors="replace").decode()
    return encode_metadata({"json": value})["json"]
