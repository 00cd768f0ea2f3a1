"""Vectors go and come: shards that the jobs of an array write, what collections export and import.

Shape legend: N segments or texts, D width.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fluxclip.video import Cutting

from .conditions import MetadataValue, encode_metadata
from .database import make_unfinished, refuse_existing, remove_unfinished
from .ingest import (
    Embedder,
    Source,
    embed_sources,
    find_sources,
    full_path,
    settings_of_model,
    stated_file,
)
from .shard_file import (
    FORMAT,
    ROWS_PER_GROUP,
    SUFFIX,
    DamagedError,
    ShardFile,
    ShardWriter,
    marker_of,
    read_marker,
    write_marker,
)
from .store import Store, VideoRow

TEXTS = f"_texts{SUFFIX}"  # with the texts of a collection; not among what a reader finds
ROWS_PER_FILE = 1_000_000

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ShardReport:
    """What `embed_shard` wrote, or found written.

    was_done: all of it was there already. failed: path -> reason. named_failed: those of `failed`
    that were given by themselves, not found in a folder or by a pattern.
    """

    file: str
    videos: int
    segments: int
    was_done: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    named_failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImportReport:
    """What became of the files given to `Collection.import_shards`.

    added: videos that are new or had changed. skipped: videos that were there already. texts: new
    ones. failed: file -> reason; what stands before the damage in one is imported. missing: files
    of the same job array that are not beside those that were given.
    """

    added: int
    skipped: int
    texts: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """What `Collection.export_shards` wrote."""

    files: int
    videos: int
    segments: int
    texts: int


def shard_of(path: str, num_shards: int) -> int:
    """Number of the shard that a video is of: always the same for one path."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % num_shards


def embed_shard(
    paths: str | Path | Sequence[str | Path],
    folder: str | Path,
    *,
    shard: tuple[int, int],
    model: str | Path | Embedder,
    token_budget: int | None = None,
    cut: Literal["windows", "shots"] = "windows",
    window_s: float = 10.0,
    stride_s: float | None = None,
    metadata: Mapping[str, MetadataValue] | None = None,
    progress: Progress | None = None,
) -> ShardReport:
    """Cut and embed the videos of shard i of N, into one file of `folder` with a marker.

    The videos of `paths` are found as `Collection.add` finds them; those of the shard are told by
    `shard_of`. Where the marker is there and covers the same files (path, size, time), model and
    settings, nothing is done; else the shard is made anew, in one step. Files that cannot be read
    are left out and noted in the marker: without it they are tried again.

    shard: (i, N), i from 0 to N - 1. model: what `fluxclip.load_model` takes or returns.
    token_budget, cut, window_s, stride_s: as of `Collection.create`. metadata: of every video.
    progress: called with (videos done, videos in all, path). Raises ValueError for bad settings and
    if `paths` hold no video at all, OSError if the file cannot be written, or if one of `paths` is
    not there or a folder cannot be looked into: then all shards do, and stay as they are.
    """
    number, num_shards = shard
    if not 0 <= number < num_shards:
        raise ValueError(
            f"there is no shard {number}/{num_shards}: of N shards the first is 0/N, the last N-1/N"
        )
    encode_metadata(metadata)  # refuses a bad value before any work
    cutting = Cutting(cut, float(window_s), None if stride_s is None else float(stride_s))
    cutting.check_installed()
    if isinstance(model, str | Path):
        from fluxclip import load_model  # imports torch

        model = load_model(model)
    embedder: Embedder = model
    embedder.grid(token_budget)  # the model refuses a budget it cannot serve
    given = [paths] if isinstance(paths, str | Path) else paths
    found = find_sources(given, recursive=True)
    _refuse_unseen(found)
    sources = [source for source in found if shard_of(source.path, num_shards) == number]
    about = {**settings_of_model(embedder, token_budget), **asdict(cutting)}
    file = Path(folder) / _name(number, num_shards)
    covers = _digest([FORMAT, about, dict(metadata or {}), *map(_stated, sources)])
    done = read_marker(file)
    if done is not None and done.get("covers") == covers:
        return ShardReport(
            str(file), done["videos"], done["segments"], True, done["failed"],
            tuple(done["named_failed"]),
        )  # fmt: skip
    report = ShardReport(str(file), 0, 0)
    named_failed: list[str] = []
    file.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(file, about) as writer:
        finished = embed_sources(
            sources, known={}, model=lambda: embedder, token_budget=token_budget, cutting=cutting
        )
        with closing(finished):
            for num, source in enumerate(finished, 1):
                if source.error is not None:
                    report.failed[source.path] = source.error
                    named_failed += [source.path] if source.is_named else []
                else:
                    writer.add(_row(source, metadata))
                source.segments, source.vectors = [], []  # `sources` keeps it, not its vectors
                if progress is not None:
                    progress(num, len(sources), source.path)
    report = replace(
        report, videos=writer.videos, segments=writer.rows, named_failed=tuple(named_failed)
    )
    made = {key: value for key, value in asdict(report).items() if key not in ("file", "was_done")}
    write_marker(file, {**made, "fingerprint": embedder.fingerprint, "covers": covers})
    return report


