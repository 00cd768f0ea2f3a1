"""The truth of a collection: videos, segments, vectors and metadata in one SQLite file.

Vectors live in a table of their embedding *space* (one model at one budget). One space serves; a
second one may be *staged* beside it, until `switch_space` lets that one serve.

Write-ahead logging: a search reads while a long `add` commits, neither waits for the other, and a
commit costs one flush, or none where many follow each other. While it is open the file has `-wal`
and `-shm` beside it, which belong to it; they need shared memory, so all processes that open one
collection run on one machine.
Shape legend: N vectors, D width.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np

from .conditions import (
    MetadataValue,
    Where,
    decode_metadata,
    encode_metadata,
    key_sql,
    where_sql,
)
from .database import Database, damaged, plain_errors
from .schema import vector_tables

_ROWS_AT_ONCE = 4096
_SEGMENT = (
    "SELECT segments.id, video_id, path, start_s, end_s FROM segments "
    "JOIN videos ON videos.id = video_id"
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


@dataclass(frozen=True)
class VideoRow:
    """A video to store: its segments [start_s, end_s), their vectors (N, D), its metadata.

    ids: of the segments, ascending and above `last_segment_id`; new ones unless given.
    """

    path: str
    state: FileState
    duration_s: float
    segments: Sequence[tuple[float, float]]
    vectors_ND: np.ndarray
    metadata: Mapping[str, MetadataValue] | None = None
    ids: Sequence[int] | None = None


class Store(Database):
    """What an open collection holds; belongs to the thread that opened it."""

    # -- reading

    @property
    def space(self) -> int:
        """Number of the embedding space that serves; 1 at first."""
        return int(self._setting("space"))

    @property
    def dim(self) -> int:
        """Width of the vectors of the space that serves."""
        return int(self._setting("dim"))

    def staged(self) -> dict[str, Any] | None:
        """What `stage_space` was given, and its number "space"; None while nothing is staged."""
        staged: dict[str, Any] | None = self._setting("staged", or_none=True)
        return staged

    def counts(self) -> dict[str, int]:
        """Number of videos, segments and texts."""
        tables = ("videos", "segments", "texts")
        return {name: self._rows(f"SELECT count(*) FROM {name}")[0][0] for name in tables}

    def files(self, paths: Sequence[str] | None = None) -> dict[str, FileState]:
        """Path -> its file's state when it was read: of all videos, or of those of `paths`."""
        sql, parameters = "", []
        if paths is not None:
            sql = "WHERE path IN (SELECT value FROM json_each(?))"
            parameters = [json.dumps(list(paths))]
        rows = self._rows(
            f"SELECT path, size, mtime_ns, sha256 FROM videos {sql} ORDER BY path", parameters
        )
        return {path: FileState(*state) for path, *state in rows}

    def segment_ids(self, where: Where | None = None, *, after: int = 0) -> np.ndarray:
        """Ids (N,) of the segments whose video's metadata are like that; int64, ascending.

        where: see `conditions.where_sql`. after: of all, only ids above it.
        """
        if where is None:
            return self._segment_ids("id > ?", [after])
        condition, parameters = where_sql(where)
        if len(where) > 1:  # what the fewest videos have leads to the answer soonest
            ordered = sorted(where.items(), key=lambda item: self._num_videos(*item))
            condition, parameters = where_sql(dict(ordered))
        return self._segment_ids(condition, parameters)

    def num_videos(self, where: Where | None = None) -> int:
        """Number of the videos whose metadata are like that; where: see `conditions.where_sql`."""
        condition, parameters = where_sql(where)
        videos = "(SELECT id AS video_id FROM videos)"
        return int(self._rows(f"SELECT count(*) FROM {videos} WHERE {condition}", parameters)[0][0])

    def last_segment_id(self) -> int:
        """The highest id that any segment ever had; 0 if there never was one."""
        return self._last_id("segments")

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
        with self.snapshot():
            if ids_N is not None:
                sql = "segment_id IN (SELECT value FROM json_each(?))"
                return self._vectors(sql, [json.dumps(ids_N.tolist())], most=len(ids_N))
            # not counted among the vectors themselves: that would read all of them
            [(num,)] = self._rows("SELECT count(*) FROM segments WHERE id > ?", [after])
            return self._vectors("segment_id > ?", [after], most=num)

    def vector_blocks(
        self, *, space: int | None = None, rows: int = 65536
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All vectors of a space, as `vectors` gives them, so many at a time, of one revision.

        space: the one that serves unless given. What writes has to wait for the last block.
        """
        with self.snapshot():
            last = 0
            while True:
                ids_N, vectors_ND = self._vectors("segment_id > ?", [last], most=rows, space=space)
                if not len(ids_N):
                    return
                yield ids_N, vectors_ND
                last = int(ids_N[-1])

    def raw_vectors(self) -> Iterator[tuple[int, str, bytes]]:
        """Segment id, path of its video and the vector's bytes, unchecked, one at a time."""
        with self.snapshot(), plain_errors(self.folder):
            yield from self._db.execute(
                "SELECT segments.id, path, coalesce(vector, x'') FROM segments "
                f"JOIN videos ON videos.id = video_id LEFT JOIN vectors_{self.space} "
                "ON segment_id = segments.id ORDER BY segments.id"
            )

    def segments(self, ids_N: np.ndarray) -> dict[int, SegmentRow]:
        """The segments of these ids that there are, by id."""
        rows = self._rows(
            f"{_SEGMENT} WHERE segments.id IN (SELECT value FROM json_each(?))",
            [json.dumps(ids_N.tolist())],
        )
        return {row[0]: SegmentRow(*row) for row in rows}

    def video(self, video_id: int) -> tuple[str, FileState, float]:
        """A video's path, the state of its file when it was read, and its duration in seconds."""
        sql = "SELECT path, size, mtime_ns, sha256, duration_s FROM videos WHERE id = ?"
        [(path, *state, duration_s)] = self._rows(sql, [video_id])
        return path, FileState(*state), duration_s

    def metadata(self, video_id: int) -> dict[str, MetadataValue]:
        """A video's metadata, sorted by key."""
        return self.metadata_of([video_id]).get(video_id, {})

    def metadata_of(self, video_ids: Sequence[int]) -> dict[int, dict[str, MetadataValue]]:
        """By video, the metadata of those of these videos that have any, sorted by key."""
        rows = self._rows(
            "SELECT video_id, key, kind, value FROM metadata "
            "WHERE video_id IN (SELECT value FROM json_each(?)) ORDER BY key",
            [json.dumps(video_ids)],
        )
        metadata: dict[int, dict[str, MetadataValue]] = {}
        try:
            for video_id, key, kind, value in rows:
                metadata.setdefault(video_id, {})[key] = decode_metadata(kind, value)
        except ValueError as error:
            raise damaged(self.folder, str(error)) from error
        return metadata

    def texts(self) -> tuple[list[tuple[int, str]], np.ndarray]:
        """Every text with its id, ascending, and their vectors (N, D) float32."""
        with self.snapshot():
            return self._texts(after=0, most=-1)  # no limit, to SQLite

    def text_blocks(self, *, rows: int) -> Iterator[tuple[list[tuple[int, str]], np.ndarray]]:
        """What `texts` gives, so many at a time, of one revision."""
        with self.snapshot():
            last = 0
            while True:
                texts, vectors_ND = self._texts(after=last, most=rows)
                if not texts:
                    return
                yield texts, vectors_ND
                last = texts[-1][0]

    def known_texts(self, texts: Sequence[str]) -> set[str]:
        """Those of the texts that are stored."""
        sql = "SELECT 1 FROM texts WHERE text = ?"
        with self.snapshot():
            return {text for text in texts if self._rows(sql, [text])}

    def texts_mark(self) -> tuple[int, int, int]:
        """Space, number of texts and highest id: as long as these stay, so do `texts`.

        In one history of the collection (see `has_revision`), as ids only grow.
        """
        with self.snapshot():
            [(num, last)] = self._rows("SELECT count(*), coalesce(max(id), 0) FROM texts")
            return self.space, num, last

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
        """Store a video with its segments [start_s, end_s) and their vectors; see `put_videos`."""
        self.put_videos([VideoRow(path, state, duration_s, segments, vectors_ND, metadata)])

    def put_videos(self, videos: Sequence[VideoRow]) -> None:
        """Store videos: all of them, or none if one is wrong.

        Replaces the segments of a video that is there under its path; metadata are merged.
        ValueError for given ids that do not ascend, or not from above `last_segment_id`.
        """
        with self._transaction():
            space = self.space
            for video in videos:
                [(video_id,)] = self._rows(
                    "INSERT INTO videos (path, size, mtime_ns, sha256, duration_s, added_at) "
                    "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (path) DO UPDATE SET "
                    "size = excluded.size, mtime_ns = excluded.mtime_ns, "
                    "sha256 = excluded.sha256, duration_s = excluded.duration_s, "
                    "added_at = excluded.added_at RETURNING id",
                    [video.path, *_columns(video.state), video.duration_s, now()],
                )
                self._db.execute("DELETE FROM segments WHERE video_id = ?", [video_id])
                new_ids = self._new_ids("segments", len(video.segments))
                ids = new_ids if video.ids is None else video.ids
                # searches look for what is new above the highest id they know
                if any(id <= before for before, id in pairwise([new_ids.start - 1, *ids])):
                    raise ValueError(
                        f"collection {self.name!r}: the segment ids of {video.path!r} do not "
                        f"ascend from {new_ids.start}"
                    )
                self._db.executemany(
                    "INSERT INTO segments (id, video_id, start_s, end_s) VALUES (?, ?, ?, ?)",
                    [
                        (id, video_id, start_s, end_s)
                        for id, (start_s, end_s) in zip(ids, video.segments, strict=True)
                    ],
                )
                self._put_vectors(f"vectors_{space}", ids, video.vectors_ND)
                self._put_metadata(video_id, video.metadata)

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
        self.move_video(path, path, state, metadata)

    def fill_metadata(self, path: str, metadata: Mapping[str, MetadataValue]) -> None:
        """Give a video the metadata whose keys it lacks, if there are any; what it has stays."""
        [(video_id,)] = self._rows("SELECT id FROM videos WHERE path = ?", [path])
        held = self.metadata(video_id)
        if new := {key: value for key, value in metadata.items() if key not in held}:
            with self._transaction():
                self._put_metadata(video_id, new)

    def move_video(
        self,
        old_path: str,
        new_path: str,
        state: FileState,
        metadata: Mapping[str, MetadataValue] | None = None,
    ) -> None:
        """Note a new path and state of a file with the same content, and merge `metadata`."""
        with self._transaction():
            [(video_id,)] = self._rows(
                "UPDATE videos SET path = ?, size = ?, mtime_ns = ?, sha256 = ? WHERE path = ? "
                "RETURNING id",
                [new_path, *_columns(state), old_path],
            )
            self._put_metadata(video_id, metadata)

    def remove_videos(self, paths: Sequence[str]) -> int:
        """Remove videos with all their segments; returns how many segments these were."""
        with self._transaction():
            return self._remove_videos(paths)

    def remove_segments(self, ids: Sequence[int]) -> int:
        """Remove segments, and a video with its last one; returns how many there were."""
        with self._transaction():
            rows = self._rows(
                "DELETE FROM segments WHERE id IN (SELECT value FROM json_each(?)) "
                "RETURNING video_id",
                [json.dumps([int(id) for id in ids])],
            )
            self._db.execute(
                "DELETE FROM videos WHERE id IN (SELECT value FROM json_each(?)) "
                "AND NOT EXISTS (SELECT 1 FROM segments WHERE video_id = videos.id)",
                [json.dumps(sorted({video_id for (video_id,) in rows}))],
            )
        return len(rows)

    def remove_texts(self, texts: Sequence[str]) -> int:
        """Remove texts; returns how many there were."""
        with self._transaction():
            sql = "DELETE FROM texts WHERE text = ?"
            return self._db.executemany(sql, [(text,) for text in texts]).rowcount

    def put_texts(self, texts: Sequence[str], vectors_ND: np.ndarray) -> None:
        """Store texts that are not there yet, with their vectors."""
        with self._transaction():
            ids = self._new_ids("texts", len(texts))
            self._db.executemany(
                "INSERT INTO texts (id, text) VALUES (?, ?)", zip(ids, texts, strict=True)
            )
            self._put_vectors(f"text_vectors_{self.space}", ids, vectors_ND)

    # -- another space: filled beside the one that serves, then put in its place

    def stage_space(self, settings: Mapping[str, Any]) -> int:
        """Make an empty space beside the one that serves, and return its number.

        settings: those of the collection that will change, such as "fingerprint" and "dim".
        ValueError if one is staged already.
        """
        with self._transaction():
            if self.staged() is not None:
                raise ValueError(f"collection {self.name!r} has another space under way")
            space = self.space + 1
            for statement in vector_tables(space):
                self._db.execute(statement)
            self._put_setting("staged", {**settings, "space": space})
        return space

    def unstaged_segments(self, limit: int, *, after: SegmentRow | None = None) -> list[SegmentRow]:
        """At most so many segments that the staged space has no vector of, by video, then by id.

        after: only those behind this one in that order, which spares looking at those before it.
        """
        return [
            SegmentRow(*row)
            for row in self._rows(
                f"{_SEGMENT} WHERE (video_id, segments.id) > (?, ?) AND NOT EXISTS "
                f"(SELECT 1 FROM vectors_{self._staged_space()} WHERE segment_id = segments.id) "
                "ORDER BY video_id, segments.id LIMIT ?",
                [after.video_id if after else 0, after.id if after else 0, limit],
            )
        ]

    def num_unstaged_videos(self) -> int:
        """Number of videos of which `unstaged_segments` gives any segment."""
        [(num,)] = self._rows(
            "SELECT count(DISTINCT video_id) FROM segments WHERE NOT EXISTS "
            f"(SELECT 1 FROM vectors_{self._staged_space()} WHERE segment_id = segments.id)"
        )
        return int(num)

    def unstaged_texts(self, limit: int) -> list[tuple[int, str]]:
        """Id and text of at most so many texts that the staged space has no vector of."""
        return self._rows(
            "SELECT id, text FROM texts WHERE NOT EXISTS "
            f"(SELECT 1 FROM text_vectors_{self._staged_space()} WHERE text_id = id) "
            "ORDER BY id LIMIT ?",
            [limit],
        )

    def put_staged(self, ids: Sequence[int], vectors_ND: np.ndarray) -> None:
        """Store vectors (N, D) of segments in the staged space."""
        with self._transaction():
            self._put_vectors(f"vectors_{self._staged_space()}", ids, vectors_ND)

    def put_staged_texts(self, ids: Sequence[int], vectors_ND: np.ndarray) -> None:
        """Store vectors (N, D) of texts in the staged space."""
        with self._transaction():
            self._put_vectors(f"text_vectors_{self._staged_space()}", ids, vectors_ND)

    def switch_space(self, *, removing: Sequence[str] = ()) -> None:
        """Let the staged space serve, with its settings; the other one stays, unused.

        removing: paths of videos that are removed in the same step. ValueError if the staged space
        lacks a vector of any other segment or text.
        """
        with self._transaction():
            self._remove_videos(removing)
            if self.unstaged_segments(1) or self.unstaged_texts(1):
                raise ValueError(f"collection {self.name!r}: the other space is not complete")
            for key, value in (self.staged() or {}).items():
                self._put_setting(key, value)
            self._db.execute("DELETE FROM settings WHERE key = 'staged'")

    def drop_staged(self) -> None:
        """Give up the staged space with all that is in it, if there is one."""
        with self._transaction():
            self._db.execute("DELETE FROM settings WHERE key = 'staged'")
            self._drop_old_spaces()

    def old_tables(self) -> list[str]:
        """The tables with vectors of spaces that neither serve nor are staged."""
        with self.snapshot():
            staged = self.staged()
            kept = {self.space, *([staged["space"]] if staged else [])}
            tables = self._rows("SELECT name FROM sqlite_schema WHERE type = 'table'")
        return [
            name
            for (name,) in tables
            if (match := re.fullmatch(r"(?:text_)?vectors_(\d+)", name))
            and int(match[1]) not in kept
        ]

    def drop_old_spaces(self) -> None:
        """Remove the vectors of all spaces that neither serve nor are staged."""
        if self.old_tables():
            with self._transaction():
                self._drop_old_spaces()

    # -- pieces of these

    def _drop_old_spaces(self) -> None:
        for name in self.old_tables():
            self._db.execute(f"DROP TABLE {name}")

    def _staged_space(self) -> int:
        staged = self.staged()
        if staged is None:
            raise ValueError(f"collection {self.name!r} has no other space under way")
        return int(staged["space"])

    def _num_videos(self, key: str, condition: Any) -> int:
        sql, parameters = key_sql(key, condition)
        return int(self._rows(f"SELECT count(*) FROM metadata WHERE {sql}", parameters)[0][0])

    def _segment_ids(self, condition: str, parameters: Sequence[Any]) -> np.ndarray:
        # as one text: a Python object for each id would take longer than finding them
        [(ids,)] = self._rows(
            f"SELECT group_concat(id) FROM segments WHERE {condition}", parameters
        )
        return np.sort(np.fromstring(ids or "", np.int64, sep=","))

    def _dim_of(self, space: int) -> int:
        staged = self.staged()
        return int(staged["dim"]) if staged and staged["space"] == space else self.dim

    def _vectors(
        self, condition: str, parameters: Sequence[Any], *, most: int, space: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first `most` vectors of a space of which the condition is true."""
        dim = self.dim if space is None else self._dim_of(space)
        space = self.space if space is None else space
        ids_N = np.empty(most, np.int64)
        vectors_ND = np.empty((most, dim), np.float32)
        at = 0
        with plain_errors(self.folder):
            cursor = self._db.execute(
                f"SELECT segment_id, vector FROM vectors_{space} WHERE {condition} "
                "ORDER BY segment_id LIMIT ?",
                [*parameters, most],
            )
            while rows := cursor.fetchmany(_ROWS_AT_ONCE):
                if any(len(row[1]) != 4 * dim for row in rows):
                    raise damaged(self.folder, "a vector has the wrong size")
                to = at + len(rows)
                ids_N[at:to] = [row[0] for row in rows]
                data = b"".join([row[1] for row in rows])
                vectors_ND[at:to] = np.frombuffer(data, "<f4").reshape(-1, dim)
                at = to
        return ids_N[:at], vectors_ND[:at]

    def _texts(self, *, after: int, most: int) -> tuple[list[tuple[int, str]], np.ndarray]:
        """The first `most` texts with an id above one, for the present snapshot."""
        dim = self.dim
        rows = self._rows(
            "SELECT id, text, coalesce(vector, x'') FROM texts "
            f"LEFT JOIN text_vectors_{self.space} ON text_id = id "
            "WHERE id > ? ORDER BY id LIMIT ?",
            [after, most],
        )
        if any(len(row[2]) != 4 * dim for row in rows):
            raise damaged(self.folder, "a text's vector has the wrong size")
        data = b"".join([row[2] for row in rows])
        return [row[:2] for row in rows], np.frombuffer(data, "<f4").reshape(-1, dim)

    def _new_ids(self, table: str, num: int) -> range:
        """Ids that no row of the table ever had, for the present transaction."""
        last = self._last_id(table)
        return range(last + 1, last + 1 + num)

    def _last_id(self, table: str) -> int:
        rows = self._rows("SELECT seq FROM sqlite_sequence WHERE name = ?", [table])
        return int(rows[0][0]) if rows else 0

    def _put_vectors(self, table: str, ids: Sequence[int], vectors_ND: np.ndarray) -> None:
        self._db.executemany(
            f"REPLACE INTO {table} VALUES (?, ?)",
            [
                (int(id), vector_D.astype("<f4").tobytes())
                for id, vector_D in zip(ids, vectors_ND, strict=True)
            ],
        )

    def _put_metadata(self, video_id: int, metadata: Mapping[str, MetadataValue] | None) -> None:
        self._db.executemany(
            "REPLACE INTO metadata VALUES (?, ?, ?, ?)",
            [(video_id, key, *encoded) for key, encoded in encode_metadata(metadata).items()],
        )

    def _remove_videos(self, paths: Sequence[str]) -> int:
        rows = self._rows(
            "SELECT videos.id, count(segments.id) FROM videos "
            "LEFT JOIN segments ON video_id = videos.id "
            "WHERE path IN (SELECT value FROM json_each(?)) GROUP BY videos.id",
            [json.dumps(list(paths))],
        )
        self._db.executemany("DELETE FROM videos WHERE id = ?", [(id,) for id, _ in rows])
        return sum(num for _, num in rows)


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _columns(state: FileState) -> tuple[int, int, str]:
    return state.size, state.mtime_ns, state.sha256
