"""`index.faiss`: an index over the store's segments, kept in memory and in a file, never trusted.

The file says which collection and revision it is of. Ids are never reused and a segment never
changes, so comparing ids tells exactly what an older index lacks and what it holds too much. Only
an index of a revision that the store went through is brought up to date so: after a restored
backup the same ids may stand for other segments.
"""

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from .backends import VectorIndex
from .store import Store

if TYPE_CHECKING:
    from .backends.faiss_index import FaissIndex

INDEX = "index.faiss"

_log = logging.getLogger(__name__)


class IndexCache:
    """The index over exactly the segments that a store holds.

    Its methods raise OSError when no FAISS is installed. That the file cannot be written or read
    is no error, only a log line: the next process makes it anew.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = store.folder / INDEX
        self._index: VectorIndex | None = None
        self._factory = ""  # what `_index` was asked to be
        self._revision = (-1, "")  # of the store, when `_index` was brought up to date
        self._is_saved = False

    def current(self) -> VectorIndex:
        """The index over the segments that the store holds now."""
        if self._index is not None and self._revision == self._store.revision():
            return self._index
        with self._store.snapshot():
            if not self._store.has_revision(self._revision):
                self._index = None  # a backup was restored meanwhile
            reason = self._load() if self._index is None else None
            if reason and self._store.counts()["segments"]:
                _log.info("%s of collection %r: %s; made anew", INDEX, self._store.name, reason)
            index = self._catch_up()
            self._revision = self._store.revision()
        return index

    def save(self) -> None:
        """Write what `current` returned, unless the file holds it. For the only writer."""
        if self._index is None or self._is_saved:
            return
        self._is_saved = True  # tried once: a full disk is not written to at every search
        try:
            number, token = self._revision
            self._index.save(self._path, {**self._identity(), "revision": number, "token": token})
        except OSError as error:
            _log.warning("%s of collection %r: %s", INDEX, self._store.name, error)

    def save_if_free(self) -> None:
        """`save`, unless another process writes and will do so, or nobody may."""
        if not self._is_saved:
            with suppress(OSError), self._store.sole_writer(wait_s=0):
                self.save()

    def rebuild(self, factory: str) -> None:
        """Make the index anew from the store; ValueError if it cannot be of this kind."""
        with self._store.snapshot():
            ids_N, vectors_ND = self._store.vectors()
            self._revision = self._store.revision()
        self._index = _backend().build(ids_N, vectors_ND, factory=factory)
        self._factory = factory
        self._is_saved = False

    def verify(self) -> str | None:
        """Read the file again and make it anew if need be; says what was wrong with it."""
        self._index = None
        with self._store.snapshot():
            reason = self._load() or self._difference()
            if reason:
                self._build(str(self._store.settings()["index"]))
        self.save_if_free()
        return reason

    def _load(self) -> str | None:
        """Take the index from its file, or say why not."""
        try:
            index, header = _backend().load(self._path)
        except FileNotFoundError:
            return "there is none"
        except (OSError, ValueError) as error:
            return str(error)
        identity = self._identity()
        if {key: header.get(key) for key in identity} != identity:
            return "it belongs to another collection, model or kind of index"
        revision = (header.get("revision", -1), header.get("token", ""))
        if not self._store.has_revision(revision):
            return "it is not of this history of the collection (was a backup restored?)"
        self._index, self._factory, self._is_saved = index, str(identity["index"]), True
        self._revision = revision
        return None

    def _difference(self) -> str | None:
        """How the index differs from the store; where it is exact, vectors are compared too."""
        assert self._index is not None
        order = np.argsort(self._index.ids_N)
        if not np.array_equal(self._index.ids_N[order], self._store.segment_ids()):
            held, now = self._revision[0], self._store.revision()[0]
            return f"it covers revision {held}, the collection is at {now}"
        if self._index.is_exact:
            _, vectors_ND = self._store.vectors()
            if not np.array_equal(self._index.vectors_ND[order], vectors_ND):
                return "its vectors are not those of the collection"
        return None

    def _catch_up(self) -> VectorIndex:
        """Bring the index from whatever it holds to what the store holds."""
        factory = str(self._store.settings()["index"])
        if self._index is None or self._factory != factory:
            return self._build(factory)
        held_N, wanted_N = self._index.ids_N, self._store.segment_ids()
        gone_N = np.setdiff1d(held_N, wanted_N, assume_unique=True)
        new_N = np.setdiff1d(wanted_N, held_N, assume_unique=True)
        if len(gone_N) and not self._index.is_exact:
            return self._build(factory)
        if len(gone_N):
            self._index.remove(gone_N)
        if len(new_N):
            self._index.add(*self._store.vectors(new_N))
        self._is_saved = self._is_saved and not len(gone_N) and not len(new_N)
        return self._index

    def _build(self, factory: str) -> VectorIndex:
        try:
            self.rebuild(factory)
        except ValueError as error:
            # after removals there may be too few vectors for what was possible once
            _log.warning("collection %r uses a flat index: %s", self._store.name, error)
            self.rebuild("Flat")
            self._factory = factory
        assert self._index is not None
        return self._index

    def _identity(self) -> dict[str, str | int]:
        settings = self._store.settings()
        return {key: settings[key] for key in ("collection_id", "fingerprint", "index")}


def _backend() -> "type[FaissIndex]":
    """FAISS, imported when it is needed first."""
    try:
        from .backends.faiss_index import FaissIndex
    except ImportError as error:
        raise OSError(
            "FAISS is not installed: pip install 'fluxclip[cpu]', or 'fluxclip[gpu]' for a GPU"
        ) from error
    return FaissIndex