def export_shards(
    store: Store,
    folder: str | Path,
    *,
    rows_per_file: int = ROWS_PER_FILE,
    progress: Progress | None = None,
) -> ExportReport:
    """Write all that a collection holds into a new folder, in one step; see `Collection`."""
    if rows_per_file < 1:
        raise ValueError(f"rows_per_file must be 1 or more, got {rows_per_file}")
    folder = Path(full_path(folder))
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = make_unfinished(folder)
    try:
        with store.snapshot():
            report = _export(store, unfinished, rows_per_file, progress)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    with suppress(OSError):  # the export itself is done
        remove_unfinished(folder)
    return report


def import_shards(
    store: Store, paths: Sequence[str | Path], *, progress: Progress | None = None
) -> ImportReport:
    """Store what files hold, for the only writer; see `Collection.import_shards`."""
    settings = store.settings()
    shards, failed, missing = _open_all(paths)
    ids_of = settings.get("ids_of")
    for shard in shards:
        if _how(shard.about) != _how(settings):
            raise ValueError(
                f"{shard.path} was made {_said(shard.about)}; collection {store.name!r} "
                f"{_said(settings)}: import it into a collection of its own (--create)"
            )
        if not store.last_segment_id():
            ids_of = ids_of or shard.about.get("collection_id")
    if ids_of != settings.get("ids_of"):
        store.set_settings({"ids_of": ids_of})  # before the first of them is stored
    num_rows, num_done = sum(shard.num_rows for shard in shards), 0
    added = skipped = texts = 0
    for shard in shards:
        try:
            if shard.is_of_texts:
                texts += _put_texts(store, shard)
            else:
                keeps_ids = ids_of is not None and shard.about.get("collection_id") == ids_of
                for videos in shard.videos():
                    num_new = _put(store, videos, keeps_ids=keeps_ids)
                    added += num_new
                    skipped += len(videos) - num_new
                    if progress is not None:
                        done = num_done + shard.num_rows_read
                        progress(done, num_rows, str(shard.path))
        except DamagedError as error:
            failed[str(shard.path)] = str(error)
        num_done += shard.num_rows
    return ImportReport(added, skipped, texts, failed, missing)


def settings_of(paths: Sequence[str | Path]) -> dict[str, Any]:
    """How the vectors of files were made: for a collection like it.

    ValueError if none of them can be read, or they were not all made in one way.
    """
    shards, failed, _ = _open_all(paths)
    if not shards:
        raise ValueError("; ".join(f"{path}: {reason}" for path, reason in failed.items()))
    first, *others = shards
    for shard in others:
        if _how(shard.about) != _how(first.about):
            raise ValueError(
                f"{shard.path} was made {_said(shard.about)}; {first.path} {_said(first.about)}: "
                "import them into collections of their own"
            )
    return first.about


