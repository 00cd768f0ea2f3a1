"""Files behind addresses, fetched whole into a folder that keeps so many bytes of them.

A file is known by the SHA-256 of its content: whatever address it came from, and whatever the
server says later, the same name means the same bytes. Any number of processes share the folder;
each file is fetched by one of them while the others wait.
"""

import fcntl
import hashlib
import http.client
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fluxclip.data.sources import cache_folder
from fluxclip.data.sources._prepared import writing

CACHE_GB = 50.0  # of shards, unless FLUXCLIP_CACHE_GB says otherwise
TIMEOUT_S = 30.0  # without a byte
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before each further try
_AT_ONCE = 16  # addresses that are asked at the same time
_PIECE = 2**20
_PASSING = frozenset([408, 425, 429, 500, 502, 503, 504])  # answers that may change by themselves


T = TypeVar("T")


class Unreachable(ValueError):
    """A file that a run needs and cannot get; no other file may stand in for it unnoticed."""


class Described(NamedTuple):
    """What a server says of a file: bytes, and a mark that changes when the file does."""

    bytes: int
    mark: str


def describe(urls: list[str]) -> list[Described]:
    """What servers say of files, many asked at once. Raises Unreachable with the first that fails.

    By the first byte of a GET: some servers, and addresses that are signed, know no HEAD.
    """
    with ThreadPoolExecutor(min(_AT_ONCE, max(1, len(urls)))) as pool:
        return list(pool.map(_describe, urls))


def _describe(url: str) -> Described:
    def ask() -> Described:
        with _opened(url, "bytes=0-0") as answer:
            size = answer.headers.get("Content-Length")
            if answer.status == 206:
                size = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if not size or not size.isdecimal():
                raise Unreachable(f"{url}: its server does not say how large it is")
            mark = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            return Described(int(size), mark)

    return _tried(ask, url, WAITS_S[:2])


def small(url: str) -> bytes:
    """A file's content, in memory. Raises Unreachable."""

    def ask() -> bytes:
        with _opened(url) as answer, _asking():
            return answer.read()

    return _tried(ask, url, WAITS_S[:2])


def fetched(url: str, *, sha256: str, num_bytes: int, suffix: str = ".tar") -> Path:
    """The file's place on this machine, fetched if it is not there.

    Of files that end in .tar, those not used for longest make room. Raises Unreachable for one that
    cannot be got, or whose content is another than `sha256` and `num_bytes` say; OSError if the
    cache folder cannot be written to.
    """
    folder = shards_folder()
    path = folder / f"{sha256}{suffix}"
    with writing(folder), _open_alone(path) as part:
        if part is not None:
            _make_room(folder, num_bytes)
            for attempt in ("perhaps from where a process was stopped", "anew"):
                _download(url, part)
                part.seek(0)
                found, size = hashlib.file_digest(part, "sha256").hexdigest(), part.tell()
                if (found, size) == (sha256, num_bytes):
                    break
                part.truncate(0)
                if attempt == "anew":
                    raise Unreachable(
                        f"{url} is not what its index says: {size:,} bytes with SHA-256 "
                        f"{found[:12]}..., not {num_bytes:,} with {sha256[:12]}..."
                    )
            os.replace(part.name, path)
        with suppress(FileNotFoundError):  # another process has made room
            os.utime(path)
    return path


def fetched_unknown(url: str, described: Described) -> tuple[Path, str]:
    """`fetched` for a file of which only its server knows: its place, and its SHA-256."""
    folder = shards_folder()
    name = hashlib.sha256(repr((url, described)).encode()).hexdigest()
    with writing(folder), _open_alone(folder / f"{name}.new") as part:
        assert part is not None  # it never gets that name
        _make_room(folder, described.bytes)
        _download(url, part, mark=described.mark)
        part.seek(0)
        sha256 = hashlib.file_digest(part, "sha256").hexdigest()
        if part.tell() != described.bytes:
            part.truncate(0)
            raise Unreachable(f"{url} changed while it was read: try again")
        path = folder / f"{sha256}.tar"
        os.replace(part.name, path)
    return path, sha256


