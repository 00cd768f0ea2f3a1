"""Files -> segments with vectors: finding, deciding, decoding ahead, embedding in batches.

Shape legend: N segments, D width.
"""

import glob
import hashlib
import logging
import os
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from fluxclip.video import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Clip,
    Cutting,
    Fit,
    probe_and_read,
    read_clip,
)
from fluxclip.video.chunks import SUFFIX, TABLE, is_folder_of_chunks

from .store import FileState

CLIPS_PER_BATCH = 16  # embedded together, whatever videos they are of
# Decoded while a batch is embedded and while its videos are committed, which waits for the disk.
CLIPS_AHEAD = 2 * CLIPS_PER_BATCH
# Threads that embed wait for each other at every step, also for one that a decoder has displaced.
NICENESS_OF_DECODERS = 5
UNIT_TOLERANCE = 1e-3  # how far from 1 a vector's length may be; half precision is within it

Segment = tuple[float, float]  # start_s, end_s

_SUFFIXES = frozenset(VIDEO_SUFFIXES) | frozenset(IMAGE_SUFFIXES)

_log = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")


class Embedder(Protocol):
    """What a collection needs of a model; `fluxclip.load_model` returns such objects.

    A member `fit` ("crop" or "squash") says how pictures become square; "crop" without it.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def dim(self) -> int: ...

    def grid(self, token_budget: int | None) -> tuple[int, int]: ...

    def embed_video(
        self, videos: Sequence[Any], *, token_budget: int | None = None
    ) -> np.ndarray: ...

    def embed_text(self, texts: Sequence[str]) -> np.ndarray: ...


def settings_of_model(model: Embedder, token_budget: int | None) -> dict[str, Any]:
    """What is kept, in collections and in files of vectors, of the model that made them."""
    return {
        "model_source": str(getattr(model, "source", model.name)),
        "model_name": model.name,
        "fingerprint": model.fingerprint,
        "dim": model.dim,
        "token_budget": token_budget,
    }


@dataclass(frozen=True)
class Reader:
    """How a model wants to see a file: so many frames, of this side, made square like that."""

    num_frames: int
    side: int
    fit: Fit

    @classmethod
    def of(cls, model: Embedder, token_budget: int | None) -> "Reader":
        return cls(*model.grid(token_budget), getattr(model, "fit", "crop"))

    def read(self, path: str | Path, segment: Segment | None = None) -> Clip:
        """The frames of [start_s, end_s) of a video, or of all of it; VideoError if it has none."""
        start_s, end_s = segment or (0.0, None)
        return read_clip(
            path,
            num_frames=self.num_frames,
            start_s=start_s,
            end_s=end_s or None,  # an image is [0, 0)
            side=self.side,
            fit=self.fit,
        )


@dataclass
class Source:
    """A file on its way into a collection.

    Done with an error, or with as many vectors as segments; without segments its content is the
    one that is stored already. Segments that are given before are embedded as they are, and that
    the content is not the one that is stored is an error then.
    """

    path: str  # absolute; symbolic links are kept, the name is the one the user knows
    is_named: bool = False  # given by itself, not found in a folder or by a pattern
    state: FileState = FileState(0, 0, "")
    is_new: bool = False  # its content is not the one that is stored
    moved_from: str | None = None  # a stored path with this content, where nothing is any more
    reader: Reader | None = None  # of those that are new
    duration_s: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    error: str | None = None
    is_models_fault: bool = False  # the error: no usable vector came of what was read

    @property
    def is_done(self) -> bool:
        return self.error is not None or len(self.vectors) == len(self.segments)


def full_path(path: str | Path) -> str:
    """Absolute, links kept; ValueError for an empty path, which would mean the working folder."""
    if not str(path):
        raise ValueError("the path is empty: name a file or folder, '.' for the one you are in")
    return os.path.abspath(path)


def stated_file(path: str) -> str:
    """The file whose size, time and content stand for a video: chunks have a table."""
    return os.path.join(path, TABLE) if is_folder_of_chunks(Path(path)) else path


def find_sources(paths: Sequence[str | Path], *, recursive: bool) -> list[Source]:
    """Files, folders and patterns (`*?[`) -> sources in a fixed order, each file once.

    In folders and patterns only videos and images count, told by their suffix, and nothing that
    starts with a dot. A folder of chunks is a video. What is not there, or is a folder without
    videos, becomes a source with an error. ValueError if nothing is found at all, or a path is
    empty.
    """
    found: dict[str, Source] = {}
    without: list[str] = []
    for given in map(str, paths):
        path = full_path(given)
        if os.path.isdir(path) and not is_folder_of_chunks(Path(path)):
            inside = _in_folder(path, recursive)
        elif os.path.lexists(path) or not glob.has_magic(given):
            found.setdefault(path, Source(path)).is_named = True
            continue
        else:
            inside = _matching(given, recursive)
        if not inside:
            without.append(path)
        for source in inside:
            source.is_named = source.path == path  # a named folder that cannot be read
            found.setdefault(source.path, source)
    looked_for = f"looked for names that end in {', '.join(sorted(_SUFFIXES))}"
    if not found:
        raise ValueError(f"no video or image in {', '.join(without) or 'nothing'}; {looked_for}")
    for path in without:
        found[path] = Source(path, is_named=True, error=f"no video or image in it; {looked_for}")
    return list(found.values())


def gone_below(
    paths: Sequence[str | Path],
    sources: Iterable[Source],
    known: Iterable[str],
    *,
    recursive: bool,
) -> list[str]:
    """Those of the known paths below the folders among `paths` under which there is nothing now.

    sources: what was found. A folder in which nothing was found tells nothing: a disk that is not
    mounted looks like that. Nor does one further below that is gone or empty, or cannot be looked
    into.
    """
    found = {source.path for source in sources}
    folders = {
        os.path.join(path, "")
        for path in map(full_path, paths)
        if os.path.isdir(path) and any(below.startswith(os.path.join(path, "")) for below in found)
    }
    return [
        path
        for path in known
        if path not in found
        and any(
            path.startswith(folder)
            and (recursive or os.path.join(os.path.dirname(path), "") == folder)
            for folder in folders
        )
        and _is_gone(path)
        and is_there_or_gone_alone(path)
    ]


def is_there_or_gone_alone(path: str) -> bool:
    """Whether there is a file, or else a folder that it is gone from and that still holds others.

    Of a link, where it leads to. A folder that is gone or empty may be one of a disk that is not
    mounted.
    """
    path = os.path.realpath(path)
    try:
        os.stat(path)
    except FileNotFoundError:
        try:
            with os.scandir(os.path.dirname(path)) as entries:
                return any(entries)
        except OSError:
            return False
    except OSError:
        return False
    return True


def embed_sources(
    sources: Iterable[Source],
    *,
    known: Mapping[str, FileState],
    model: Callable[[], Embedder],
    token_budget: int | None,
    cutting: Cutting,
) -> Generator[Source, None, None]:
    """Yield each source in turn when it is done (see `Source`).

    known: the state of files that are stored; with the same size and time they are not read. A
    source of another name but the same content as one of them that is gone is that one, moved.
    model: called when the first clip is to be read, so that nothing new needs no model.
    cutting: how longer videos are cut; an image is one segment [0, 0).
    """
    waiting: deque[Source] = deque()
    workers = min(8, max(2, os.cpu_count() or 1))
    gone = _Gone(known)
    sizes = {state.size for state in known.values()}

    def inspect(source: Source) -> Source:
        if source.error is None:
            with _errors_noted(source):
                _inspect(source, known.get(source.path), sizes)
        return source

    def inspected() -> Iterator[Source]:
        for source in _ahead(lambda source: pool.submit(inspect, source), sources, 2 * workers):
            if source.is_new and source.path not in known:
                source.moved_from = gone.take(source.state.sha256)
                source.is_new = source.moved_from is None
            if source.is_new or source.segments:
                source.reader = Reader.of(model(), token_budget)
            yield source

    def cut(source: Source) -> tuple[Source, Clip | None]:
        if source.reader is not None and not source.segments:
            with _errors_noted(source):
                clip = _cut(source, source.reader, cutting)
                if not source.state.sha256:
                    source.state = _with_content(source.state, source.path)
                return source, clip
        return source, None

    def jobs() -> Iterator[tuple[Source, Segment | None, Clip | None]]:
        sources_cut = _ahead(lambda source: pool.submit(cut, source), inspected(), CLIPS_AHEAD)
        for source, clip in sources_cut:
            waiting.append(source)
            # one without segments goes through too, so that it comes out when it is its turn
            for segment in tuple(source.segments) or (None,):
                yield source, segment, clip

    def read(source: Source, segment: Segment) -> tuple[Source, Clip | None]:
        if source.reader is not None and source.error is None:
            with _errors_noted(source):
                return source, source.reader.read(source.path, segment)
        return source, None

    def start(
        job: tuple[Source, Segment | None, Clip | None],
    ) -> Future[tuple[Source, Clip | None]]:
        source, segment, clip = job
        if clip is None and segment is not None:
            return pool.submit(read, source, segment)
        # not through the pool, where it would stand in line behind what is cut further ahead
        ready: Future[tuple[Source, Clip | None]] = Future()
        ready.set_result((source, clip))
        return ready

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode", initializer=_step_back)
    try:
        batch: list[tuple[Source, Clip]] = []
        for source, clip in _ahead(start, jobs(), CLIPS_PER_BATCH):
            if clip is not None:
                batch.append((source, clip))
            if len(batch) == CLIPS_PER_BATCH:
                _embed(batch, model(), token_budget)
                batch = []
            while waiting and waiting[0].is_done:
                yield waiting.popleft()
        if batch:
            _embed(batch, model(), token_budget)
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)


def vector_problem(vector_D: np.ndarray) -> str | None:
    """What is wrong with a vector that should be finite and of length 1; None if nothing."""
    if not np.isfinite(vector_D).all():
        return "not finite"
    length = float(np.linalg.norm(vector_D))
    if abs(length - 1) > UNIT_TOLERANCE:
        return f"of length {length:.4g} instead of 1"
    return None


def _is_wanted(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES


def _in_folder(folder: str, recursive: bool) -> list[Source]:
    sources: list[Source] = []

    def note(error: OSError) -> None:
        sources.append(Source(str(error.filename), error=error.strerror))

    visited: set[str] = set()  # links may lead back to where they are
    for parent, folders, names in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        shown = sorted(name for name in folders if not name.startswith("."))
        of_chunks = [name for name in shown if name.endswith(SUFFIX)]
        folders[:] = [name for name in shown if recursive and name not in of_chunks]
        files = sorted([*filter(_is_wanted, names), *of_chunks])
        sources += [Source(os.path.join(parent, name)) for name in files]
    return sources


def _matching(pattern: str, recursive: bool) -> list[Source]:
    sources: list[Source] = []
    for path in map(os.path.abspath, sorted(glob.glob(pattern, recursive=True))):
        if is_folder_of_chunks(Path(path)):
            sources.append(Source(path))
        elif os.path.isdir(path):
            sources += _in_folder(path, recursive)
        elif _is_wanted(os.path.basename(path)):
            sources.append(Source(path))
    return sources


@contextmanager
def _errors_noted(source: Source) -> Iterator[None]:
    """Put an error about a file into its source instead of raising it."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        source.error = " ".join(reason.removeprefix(f"{source.path}: ").split())
        _log.info("not added: %s: %s", source.path, source.error)