def _export(
    store: Store, folder: Path, rows_per_file: int, progress: Progress | None
) -> ExportReport:
    settings = store.settings()
    about = {key: settings[key] for key in ("model_source", "model_name", "collection_id")}
    about |= {key: settings[key] for key in ("fingerprint", "dim", "token_budget")}
    about |= asdict(Cutting.of(settings))
    num_all = store.counts()["segments"]
    videos = _stored_videos(store)
    video = next(videos, None)
    counts: list[tuple[int, int]] = []
    while video is not None or not counts:  # an empty collection gives a file without rows
        with ShardWriter(folder / str(len(counts)), about) as writer:
            while video is not None and writer.rows < rows_per_file:
                writer.add(video)
                if progress is not None:
                    done = sum(rows for _, rows in counts) + writer.rows
                    progress(done, num_all, video.path)
                video = next(videos, None)
        counts.append((writer.videos, writer.rows))
    for number, (num_videos, num_rows) in enumerate(counts):
        file = folder / _name(number, len(counts))
        (folder / str(number)).rename(file)
        write_marker(file, {"videos": num_videos, "segments": num_rows})
    num_texts = store.counts()["texts"]
    if num_texts:
        with ShardWriter(folder / TEXTS, about, content="texts") as writer:
            for texts, vectors_ND in store.text_blocks(rows=ROWS_PER_GROUP):
                writer.add_texts(texts, vectors_ND)
        write_marker(folder / TEXTS, {"texts": num_texts})
    return ExportReport(
        len(counts), sum(num for num, _ in counts), sum(num for _, num in counts), num_texts
    )


def _stored_videos(store: Store) -> Iterator[VideoRow]:
    """Every video with its segments, in the order of their ids."""
    ids: list[int] = []
    vectors: list[np.ndarray] = []
    segments: list[tuple[float, float]] = []
    video_id = None

    def whole() -> VideoRow:
        assert video_id is not None
        path, state, duration_s = store.video(video_id)
        return VideoRow(
            path, state, duration_s, segments, np.array(vectors), store.metadata(video_id), ids
        )

    for ids_N, vectors_ND in store.vector_blocks(rows=ROWS_PER_GROUP):
        rows = store.segments(ids_N)
        for id, vector_D in zip(ids_N.tolist(), vectors_ND, strict=True):
            row = rows[id]
            # a video's segments are stored together, so their ids follow each other
            if ids and row.video_id != video_id:
                yield whole()
                ids, vectors, segments = [], [], []
            video_id = row.video_id
            ids.append(id)
            vectors.append(vector_D)
            segments.append((row.start_s, row.end_s))
    if ids:
        yield whole()


def _put(store: Store, videos: Sequence[VideoRow], *, keeps_ids: bool) -> int:
    """Store those that are new or have changed, in one transaction; returns how many these are."""
    known = store.files([video.path for video in videos])
    new: list[VideoRow] = []
    last_id = store.last_segment_id()
    for video in videos:
        held = known.get(video.path)
        if held is not None and held.sha256 == video.state.sha256:
            if video.metadata:
                store.fill_metadata(video.path, video.metadata)
            continue
        if held is not None and held.mtime_ns > video.state.mtime_ns:
            continue  # the file is older than what was added since
        ids = video.ids
        # an id that was given out once must not come again
        if not keeps_ids or ids is None or min(ids) <= last_id:
            ids = range(last_id + 1, last_id + 1 + len(video.segments))
        new.append(replace(video, ids=ids))
        last_id = max(ids)
    if new:
        store.put_videos(new)
    return len(new)


def _put_texts(store: Store, shard: ShardFile) -> int:
    """Store the texts that are new; returns how many these are."""
    num_new = 0
    for texts, vectors_ND in shard.texts():
        held = store.known_texts(texts)
        new = {text: at for at, text in enumerate(texts) if text not in held}
        if new:
            store.put_texts(list(new), vectors_ND[list(new.values())])
            num_new += len(new)
    return num_new


