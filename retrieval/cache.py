"""`index.faiss`: an index over the store's segments, kept in memory and in a file, never trusted.

The file says which collection and revision it is of. Ids are never reused and a segment never
changes, so comparing ids tells exactly what an older index lacks and what it holds too much. Ids
are compared whenever the file is read: after a restored backup equal revisions prove nothing.
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
        self._revision = -1  # of the store, when `_index` was brought up to date
        self._is_saved = False

    def current(self) -> VectorIndex:
        """The index over the segments that the store holds now."""
        if self._index is not None and self._revision == self._store.revision():
            return self._index
        with self._store.snapshot():
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
            self._index.save(self._path, {**self._identity(), "revision": self._revision})
        except OSError as error:
            _log.warning("%s of collection %r: %s", INDEX, self._store.name, error)

    def save_if_free(self) -> None:
        """`save`, unless another process writes and will do so, or nobody may."""
        if not self._is_saved:
            with suppress(OSError), self._store.sole_writer():
                self.save()

    def rebuild(self, factory: str) -> None:
        """Make the index anew from the store; ValueError if it cannot be of this kind."""
        ids_N, vectors_ND = self._store.vectors()
        self._index = _backend().build(ids_N, vectors_ND, factory=factory)
        self._factory = factory
        self._is_saved = False

    def verify(self) -> str | None:
        """Read the file again and make it anew if need be; says what was wrong with it."""
        self._index = None
        with self._store.snapshot():
            reason = self._load()
            if not reason and self._index is not None:
                held_N = np.sort(self._index.ids_N)
                if not np.array_equal(held_N, self._store.segment_ids()):
                    now_at = self._store.revision()
                    reason = f"it covers revision {self._revision}, the collection is at {now_at}"
        self._revision = -1
        self.current()
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
        self._index, self._factory, self._is_saved = index, str(identity["index"]), True
        self._revision = int(header["revision"])
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