def _inspect(source: Source, known: FileState | None, sizes: Container[int]) -> None:
    """Decide whether a file is new: not what is `known` of it, nor of the size of any that is."""
    try:
        source.path.encode()  # SQLite keeps text as UTF-8
    except UnicodeEncodeError as error:
        raise ValueError("its name is not UTF-8: rename it") from error
    path = stated_file(source.path)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ValueError("not a regular file")
    if known and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        source.state = known
        return
    source.state = FileState(status.st_size, status.st_mtime_ns, "")
    if known is None and status.st_size not in sizes:
        source.is_new = True  # all of it is read when it has turned out to be a video
        return
    source.state = _with_content(source.state, source.path)
    source.is_new = known is None or known.sha256 != source.state.sha256
    if source.is_new and source.segments:
        raise ValueError("its content is not what was added any more: add it again first")


def _with_content(state: FileState, path: str) -> FileState:
    with open(stated_file(path), "rb") as file:
        return replace(state, sha256=hashlib.file_digest(file, "sha256").hexdigest())


class _Gone:
    """Files that are stored and no longer there, each to be taken once, by its content."""

    def __init__(self, known: Mapping[str, FileState]) -> None:
        self._paths: dict[str, list[str]] = {}
        for path, state in known.items():
            self._paths.setdefault(state.sha256, []).append(path)

    def take(self, sha256: str) -> str | None:
        paths = self._paths.get(sha256, [])
        gone = next(filter(_is_gone, paths), None)
        if gone is not None:
            paths.remove(gone)
        return gone


