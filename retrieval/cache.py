"""`index.faiss`: an index over most of the store's segments, kept in a file, never trusted.

The file, the base, is never changed, only replaced. It says which collection, space and revision it
is of. What was committed after that revision is searched exactly beside it, from memory, and what
was removed is left out; so a write costs what it writes, and never the whole index. When much has
come together, the base is made anew from the store. A base of a revision that the store never went
through is not taken: after a restored backup the same ids may stand for other segments.
Vectors that would take more than a share of the memory there are read in blocks by each search.

A small collection has no file and needs no FAISS: all of it is searched beside an empty base.
The index of a space that is staged is `index-<space>.faiss`: readers that see the switch find it.
Shape legend: N segments, Q queries, D width.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .backends import Gpu, VectorIndex
from .index_choice import (
    AUTO,
    QUERIES_PER_KIND,
    Sample,
    Wish,
    available_memory,
    physical_memory,
    tune,
)
from .query_encoder import CAPTIONS, QueryEncoder, text_encoder_folder
from .store import Store

if TYPE_CHECKING:
    from .backends.faiss_index import FaissIndex

INDEX = "index.faiss"

# The base is made anew when more segments than this were added or removed since, and more than this
# share of it. Reading and comparing so many one by one takes some 30 ms.
MERGE_SEGMENTS = 4096
MERGE_SHARE = 0.05
# A search merges up to so many segments itself, a tenth of them where the index is not flat; more
# would take longer than a second.
QUICK_SEGMENTS = 100_000

# Of the vectors beside the base, what is more than this share of the memory is not kept there.
NEWER_SHARE = 1 / 8
_ROWS_AT_ONCE = 16384

_NO_IDS = np.empty(0, np.int64)
_NO_REVISION = (-1, "")

_log = logging.getLogger(__name__)


class IndexCache:
    """Nearest neighbours among exactly the segments that a store holds.

    That the base cannot be read or written, or FAISS is not installed, is no error but a log line:
    then all is compared one by one. gpu: search the base on a copy on this GPU, or on all of them;
    OSError if FAISS cannot.
    """

    _base: VectorIndex | None

    def __init__(self, store: Store, *, gpu: Gpu | None = None) -> None:
        self._store = store
        self._path = store.folder / INDEX
        self._gpu = gpu
        if gpu is not None:
            _backend()
            from .backends.faiss_index import require_gpu

            require_gpu(gpu)
        self._space = store.space
        self._begin(None, 0, _NO_REVISION)
        self._kind = "Flat"  # of the base
        self._trained_on = 0  # how many segments the base was trained for
        self._read: tuple[int, int, int] | None = None  # which file was last opened
        self._fault: str | None = None  # why the base was not taken from it
        self._said_late = False

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """A snapshot of the store, and inside `nearest` is about exactly what that holds."""
        while True:
            # Read before the snapshot begins: so the base is of no later revision than that.
            if self._seen == _NO_REVISION or (self._is_due and self._read != self._file_now()):
                self._open()  # for the first time, or since another process has merged
            with self._store.snapshot():
                revision = self._store.revision()
                if self._seen == revision or self._space == self._store.space:
                    self._catch_up(revision)
                    yield
                    return
            self._begin(None, 0, _NO_REVISION)  # another model serves now

    def nearest(
        self, query_D: np.ndarray, num: int, *, allowed_N: np.ndarray | None = None
    ) -> tuple[np.ndarray, float]:
        """Ids of at least the `num` best segments, as far as there are, in any order.

        allowed_N: look only among these ids, which the store holds, ascending; then it is exact,
        whatever the base. Also returns a score that no segment left out exceeds, minus infinity if
        none is; up to the approximations of the base.
        """
        best_N, scores_N, bound = self._nearest_in_base(query_D, num, allowed_N)
        for ids_N, vectors_ND in self._newer_blocks(allowed_N):
            best_N, scores_N, bound_of_best = _best(
                np.concatenate([best_N, ids_N]),
                np.concatenate([scores_N, vectors_ND @ query_D]),
                num,
            )
            bound = max(bound, bound_of_best)
        return best_N, bound

    def _newer_blocks(
        self, allowed_N: np.ndarray | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and vectors of what is beside the base: first those in memory, perhaps none."""
        num_held = len(self._newer_ND)
        ids_N, vectors_ND = self._newer_N[:num_held], self._newer_ND
        others_N = self._newer_N[num_held:]
        if allowed_N is not None:
            is_allowed_N = _is_in(ids_N, allowed_N)
            ids_N, vectors_ND = ids_N[is_allowed_N], vectors_ND[is_allowed_N]
            others_N = others_N[_is_in(others_N, allowed_N)]
        yield ids_N, vectors_ND
        for at in range(0, len(others_N), _ROWS_AT_ONCE):
            yield self._store.vectors(others_N[at : at + _ROWS_AT_ONCE])

    def _nearest_in_base(
        self, query_D: np.ndarray, num: int, allowed_N: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Of what the base holds: ids and scores of the best, and what no other one exceeds."""
        base = self._base
        if base is None:
            return _NO_IDS, np.empty(0, np.float32), -np.inf
        if allowed_N is not None:  # what the store holds of its ids, the base holds
            allowed_N = allowed_N[: np.searchsorted(allowed_N, self._last_of_base, "right")]
            places_N = np.searchsorted(base.ids_N, allowed_N)
            return allowed_N, base.scores_at(query_D, places_N), -np.inf
        bound = -np.inf
        if num >= len(base):
            ids_N, scores_N = base.ids_N, base.vectors_ND @ query_D
        else:
            ids_QK, scores_QK = base.search(query_D[None], num)
            if ids_QK[0, -1] < 0:  # an approximate index may find fewer than there are
                ids_QK, scores_QK = base.search_all(query_D[None], num)
            ids_N, scores_N, bound = ids_QK[0], scores_QK[0], float(scores_QK[0].min())
        if len(self._gone_N):
            is_there_N = ~_is_in(ids_N, self._gone_N)
            ids_N, scores_N = ids_N[is_there_N], scores_N[is_there_N]
        return ids_N, scores_N, bound

    def merge_if_due(self, *, say: Callable[[str], None] = _log.info) -> None:
        """Make the base anew if much has changed since. For the only writer; see `rebuild`."""
        if self._seen == _NO_REVISION or self._space != self._store.space:
            self._open()
        if self._is_late() and self._read != self._file_now():
            self._open()  # another process has merged
        if self._is_late():
            self.rebuild(train=False, say=say)

    def _is_late(self) -> bool:
        """`_is_due` in the present revision, counted, not read: a first import may be millions."""
        num_gone = 0
        with self._store.snapshot():
            num = self._store.counts()["segments"]
            if self._base is not None:
                if not self._store.has_revision(self._seen):
                    return True
                removed_N = self._store.removed_since(self._seen[0])
                num_gone = len(self._gone_N) + int((removed_N <= self._last_of_base).sum())
        num_newer = num - (len(self._base or ()) - num_gone)
        return self._fault is not None or self._is_much(num_newer + num_gone)

    def merge_if_free(self) -> None:
        """`merge_if_due`, unless it takes long, or another process writes, or nobody may."""
        if not self._is_due:
            return
        num = len(self._base or ()) + len(self._newer_N)
        is_flat = self.wish.kind(num, self._store.dim) == "Flat"
        if num > (QUICK_SEGMENTS if is_flat else QUICK_SEGMENTS // 10):
            if not self._said_late:
                _log.warning(
                    "collection %r: its index is behind, searches are slower until the next add, "
                    "or `fluxclip index rebuild`",
                    self._store.name,
                )
            self._said_late = True
            return
        try:
            with self._store.sole_writer(wait_s=0):
                self.merge_if_due()
        except (BlockingIOError, PermissionError):
            pass
        except OSError as error:
            _log.warning("collection %r: %s", self._store.name, error)

    def rebuild(
        self,
        wish: Wish | None = None,
        *,
        train: bool = True,
        queries_QD: np.ndarray | None = None,
        say: Callable[[str], None] = _log.info,
    ) -> None:
        """Make the base anew, as this wish says from now on. For the only writer.

        wish: the one of the collection unless given. A kind that is given and cannot be made of so
        few vectors is a ValueError; in other cases a flat index takes its place. train: anew, else
        only if there is nothing to go on from, or twice as many segments as then.
        queries_QD: unit vectors to choose its effort by, see `tune`; of the collection unless
        given. say: called with a line before what takes long, and one after it. Raises OSError if
        it needs more memory than there is, or cannot be written; then it is used from memory here,
        and what others have is as it was.
        """
        held = self.wish
        with self._store.snapshot():
            space, dim = self._store.space, self._store.dim
            may_be_flat = wish is None or wish.index == AUTO
            index, made = self._build(
                space, dim, wish or held, train=train, may_be_flat=may_be_flat,
                queries_QD=queries_QD, say=say,
            )  # fmt: skip
            number, token = revision = self._store.revision()
        self._space = space
        self._begin(index, last := _last(index.ids_N), revision)
        self._note(made)
        self._fault = None
        self._read = self._file_now()
        index.save(self._path, {**self._identity(), **made, "revision": number, "token": token})
        self._path_beside(space).unlink(missing_ok=True)
        if wish is not None and wish != held:  # not before: it is a wish that can be met
            self._store.set_settings(wish.settings())
        self._read = self._file_now()
        del index  # before it is read back: it may be most of the memory
        self._begin(None, 0, _NO_REVISION)
        base, _ = _backend().load(self._path, verify="always")  # mapped
        self._begin(base, last, revision)
        self._put_on_gpu()

    def build_beside(self, space: int) -> None:
        """Make the index of the staged space, for whoever sees it serve. For the only writer.

        To be called when every segment has its vector there, or is to be removed by the switch,
        before `Store.switch_space`; what is added or removed after that is searched beside it.
        Readers who see the switch find the file; `adopt` then gives it its ordinary name.
        ValueError if that space is not the staged one.
        That it cannot be made or written is a log line, as it costs speed and no answer.
        """
        staged = self._store.staged()
        if staged is None or staged["space"] != space:
            raise ValueError(f"collection {self._store.name!r} has no space {space} under way")
        wish, dim = self.wish, int(staged["dim"])
        num = self._store.counts()["segments"]
        is_small = num <= MERGE_SEGMENTS and wish.kind(num, dim) == "Flat"
        if is_small and not self._path.exists():
            return  # it needs none, as until now
        beside = self._path_beside(space)
        try:
            beside.unlink(missing_ok=True)  # of a try that was given up
            with self._store.snapshot():
                number, token = self._store.revision()
                index, made = self._build(space, dim, wish, train=True, may_be_flat=True)
            identity = {**self._identity(), "fingerprint": staged["fingerprint"], "space": space}
            index.save(beside, {**identity, **made, "revision": number, "token": token})
        except (OSError, ValueError) as error:
            _log.warning("collection %r: no index for the new model: %s", self._store.name, error)

    def adopt(self) -> None:
        """Give the index of the space that serves its ordinary name, and remove those of others.

        For the only writer, after `Store.switch_space` or `Store.drop_staged`. Raises OSError.
        """
        beside = self._path_beside(self._store.space)
        if beside.exists():
            os.replace(beside, self._path)
        for path in self._left():
            path.unlink()

    def mend(self) -> list[str]:
        """Make a wrong base anew, remove what a killed writer left; says what was done.

        Raises OSError if that is not possible.
        """
        reason, done = self._verify(), []
        if reason or self._left():
            with self._store.sole_writer():
                for path in self._left():
                    path.unlink()
                    done.append(f"{path.name} was removed: a killed process left it")
                if reason:
                    self.rebuild(train=False)
                    done.append(f"the index was made anew: {reason}")
        return done

    def _left(self) -> list[Path]:
        """Files that no longer serve, and will not."""
        staged = self._store.staged()
        spaces = [self._store.space, *([staged["space"]] if staged else [])]
        used = [self._path, *map(self._path_beside, spaces)]
        found = [*self._store.folder.glob("index*.faiss"), *self._store.folder.glob("*.faiss.tmp")]
        return sorted(path for path in found if path not in used)

    def describe(self) -> dict[str, Any] | None:
        """What the file says of itself; None if there is none that can be read.

        kind: a FAISS factory string; effort, candidates, recall: see `tune`, not for a flat one.
        """
        path = self._file()
        if not path.exists():  # as of a small collection, which needs no FAISS
            return None
        try:
            header = _backend().header(path)
            size = path.stat().st_size
        except (OSError, ValueError):
            return None
        stated = ("kind", "segments", "effort", "candidates", "recall", "seconds")
        return {**{key: header[key] for key in stated if key in header}, "bytes": size}

    def _verify(self) -> str | None:
        """What is wrong with the file, read anew and compared with the store; None if nothing."""
        self._open(verify="always")
        with self._store.snapshot():
            self._catch_up(self._store.revision())
            if self._fault or not self._is_due:
                return self._fault or self._difference()
        num = len(self._newer_N) + len(self._gone_N)
        return "there is none" if self._base is None else f"{num} segments came or went since"

    @property
    def segment_ids_N(self) -> np.ndarray:
        """Ids of the segments that are searched, int64, ascending."""
        base_N = _NO_IDS if self._base is None else self._base.ids_N
        return np.concatenate([base_N[~_is_in(base_N, self._gone_N)], self._newer_N])

    @property
    def _is_due(self) -> bool:
        return self._fault is not None or self._is_much(len(self._newer_N) + len(self._gone_N))

    def _is_much(self, beside: int) -> bool:
        return beside > max(MERGE_SEGMENTS, MERGE_SHARE * len(self._base or ()))

    @property
    def wish(self) -> Wish:
        """What kind of index the collection is to have."""
        return Wish.of(self._store.settings())

    def _build(
        self,
        space: int,
        dim: int,
        wish: Wish,
        *,
        train: bool,
        may_be_flat: bool,
        queries_QD: np.ndarray | None = None,
        say: Callable[[str], None] = _log.info,
    ) -> tuple["FaissIndex", dict[str, Any]]:
        """An index of a space as it is in the present snapshot, and what its header says of it."""
        backend, start_s = _backend(), time.monotonic()
        num = self._store.counts()["segments"]
        kind = wish.kind(num, dim)
        trained, trained_on = b"", num
        is_near = self._space == space and self._kind == kind and num < 2 * self._trained_on
        if not train and is_near and self._base is not None:
            trained, trained_on = self._base.trained, self._trained_on

        def build(kind: str, trained: bytes) -> "FaissIndex":
            needed, there = backend.memory_needed(kind, num=num, dim=dim), available_memory()
            what = f"an index {kind} of {num} segments takes about {_size(needed)} of memory"
            if needed > there:
                raise OSError(
                    f"{what}, but {_size(there)} are free: close other programs and rebuild; until "
                    "then the old one is used"
                )
            say(f"making {what}")
            blocks = self._store.vector_blocks(space=space)
            return backend.build(blocks, num=num, dim=dim, factory=kind, trained=trained)

        try:
            index = build(kind, trained)
        except ValueError as error:
            if not may_be_flat or kind == "Flat":
                raise
            # after removals there may be too few vectors for what was possible once
            _log.warning("collection %r uses a flat index: %s", self._store.name, error)
            kind = "Flat"
            index = build(kind, b"")
        made: dict[str, Any] = {"kind": kind, "segments": len(index), "trained_on": trained_on}
        if not index.is_exact:
            made |= tune(index, self._samples(index, space, queries_QD))
        made["seconds"] = round(time.monotonic() - start_s, 1)
        recall = "".join(
            f", recall@10 {share:.3f} ({kind})" for kind, share in made.get("recall", {}).items()
        )
        say(f"made in {made['seconds']} s{recall}")
        return index, made

    def _samples(
        self, index: VectorIndex, space: int, queries_QD: np.ndarray | None
    ) -> dict[str, Sample]:
        """Queries as they will come: texts, and videos like the stored ones."""
        if queries_QD is not None:
            return {"given": Sample(queries_QD)}
        rng = np.random.default_rng(0)
        places_Q = rng.permutation(len(index))[:QUERIES_PER_KIND]
        samples = {"video": Sample(index.vectors_ND[places_Q], index.ids_N[places_Q])}
        texts = [np.empty((0, index.vectors_ND.shape[1]), np.float32)]
        if space == self._store.space:
            _, vectors_ND = self._store.texts()
            texts.append(vectors_ND[rng.permutation(len(vectors_ND))[:QUERIES_PER_KIND]])
        try:
            tower = QueryEncoder(self._store.folder / text_encoder_folder(space))
            if tower.dim == index.vectors_ND.shape[1]:
                texts.append(tower.embed_text(CAPTIONS))
        except (OSError, ValueError):
            pass  # without one, texts that were added are all there is
        samples["text"] = Sample(np.concatenate(texts))
        return samples

    def _begin(self, base: VectorIndex | None, last_id: int, revision: tuple[int, str]) -> None:
        """Hold what `base` holds, of `revision`, and nothing beside it."""
        self._base = base
        self._last_of_base = self._last_id = last_id
        self._seen = revision
        self._gone_N = self._newer_N = _NO_IDS
        self._newer_ND = np.empty((0, self._store.dim), np.float32)

    def _note(self, header: dict[str, Any]) -> None:
        self._kind = header.get("kind", "Flat")
        self._trained_on = header.get("trained_on", 0)

    def _put_on_gpu(self) -> None:
        """Search on the GPU, if that is wanted and possible for this kind of index."""
        if self._base is None or self._gpu is None:
            return
        try:
            self._base.use_gpu(self._gpu)
        except OSError as error:
            _log.warning("collection %r is searched on the CPU: %s", self._store.name, error)

    def _catch_up(self, revision: tuple[int, str]) -> None:
        """Bring what is held beside the base from the revision last seen to the present one.

        Ids grow and never come again: what is above the last one is new, and what was removed since
        and is not above the last one of the base was in the base.
        """
        if self._seen == revision:
            return
        if not self._store.has_revision(self._seen):
            if self._base is not None:
                self._refuse("it is not of this history of the collection (restored from a copy?)")
            self._begin(None, 0, _NO_REVISION)
        if self._last_id:
            removed_N = np.sort(self._store.removed_since(self._seen[0]))
            of_base_N = removed_N[removed_N <= self._last_of_base]
            self._gone_N = np.union1d(self._gone_N, of_base_N)
            is_kept_N = ~_is_in(self._newer_N, removed_N)
            self._newer_N = self._newer_N[is_kept_N]
            self._newer_ND = self._newer_ND[is_kept_N[: len(self._newer_ND)]]
        ids_N = self._store.segment_ids(after=self._last_id)
        all_are_held = len(self._newer_ND) == len(self._newer_N)
        num_bytes = 4 * self._store.dim * (len(self._newer_N) + len(ids_N))
        if all_are_held and len(ids_N) and num_bytes <= NEWER_SHARE * physical_memory():
            ids_N, vectors_ND = self._store.vectors(after=self._last_id)
            self._newer_ND = (
                np.concatenate([self._newer_ND, vectors_ND]) if len(self._newer_ND) else vectors_ND
            )
        self._newer_N = np.concatenate([self._newer_N, ids_N])
        self._last_id = max(self._last_id, _last(ids_N))
        self._seen = revision

    def _open(self, *, verify: Literal["small", "always"] = "small") -> None:
        """Take the base from its file, or note why not."""
        self._space = self._store.space
        self._begin(None, 0, _NO_REVISION)
        self._read, self._fault = self._file_now(), None
        if self._read is None:
            return
        try:
            try:
                base, header = _backend().load(self._file(), verify=verify)
            except FileNotFoundError:  # it was given its ordinary name just now
                base, header = _backend().load(self._path, verify=verify)
        except (OSError, ValueError) as error:
            self._refuse(str(error))
            return
        identity = self._identity()
        if {key: header.get(key) for key in identity} != identity:
            self._refuse("it belongs to another collection or model")
            return
        self._begin(base, _last(base.ids_N), (header.get("revision", -1), header.get("token", "")))
        self._note(header)
        self._put_on_gpu()

    def _refuse(self, fault: str) -> None:
        self._fault = fault
        _log.warning("%s of collection %r is not used: %s", INDEX, self._store.name, fault)

    def _difference(self) -> str | None:
        """How what is searched differs from the store; exact vectors are compared too."""
        if not np.array_equal(self.segment_ids_N, self._store.segment_ids()):
            return "its segments are not those of the collection"
        base = self._base
        for ids_N, vectors_ND in self._store.vector_blocks() if base is not None else ():
            assert base is not None
            ids_N = ids_N[: np.searchsorted(ids_N, self._last_of_base, "right")]
            held_ND = base.vectors_ND[np.searchsorted(base.ids_N, ids_N)]
            if not np.array_equal(held_ND, vectors_ND[: len(ids_N)]):
                return "its vectors are not those of the collection"
        return None

    def _identity(self) -> dict[str, str | int]:
        settings = self._store.settings()
        return {key: settings[key] for key in ("collection_id", "fingerprint", "space")}

    def _path_beside(self, space: int) -> Path:
        return self._path.with_name(f"index-{space}.faiss")

    def _file(self) -> Path:
        """Where the index of the space that serves is."""
        beside = self._path_beside(self._store.space)
        return beside if beside.exists() else self._path

    def _file_now(self) -> tuple[int, int, int] | None:
        """What tells the file from one that was put in its place; None if there is none."""
        try:
            status = os.stat(self._file())
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


def _last(ids_N: np.ndarray) -> int:
    return int(ids_N.max(initial=0))


def _is_in(ids_N: np.ndarray, among_N: np.ndarray) -> np.ndarray:
    """Which of `ids_N` are in `among_N`, which ascends; np.isin would sort both."""
    if not len(among_N):
        return np.zeros(len(ids_N), bool)
    places_N = np.minimum(np.searchsorted(among_N, ids_N), len(among_N) - 1)
    return among_N[places_N] == ids_N


def is_doubled(num_before: int, num_new: int) -> bool:
    """Whether so much has come that even who adds more should merge first."""
    return num_new > max(MERGE_SEGMENTS, num_before)


def _best(
    ids_N: np.ndarray, scores_N: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """The `num` ids that score best, their scores, and a score that no other one exceeds."""
    if len(ids_N) <= num:
        return ids_N, scores_N, -np.inf
    places_N = np.argpartition(-scores_N, num - 1)[:num]
    return ids_N[places_N], scores_N[places_N], float(scores_N[places_N].min())


def _size(num_bytes: int) -> str:
    return (
        f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{max(0.1, num_bytes / 1e6):.1f} MB"
    )


def _backend() -> "type[FaissIndex]":
    """FAISS, imported when it is needed first."""
    try:
        from .backends.faiss_index import FaissIndex
    except ImportError as error:
        raise OSError(
            "FAISS is not installed: pip install 'fluxclip[cpu]', or 'fluxclip[gpu]' for a GPU"
        ) from error
    return FaissIndex