def _open_all(
    paths: Sequence[str | Path],
) -> tuple[list[ShardFile], dict[str, str], tuple[str, ...]]:
    """Files, and finished files of folders, opened; those that cannot be, with reasons; missing."""
    wanted: dict[Path, bool] = {}  # whether it needs a marker
    for given in paths:
        path = Path(full_path(given))
        if path.is_dir():
            inside = sorted(path.glob(f"[!.]*{SUFFIX}"))
            if not inside:
                raise ValueError(f"there is no file that ends in {SUFFIX} in {path}")
            wanted = {**dict.fromkeys(inside, True), **wanted}
        else:
            wanted[path] = False
    if not wanted:
        raise ValueError("no file to import: name Parquet files, or folders of them")
    shards, failed = [], {}
    for path, needs_marker in wanted.items():
        try:
            if needs_marker and read_marker(path) is None:
                raise DamagedError(
                    f"its marker {marker_of(path).name} is not there, or of another file: let "
                    "fluxclip embed finish it, or name the file itself"
                )
            shards.append(ShardFile(path))
        except (DamagedError, OSError) as error:
            failed[str(path)] = (isinstance(error, OSError) and error.strerror) or str(error)
    return shards, failed, _missing(wanted)


def _missing(paths: Mapping[Path, bool]) -> tuple[str, ...]:
    """Those of the same arrays that are not beside the ones found in folders.

    ValueError for a folder with arrays of two sizes: both hold the same videos, one is outdated.
    """
    arrays: dict[tuple[Path, int], int] = {}  # how many there are of each
    for path, is_of_folder in paths.items():
        match = re.fullmatch(r"shard-\d{5,}-of-(\d{5,})\.parquet", path.name)
        if is_of_folder and match:
            array = (path.parent, int(match[1]))
            arrays[array] = arrays.get(array, 0) + 1
    for folder in {folder for folder, _ in arrays}:
        sizes = sorted(size for where, size in arrays if where == folder)
        if len(sizes) > 1:
            raise ValueError(
                f"{folder} holds shards of arrays of {' and of '.join(map(str, sizes))}: remove "
                "those that are outdated, or name the files to import"
            )
    wanted = (
        folder / _name(number, num_shards)
        for (folder, num_shards), num in arrays.items()
        if num < num_shards
        for number in range(num_shards)
    )
    return tuple(str(path) for path in wanted if not path.exists())


def _refuse_unseen(sources: Sequence[Source]) -> None:
    """Raise OSError for what was named and is not there, or could not be looked into.

    A shard made without it would hold less than it seems to.
    """
    for source in sources:
        reason = source.error
        if source.is_named and reason is None:
            try:
                os.lstat(source.path)
            except OSError as error:
                reason = error.strerror
        if reason is not None:
            raise OSError(f"{source.path}: {reason}; no shard is made without it")


def _row(source: Source, metadata: Mapping[str, MetadataValue] | None) -> VideoRow:
    vectors_ND = np.stack(source.vectors)
    return VideoRow(
        source.path, source.state, source.duration_s, source.segments, vectors_ND, metadata
    )


def _how(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """What vectors must share to stand in one collection."""
    cutting = Cutting.of(settings)
    cut = (cutting.cut, cutting.window_s, cutting.stride_s or cutting.window_s)
    return (*(settings[key] for key in ("fingerprint", "dim", "token_budget")), *cut)


def _said(settings: Mapping[str, Any]) -> str:
    cutting, budget = Cutting.of(settings), settings["token_budget"]
    return (
        f"by {settings['model_name']}@{settings['fingerprint'][:6]} ({settings['dim']} numbers, "
        f"{'all' if budget is None else budget} tokens), cut by {cutting.cut} of "
        f"{cutting.window_s:g} s every {cutting.stride_s or cutting.window_s:g} s"
    )


def _name(number: int, num_shards: int) -> str:
    return f"shard-{number:05d}-of-{num_shards:05d}{SUFFIX}"


def _stated(source: Source) -> tuple[str, int, int]:
    """Path, size and time of a source's file; what cannot be looked at has none."""
    try:
        status = os.stat(stated_file(source.path))
    except OSError:
        return source.path, -1, -1
    return source.path, status.st_size, status.st_mtime_ns


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