def shards_folder() -> Path:
    """Where shards and their lists are kept, made if need be; OSError if it cannot be."""
    folder = cache_folder() / "shards"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _open_alone(path: Path) -> Iterator[BufferedRandom | None]:
    """The file beside `path` that it is to be made of, for this process alone; None if it is there.

    What another process had written of it when it was stopped is still in it.
    """
    part = path.with_name(path.name + ".part")
    while not path.exists():
        with part.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # the one that had the lock before has given the file its name
            if not part.exists() or not os.path.samestat(os.fstat(file.fileno()), part.stat()):
                continue
            yield file
            return
    yield None


def _make_room(folder: Path, num_bytes: int) -> None:
    """Delete the shards not used for longest until there is room for so many bytes."""
    limit = _limit()
    shards = []
    for path in folder.glob("*.tar"):
        try:
            state = path.stat()
        except FileNotFoundError:  # another process makes room too
            continue
        shards.append((state.st_mtime_ns, state.st_size, path))
    total = num_bytes + sum(size for _, size, _ in shards)
    for _, size, path in sorted(shards):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size


def _limit() -> float:
    """Bytes of shards to keep. Raises ValueError for a setting that is no number above 0."""
    text = os.environ.get("FLUXCLIP_CACHE_GB", str(CACHE_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ValueError(f"FLUXCLIP_CACHE_GB must be a number above 0, not {text!r}")
    return limit * 1e9


def _download(url: str, part: BufferedRandom, *, mark: str = "") -> None:
    """Bring `part` to the file's end, from where it is; from its beginning for another mark."""
    _tried(
        lambda: _continue(url, part, mark), url, WAITS_S,
        reached=lambda: part.seek(0, os.SEEK_END),
    )  # fmt: skip


def _continue(url: str, part: BufferedRandom, mark: str) -> None:
    have = part.seek(0, os.SEEK_END)
    try:
        answer = _opened(url, f"bytes={have}-" if have else None, mark=mark)
    except HTTPError as error:
        if have and error.code == 416:  # nothing is left to send
            return
        raise
    with answer:
        if answer.status != 206:  # it sends all of it, asked or not
            part.truncate(0)
            have = 0
        left = answer.headers.get("Content-Length", "")
        while piece := _next(answer):
            part.write(piece)
        part.flush()
    if left.isdecimal() and part.tell() < have + int(left):
        raise ConnectionError("the connection broke off")


def _next(answer: http.client.HTTPResponse) -> bytes:
    with _asking():
        return answer.read(_PIECE)


def _tried(
    ask: Callable[[], T], url: str, waits_s: tuple[float, ...], *,
    reached: Callable[[], int] = lambda: 0,
) -> T:  # fmt: skip
    """What `ask` gives, tried again after each of the waits. Raises Unreachable after the last.

    The waits begin anew whenever `reached` is further than ever.
    """
    furthest, waits = reached(), iter(waits_s)
    while True:
        try:
            return ask()
        except HTTPError as error:
            cause: Exception = error
            reason, is_passing = f"HTTP {error.code} {error.reason}", error.code in _PASSING
        except ConnectionError as error:
            cause, reason, is_passing = error, str(error), True
        if (now := reached()) > furthest:
            furthest, waits = now, iter(waits_s)
        wait_s = next(waits, None)
        if wait_s is None or not is_passing:
            raise Unreachable(f"{url} cannot be fetched ({reason})") from cause
        time.sleep(wait_s)


@contextmanager
def _asking() -> Iterator[None]:
    """Let all that a network does be ConnectionErrors, and no error of this machine's disk."""
    try:
        yield
    except HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise ConnectionError(reason) from error


def _opened(url: str, span: str | None = None, *, mark: str = "") -> http.client.HTTPResponse:
    """The answer of a server; with a mark, all of the file unless it still has that one."""
    headers = {"User-Agent": "fluxclip", "Accept-Encoding": "identity"}
    if span:
        headers["Range"] = span
        if mark and not mark.startswith("W/"):  # a weak mark is not for parts
            headers["If-Range"] = mark
    with _asking():
        answer: http.client.HTTPResponse = urlopen(Request(url, headers=headers), timeout=TIMEOUT_S)
    return answer
