"""`index.faiss`: an index over most of the store's segments, kept in a file, never trusted.

The file, the base, is never changed, only replaced. It says which collection and revision it is of.
What was committed after that revision is searched exactly beside it, from memory, and what was
removed is left out; so a write costs what it writes, and never the whole index. When much has come
together, the base is made anew from the store. A base of a revision that the store never went
through is not taken: after a restored backup the same ids may stand for other segments.

A small collection has no file and needs no FAISS: all of it is searched beside an empty base.
Shape legend: N segments, D width.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np

from .backends import VectorIndex
from .store import Store

if TYPE_CHECKING:
    from .backends.faiss_index import FaissIndex

INDEX = "index.faiss"

# The base is made anew when more segments than this were added or removed since, and more than this
# share of it. Reading and comparing so many one by one takes some 30 ms.
MERGE_SEGMENTS = 4096
MERGE_SHARE = 0.05

_NO_IDS = np.empty(0, np.int64)
_NO_REVISION = (-1, "")

_log = logging.getLogger(__name__)


class IndexCache:
    """Nearest neighbours among exactly the segments that a store holds.

    That the base cannot be read or written, or FAISS is not installed, is no error but a log line:
    then all is compared one by one.
    """

    _base: VectorIndex | None

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = store.folder / INDEX
        self._begin(None, 0, _NO_REVISION)
        self._read: tuple[int, int, int] | None = None  # which file was last opened
        self._fault: str | None = None  # why the base was not taken from it

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """A snapshot of the store, and inside `nearest` is about exactly what that holds."""
        # Read before the snapshot begins: so the base is of no later revision than that.
        if self._seen == _NO_REVISION or (self._is_due and self._read != self._file_now()):
            self._open()  # for the first time, or since another process has merged
        with self._store.snapshot():
            self._catch_up()
            yield

    def nearest(
        self, query_D: np.ndarray, num: int, *, allowed_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, float]:
        """Ids of at least the `num` best segments, as far as there are, in any order.

        allowed_N: look only among these ids, which the store holds. Also returns a score that no
        segment left out exceeds, minus infinity if none is; up to the approximations of the base.
        """
        base, num_base = self._base, len(self._base or ())
        newer_N, newer_ND = self._newer_N, self._newer_ND
        in_base_N = None
        if allowed_N is not None:
            if base is not None and not base.is_exact:
                return allowed_N, -np.inf
            is_allowed_N = np.isin(newer_N, allowed_N)
            newer_N, newer_ND = newer_N[is_allowed_N], newer_ND[is_allowed_N]
            in_base_N = allowed_N[allowed_N <= self._last_of_base]
            num_base = len(in_base_N)

        bounds = [-np.inf]
        if len(newer_N) > num:
            scores_N = newer_ND @ query_D
            best_N = np.argpartition(-scores_N, num)[:num]
            newer_N = newer_N[best_N]
            bounds.append(scores_N[best_N].min())
        if base is None or not num_base:
            return newer_N, max(bounds)
        if num >= num_base:
            found_N = base.ids_N if in_base_N is None else in_base_N
        else:
            ids_QK, scores_QK = base.search(query_D[None], num, allowed_N=in_base_N)
            is_found_K = ids_QK[0] >= 0  # an approximate index may find fewer than there are
            found_N = ids_QK[0][is_found_K]
            bounds.append(scores_QK[0][is_found_K].min(initial=np.inf))
        found_N = found_N[~np.isin(found_N, self._gone_N)]
        return np.concatenate([found_N, newer_N]), max(bounds)

    def merge_if_due(self) -> None:
        """Make the base anew if much has changed since. For the only writer; see `rebuild`."""
        with self.snapshot():
            pass
        if self._is_due:
            self.rebuild(str(self._store.settings()["index"]))

    def merge_if_free(self) -> None:
        """`merge_if_due`, unless another process writes and will do so, or nobody may."""
        if not self._is_due:
            return
        try:
            with self._store.sole_writer(wait_s=0):
                self.merge_if_due()
        except (BlockingIOError, PermissionError):
            pass
        except OSError as error:
            _log.warning("collection %r: %s", self._store.name, error)

    def rebuild(self, factory: str, *, or_flat: bool = True) -> None:
        """Make the base anew, of this kind from now on. For the only writer.

        or_flat: make a flat one if there are too few vectors for that kind, else ValueError.
        Raises OSError if it cannot be written; it is used from memory then.
        """
        backend = _backend()
        ids_N, vectors_ND = self._store.vectors()
        try:
            index = backend.build(ids_N, vectors_ND, factory=factory)
        except ValueError as error:
            if not or_flat:
                raise
            # after removals there may be too few vectors for what was possible once
            _log.warning("collection %r uses a flat index: %s", self._store.name, error)
            index = backend.build(ids_N, vectors_ND)
        if factory != self._store.settings()["index"]:
            self._store.set_setting("index", factory)
        number, token = revision = self._store.revision()
        self._begin(index, _last(ids_N), revision)
        self._fault = None
        self._read = self._file_now()
        index.save(self._path, {**self._identity(), "revision": number, "token": token})
        self._read = self._file_now()
        self._base, _ = backend.load(self._path, verify="always")  # mapped, and read back

    def mend(self) -> list[str]:
        """Make a wrong base anew, remove what a killed writer left; says what was done.

        Raises OSError if that is not possible.
        """
        reason, temporary = self._verify(), self._path.with_name(INDEX + ".tmp")
        done = []
        if reason or temporary.exists():
            with self._store.sole_writer():
                if temporary.exists():
                    temporary.unlink()
                    done.append(f"{temporary.name} was removed: a killed process left it")
                if reason:
                    self.rebuild(str(self._store.settings()["index"]))
                    done.append(f"the index was made anew: {reason}")
        return done

    def _verify(self) -> str | None:
        """What is wrong with the file, read anew and compared with the store; None if nothing."""
        self._open(verify="always")
        with self._store.snapshot():
            self._catch_up()
            if self._fault or not self._is_due:
                return self._fault or self._difference()
        num = len(self._newer_N) + len(self._gone_N)
        return "there is none" if self._base is None else f"{num} segments came or went since"

    @property
    def segment_ids_N(self) -> np.ndarray:
        """Ids of the segments that are searched, int64, ascending."""
        base_N = _NO_IDS if self._base is None else self._base.ids_N
        return np.sort(np.concatenate([np.setdiff1d(base_N, self._gone_N), self._newer_N]))

    @property
    def _is_due(self) -> bool:
        beside = len(self._newer_N) + len(self._gone_N)
        is_much = beside > max(MERGE_SEGMENTS, MERGE_SHARE * len(self._base or ()))
        return is_much or self._fault is not None

    def _begin(self, base: VectorIndex | None, last_id: int, revision: tuple[int, str]) -> None:
        """Hold what `base` holds, of `revision`, and nothing beside it."""
        self._base = base
        self._last_of_base = self._last_id = last_id
        self._seen = revision
        self._gone_N = self._newer_N = _NO_IDS
        self._newer_ND = np.empty((0, self._store.dim), np.float32)

    def _catch_up(self) -> None:
        """Bring what is held beside the base from the revision last seen to the present one.

        Ids grow and never come again: what is above the last one is new, and what was removed since
        and is not above the last one of the base was in the base.
        """
        if self._seen == (revision := self._store.revision()):
            return
        if not self._store.has_revision(self._seen):
            if self._base is not None:
                self._refuse("it is not of this history of the collection (restored from a copy?)")
            self._begin(None, 0, _NO_REVISION)
        if self._last_id:
            removed_N = self._store.removed_since(self._seen[0])
            of_base_N = removed_N[removed_N <= self._last_of_base]
            self._gone_N = np.concatenate([self._gone_N, of_base_N])
            is_kept_N = ~np.isin(self._newer_N, removed_N)
            self._newer_N, self._newer_ND = self._newer_N[is_kept_N], self._newer_ND[is_kept_N]
        ids_N, vectors_ND = self._store.vectors(after=self._last_id)
        self._newer_N = np.concatenate([self._newer_N, ids_N])
        self._newer_ND = np.concatenate([self._newer_ND, vectors_ND])
        self._last_id = max(self._last_id, _last(ids_N))
        self._seen = revision

    def _open(self, *, verify: Literal["small", "always"] = "small") -> None:
        """Take the base from its file, or note why not."""
        self._begin(None, 0, _NO_REVISION)
        self._read, self._fault = self._file_now(), None
        if self._read is None:
            return
        try:
            base, header = _backend().load(self._path, verify=verify)
        except (OSError, ValueError) as error:
            self._refuse(str(error))
            return
        identity = self._identity()
        if {key: header.get(key) for key in identity} != identity:
            self._refuse("it belongs to another collection, model or kind of index")
            return
        self._begin(base, _last(base.ids_N), (header.get("revision", -1), header.get("token", "")))

    def _refuse(self, fault: str) -> None:
        self._fault = fault
        _log.warning("%s of collection %r is not used: %s", INDEX, self._store.name, fault)

    def _difference(self) -> str | None:
        """How what is searched differs from the store; exact vectors are compared too."""
        if not np.array_equal(self.segment_ids_N, self._store.segment_ids()):
            return "its segments are not those of the collection"
        if self._base is not None and self._base.is_exact:
            ids_N, vectors_ND = self._store.vectors()
            held_N, held_ND = self._base.ids_N, self._base.vectors_ND
            is_held_N, is_there_N = np.isin(ids_N, held_N), np.isin(held_N, ids_N)
            order_N = np.argsort(held_N[is_there_N])
            if not np.array_equal(held_ND[is_there_N][order_N], vectors_ND[is_held_N]):
                return "its vectors are not those of the collection"
        return None

    def _identity(self) -> dict[str, str | int]:
        settings = self._store.settings()
        return {key: settings[key] for key in ("collection_id", "fingerprint", "index")}

    def _file_now(self) -> tuple[int, int, int] | None:
        """What tells the file from one that was put in its place; None if there is none."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


def _last(ids_N: np.ndarray) -> int:
    return int(ids_N.max(initial=0))


def _backend() -> "type[FaissIndex]":
    """FAISS, imported when it is needed first."""
    try:
        from .backends.faiss_index import FaissIndex
    except ImportError as error:
        raise OSError(
            "FAISS is not installed: pip install 'fluxclip[cpu]', or 'fluxclip[gpu]' for a GPU"
        ) from error
    return FaissIndex