def _is_gone(path: str) -> bool:
    """Whether there is nothing under this name; not so if that cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _cut(source: Source, reader: Reader, cutting: Cutting) -> Clip | None:
    """Decide where to cut a file; its clip, if it is one segment, comes from the same opening."""
    info, clip = probe_and_read(
        source.path,
        num_frames=reader.num_frames,
        # whether a video is one shot is not known yet
        up_to_s=cutting.window_s if cutting.cut == "windows" else 0.0,
        side=reader.side,
        fit=reader.fit,
    )
    source.duration_s = info.duration_s
    pieces = cutting.segments(source.path, info.duration_s)  # one, [0, 0), of an image
    source.segments = [(piece.start_s, piece.end_s) for piece in pieces]
    return clip


def _embed(batch: Sequence[tuple[Source, Clip]], model: Embedder, token_budget: int | None) -> None:
    try:
        vectors_ND = model.embed_video([clip for _, clip in batch], token_budget=token_budget)
    except Exception as error:
        error.add_note(f"while embedding {', '.join({source.path: 0 for source, _ in batch})}")
        raise
    vectors_ND = check_vectors(vectors_ND, len(batch), model)
    for (source, _), vector_D in zip(batch, vectors_ND, strict=True):
        source.vectors.append(vector_D)
        if problem := vector_problem(vector_D):
            source.error = f"model {model.name!r} gave a vector that is {problem}"
            source.is_models_fault = True


def embed_texts(model: Embedder, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors (N, D) of texts; ValueError for one that is none, which names its text."""
    vectors_ND = check_vectors(model.embed_text(texts), len(texts), model)
    for text, vector_D in zip(texts, vectors_ND, strict=True):
        if problem := vector_problem(vector_D):
            raise ValueError(
                f"model {model.name!r} gave a vector that is {problem} for the text {text!r}"
            )
    return vectors_ND


def check_vectors(vectors_ND: np.ndarray, num: int, model: Embedder) -> np.ndarray:
    """A model's answer as float32; ValueError unless it is (num, model.dim)."""
    if np.shape(vectors_ND) != (num, model.dim):
        raise ValueError(
            f"model {model.name!r} gave vectors of shape {np.shape(vectors_ND)}, expected "
            f"{(num, model.dim)}"
        )
    return np.ascontiguousarray(vectors_ND, np.float32)


def _step_back() -> None:
    """Let this thread, and those that its decoder starts, give way to threads that embed."""
    if sys.platform != "linux":  # where it would be all threads of the process
        return
    thread = threading.get_native_id()
    with suppress(OSError):  # a sandbox may not have it
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + NICENESS_OF_DECODERS
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))


def _ahead(
    start: Callable[[In], Future[Out]], items: Iterable[In], num_ahead: int
) -> Iterator[Out]:
    """Map in order, with at most `num_ahead` items under way or waiting to be taken."""
    pending: deque[Future[Out]] = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) == num_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
