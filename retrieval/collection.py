"""A collection: a folder of searchable videos, kept by one model at one token budget.

Shape legend: N segments or texts, D width of the model's vectors.
"""

import logging
import os
import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from operator import index as whole_number
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np

from fluxclip.video import Cutting

from . import exchange, reembed
from .backends import Gpu
from .cache import INDEX, IndexCache, is_doubled
from .conditions import MetadataValue, Where, encode_metadata
from .database import DATABASE, refuse_existing
from .index_choice import AUTO, Wish, as_queries
from .ingest import (
    Embedder,
    embed_sources,
    embed_texts,
    find_sources,
    full_path,
    gone_below,
    settings_of_model,
    vector_problem,
)
from .queries import TEXTS_PER_BATCH, Query, ServingModel, as_mix, check_query_budget, load_embedder
from .query_encoder import FOLDER, export_text_encoder
from .search import Hit, Searcher, Wanted
from .store import Store, now

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AddReport:
    """What became of the files given to `Collection.add`.

    added: number of videos that are new or had changed. skipped: number that were there already.
    failed: path -> reason. named_failed: those of `failed` that were given by themselves, not
    found in a folder or by a pattern. moved: old path -> new path. missing: videos stored from the
    folders given whose file is gone; they stay searchable unless `prune` removed them.
    """

    added: int
    skipped: int
    failed: dict[str, str] = field(default_factory=dict)
    named_failed: tuple[str, ...] = ()
    moved: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """What `Collection.check` found.

    problems: damage that it cannot mend. fixed: what was wrong with the cache, or left unfinished
    by killed processes, and is not any more.
    missing_files: videos whose file is gone; they stay searchable.
    """

    problems: tuple[str, ...]
    fixed: tuple[str, ...]
    missing_files: tuple[str, ...]


class Collection:
    """Videos that can be searched by text, video, image or vector.

    Made by `create` or `open`; a context manager. `len` is the number of segments. SQLite is the
    truth, `index.faiss` a cache that may be deleted. Use it from the thread that opened it; other
    processes may search meanwhile, one at a time may write. What needs the model loads it when it
    is first needed: adding new files and texts, and queries by video or image. Queries by text are
    answered by the text tower that `create` exports into the folder, where the model has one that
    can be: without loading it, and for everyone alike.
    """

    def __init__(
        self, store: Store, model: Embedder | None = None, *, gpu: Gpu | None = None
    ) -> None:
        self._store = store
        self._serving = ServingModel(store, model)
        self._cache = IndexCache(store, gpu=gpu)
        self._searcher = Searcher(store, self._cache)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        model: str | Path | Embedder,
        token_budget: int | None = None,
        cut: Literal["windows", "shots"] = "windows",
        window_s: float = 10.0,
        stride_s: float | None = None,
    ) -> "Collection":
        """Make a new folder for videos embedded by `model`, and open it.

        model: what `fluxclip.load_model` takes, or an object with an Embedder's members.
        token_budget: tokens per segment; None for all of the model's default grid.
        cut: longer videos are cut into windows of `window_s` seconds, one every `stride_s` (None:
        `window_s`, without overlap), or into their "shots", and only shots longer than `window_s`
        into windows. "shots" needs the extra of that name and reads videos from end to end.
        Raises FileExistsError if the path exists, ValueError for bad settings.
        """
        folder = Path(full_path(path))
        refuse_existing(folder)  # before the model is loaded, which may take seconds
        if token_budget is not None and (type(token_budget) is not int or token_budget < 1):
            raise ValueError(
                f"a token budget must be a whole number of tokens, 1 or more; got {token_budget!r}"
            )
        cutting = Cutting(cut, float(window_s), None if stride_s is None else float(stride_s))
        cutting.check_installed()
        embedder = load_embedder(model)
        embedder.grid(token_budget)  # the model refuses a budget it cannot serve
        settings = {
            "collection_id": uuid4().hex,  # tells its index.faiss from another collection's
            "created_at": now(),
            **settings_of_model(embedder, token_budget),
            **asdict(cutting),
            "index": AUTO,
        }

        def export(unfinished: Path) -> None:
            try:
                export_text_encoder(embedder, unfinished / FOLDER)
            except ValueError as error:
                _log.info("collection %r: queries by text need the model: %s", folder.name, error)

        Store.create(folder, settings, beside=export)
        return cls(Store(folder), embedder)

    @classmethod
    def create_for(
        cls,
        path: str | Path,
        files: str | Path | Sequence[str | Path],
        *,
        model: str | Path | Embedder | None = None,
    ) -> "Collection":
        """Make a new, empty folder into which `import_shards` can put these files, and open it.

        model: the one that made their vectors, from where the files say it was unless given.
        Raises what `create` does, and ValueError for files that were not all made in one way, for
        another model, or one that is not there.
        """
        folder = Path(full_path(path))
        refuse_existing(folder)  # before the model is loaded, which may take seconds
        about = exchange.settings_of(_as_list(files))
        source = about["model_source"] if model is None else model
        try:
            embedder = load_embedder(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the model {source!r} that made these files cannot be loaded; give it with "
                f"model=... (--model): {error}"
            ) from error
        if embedder.fingerprint != about["fingerprint"]:
            raise ValueError(
                f"these files were made by {about['model_name']}@{about['fingerprint'][:6]}; "
                f"this model is {embedder.name}@{embedder.fingerprint[:6]}"
            )
        settings = ("token_budget", "cut", "window_s", "stride_s")
        return cls.create(folder, model=embedder, **{key: about[key] for key in settings})

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model: str | Path | Embedder | None = None,
        gpu: Gpu | None = None,
    ) -> "Collection":
        """Open an existing collection, with the model it remembers unless one is given.

        gpu: search on a copy of the index on this GPU, counted from 0, or shared among "all";
        `index.faiss` stays what it is. OSError if FAISS can use none.
        Raises FileNotFoundError if there is no such folder, ValueError if it is no collection or
        was built by another model. Where there is no right to write, nobody else may write either
        while it is open: it is read as a file that does not change.
        """
        folder = Path(full_path(path))
        if not folder.exists():
            raise FileNotFoundError(f"there is no collection {str(folder)!r}: create it first")
        if not (folder / DATABASE).is_file():
            raise ValueError(f"{str(folder)!r} is not a collection: it holds no {DATABASE}")
        store = Store(folder)
        try:
            if isinstance(model, str | Path):
                # the remembered one need not be loaded to be known as the right one
                source = os.path.abspath(model) if os.path.isdir(model) else str(model)
                model = None if source == store.settings()["model_source"] else load_embedder(model)
            return cls(store, model, gpu=gpu)
        except BaseException:
            store.close()
            raise

    def add(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        metadata: Mapping[str, MetadataValue] | None = None,
        recursive: bool = True,
        prune: bool = False,
        progress: Callable[[int, int, str], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> AddReport:
        """Add files, folders and patterns (`*?[`): each video in one transaction of its own.

        A file that is there already, with the same path and content, adds nothing; one whose
        content has changed replaces its segments, under new ids. The same content under another
        path is another video, unless the file that was stored is gone: then that one has moved,
        and keeps its ids and metadata. A file that fails keeps what was stored of it before.
        Interrupted or killed, every finished video stays, and adding again goes on; a power cut
        may take the last ones away, whole.

        metadata: key -> text, number or bool, for every video of this call, also for those that
        are there already; merged with what they have.
        prune: remove the videos that are reported as `missing`. Of a folder that is gone or empty,
        or in which no video is found, none is missing: its disk may not be mounted.
        progress: called with (videos done, videos in all, path) after each.
        say: called with a line before the index is made anew, and after it: when the segments have
        doubled since, and at the end where much has come or gone, also in calls that were killed.
        Raises ValueError if no video is found, OSError if another process writes.
        """
        encode_metadata(metadata)  # refuses a bad value before any work
        given = _as_list(paths)
        sources = find_sources(given, recursive=recursive)
        added = skipped = 0
        failed: dict[str, str] = {}
        named_failed: list[str] = []
        moved: dict[str, str] = {}
        with self._store.sole_writer(), self._store.flushed_at_the_end():
            self._serving.follow()
            settings = self._serving.settings
            known = self._store.files()
            num_merged, num_new = len(self), 0
            finished = embed_sources(
                sources,
                known=known,
                model=lambda: self.model,
                token_budget=settings["token_budget"],
                cutting=Cutting.of(settings),
            )
            with closing(finished):
                for done, source in enumerate(finished, 1):
                    if source.error is not None:
                        failed[source.path] = source.error
                        named_failed += [source.path] if source.is_named else []
                    elif source.moved_from is not None:
                        moved[source.moved_from] = source.path
                        self._store.move_video(
                            source.moved_from, source.path, source.state, metadata
                        )
                    elif not source.segments:
                        self._store.touch_video(source.path, source.state, metadata)
                        skipped += 1
                    else:
                        self._store.put_video(
                            source.path,
                            source.state,
                            source.duration_s,
                            source.segments,
                            np.stack(source.vectors),
                            metadata,
                        )
                        source.vectors = []  # `sources` keeps it, not its vectors
                        added += 1
                        num_new += len(source.segments)
                    if progress is not None:
                        progress(done, len(sources), source.path)
                    if is_doubled(num_merged, num_new):
                        self._refresh_cache(say)
                        num_merged, num_new = num_merged + num_new, 0
            missing = gone_below(given, sources, known.keys() - moved, recursive=recursive)
            if prune and missing:
                self._store.remove_videos(missing)
            self._refresh_cache(say)
        return AddReport(added, skipped, failed, tuple(named_failed), moved, tuple(sorted(missing)))

    def add_texts(self, texts: str | Sequence[str]) -> int:
        """Add texts to be found with `search(..., target="text")`; returns how many are new."""
        wanted = list(dict.fromkeys(_as_list(texts)))
        if not all(isinstance(text, str) and text.strip() for text in wanted):
            raise ValueError("a text to add must not be empty")
        with self._store.sole_writer():
            self._serving.follow()
            held = self._store.known_texts(wanted)
            new = [text for text in wanted if text not in held]
            for at in range(0, len(new), TEXTS_PER_BATCH):
                batch = new[at : at + TEXTS_PER_BATCH]
                self._store.put_texts(batch, embed_texts(self.model, batch))
        return len(new)

    def search(
        self,
        text: str | None = None,
        *,
        video: str | Path | None = None,
        image: str | Path | None = None,
        vector: np.ndarray | None = None,
        mix: Sequence[Query] | None = None,
        k: int = 10,
        offset: int = 0,
        where: Where | None = None,
        min_score: float | None = None,
        group_by: Literal["video"] | None = None,
        merge_gap_s: float | None = None,
        target: Literal["video", "text"] = "video",
        token_budget: int | None = None,
    ) -> list[Hit]:
        """The k best answers to one query, the best first; equal scores by id.

        Fewer than k where there are not that many. vector: (D,), any length but zero. mix: queries
        with weights; their directions are added up, negative weights lead away.
        offset: leave out so many of the best, for the next page. While the collection does not
        change, pages neither overlap nor leave out, up to the approximations of its index.
        min_score: only these cosines and higher ones.
        where: only videos whose metadata is as said here; see `retrieval.conditions.where_sql`.
        merge_gap_s: hits of one video that overlap or are at most so many seconds apart become
        one, with the id and score of the best, and others take their places in the list; what
        ranks below the k-th is not looked at. Not with offset. group_by="video": only the best hit
        of each video.
        target="text": among the texts of `add_texts`.
        token_budget: of a video or image that is looked for; None for the one of the collection.
        Raises ValueError for k below 1, for no query, an empty one, or more than one, for a mix
        that cancels, and for a token_budget without video or image.
        """
        given = [part for part in (text, video, image, vector, mix) if part is not None]
        if len(given) != 1:
            raise ValueError("search takes one query: a text, video=, image=, vector= or mix=")
        query = Query(text, video=video, image=image, vector=vector) if mix is None else mix
        [hits] = self.search_many(
            [query],
            k=k,
            offset=offset,
            where=where,
            min_score=min_score,
            group_by=group_by,
            merge_gap_s=merge_gap_s,
            target=target,
            token_budget=token_budget,
        )
        return hits

    def search_many(
        self,
        queries: Sequence[str | Query | Sequence[Query]],
        *,
        k: int = 10,
        offset: int = 0,
        where: Where | None = None,
        min_score: float | None = None,
        group_by: Literal["video"] | None = None,
        merge_gap_s: float | None = None,
        target: Literal["video", "text"] = "video",
        token_budget: int | None = None,
    ) -> list[list[Hit]]:
        """What `search` answers to each query: texts, `Query`s or mixes of them.

        They are embedded together, and all are answered from one state of the collection.
        """
        wanted = Wanted(k, offset, where, min_score, group_by, merge_gap_s, target)
        if isinstance(queries, str):
            raise ValueError("search_many takes a list of queries; search takes one")
        mixes = [as_mix(query) for query in queries]
        check_query_budget(token_budget, mixes)
        # texts need no index
        snapshot = self._store.snapshot if target == "text" else self._cache.snapshot
        while True:
            self._serving.follow()
            vectors_QD = self._serving.vectors(mixes, token_budget=token_budget)
            with snapshot():
                # not if another process has switched to another model since
                if self._serving.is_current:
                    hits = self._searcher.hits(vectors_QD, wanted)
                    break
        if target == "video":
            self._cache.merge_if_free()
        return hits

    def remove(
        self,
        *,
        video: str | Path | Sequence[str | Path] | None = None,
        id: int | Sequence[int] | None = None,
        text: str | Sequence[str] | None = None,
    ) -> int:
        """Remove videos, segments by their ids, or texts; returns how many segments or texts.

        A video goes with its last segment. Of a list all are removed in one step, or none:
        ValueError for what is not there.
        """
        if sum(given is not None for given in (video, id, text)) != 1:
            raise ValueError("remove takes one of video, id and text")
        with self._store.sole_writer():
            if text is not None:
                texts = _as_list(text)
                self._refuse_unknown("text", texts, self._store.known_texts(texts))
                return self._store.remove_texts(texts)
            if video is not None:
                paths = [full_path(path) for path in _as_list(video)]
                self._refuse_unknown("video", paths, self._store.files(paths))
                removed = self._store.remove_videos(paths)
            else:
                assert id is not None
                ids = _as_ids(id)
                stored = np.array([one for one in ids if 0 < one < 2**63], np.int64)
                self._refuse_unknown("segment", ids, self._store.segments(stored))
                removed = self._store.remove_segments(ids)
            self._refresh_cache()
        return removed

    def _refuse_unknown(self, what: str, given: Sequence[Any], held: Container[Any]) -> None:
        unknown = [one for one in given if one not in held]
        if unknown:
            more = f", nor {len(unknown) - 1} more of those given" if unknown[1:] else ""
            raise ValueError(
                f"collection {self._store.name!r} holds no {what} {unknown[0]!r}{more}"
            )

    def backup(self, folder: str | Path) -> None:
        """Copy the collection as it is now into a new folder, which `open` opens.

        Nobody has to wait for it, and it is whole, whoever writes meanwhile. Raises
        FileExistsError if the path exists, OSError if it cannot be written.
        """
        self._store.backup(Path(full_path(folder)), beside=self._copy_caches)

    def _copy_caches(self, folder: Path) -> None:
        """Copy the index and the text towers; called before SQLite is copied, and after it.

        The index before: one that is newer than the rest would not be used. Towers after it too:
        another model may have been switched to.
        """
        index = self._store.folder / INDEX
        if index.is_file() and not (folder / DATABASE).exists():
            shutil.copyfile(index, folder / INDEX)
        for tower in self._store.folder.glob(f"{FOLDER}*"):
            copy = folder / tower.name
            if not copy.exists():
                try:
                    shutil.copytree(tower, copy)
                except (FileNotFoundError, shutil.Error):  # removed meanwhile: no longer needed
                    shutil.rmtree(copy, ignore_errors=True)

    def check(self) -> CheckReport:
        """Look at everything that is stored, and mend what a kill or a damage left of the cache."""
        problems = self._store.problems()
        if problems:  # what else is read from a damaged file says nothing
            return CheckReport(tuple(problems), (), ())
        with self._store.snapshot():
            num_bytes = 4 * self._store.dim
            for id, path, data in self._store.raw_vectors():
                wrong: str | None = f"of {len(data)} bytes instead of {num_bytes}"
                if len(data) == num_bytes:
                    wrong = vector_problem(np.frombuffer(data, "<f4"))
                if wrong:
                    problems.append(
                        f"the vector of segment {id} is {wrong}: remove {path!r} and add it again"
                    )
            try:
                self._store.texts()
            except ValueError as error:
                problems.append(str(error))
        fixed: list[str] = []
        if not problems:
            try:
                fixed += self._store.remove_unfinished() + self._cache.mend()
                fixed += reembed.mend(self._store)
            except (OSError, ValueError) as error:
                problems.append(f"what is wrong beside the videos cannot be mended: {error}")
        missing = [path for path in self._store.files() if not os.path.exists(path)]
        return CheckReport(tuple(problems), tuple(fixed), tuple(missing))

    def rebuild(
        self,
        index: str | None = None,
        *,
        memory_limit: int | None = None,
        latency_ms: float | None = None,
        queries: np.ndarray | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Make `index.faiss` anew from SQLite, as another kind of index if one is given.

        index: "auto", the default of a collection, which chooses by the number of segments, see
        `retrieval.index_choice`, or a FAISS factory string; kept from now on. "Flat" compares with
        every vector; others are approximate, but their scores are exact, and so is a search with
        `where`. How far they look is chosen so that 97 % of the ten best are found, by the texts
        and vectors of the collection or by queries (Q, D) of your own; `info` says what was found.
        memory_limit: bytes that vectors are to take while they are searched, latency_ms: of one
        search; both for "auto", and kept until index="auto" is given without them.
        say: called with a line before the work, on the memory it takes, and one after it.
        ValueError for an unknown index or for too few vectors, OSError if there is too little
        memory or the file cannot be written; then the index is as it was.
        """
        limits = {"memory_limit": memory_limit, "latency_ms": latency_ms}
        given: dict[str, Any] = {key: one for key, one in limits.items() if one is not None}
        with self._store.sole_writer():
            wish = None
            if index is not None:
                wish = Wish(index, **given)
            elif given:
                wish = replace(self._cache.wish, **given)
            self._cache.rebuild(
                wish,
                queries_QD=None if queries is None else as_queries(queries, self._store.dim),
                say=say or _log.info,
            )

    def re_embed(
        self,
        model: str | Path | Embedder,
        *,
        token_budget: int | None = None,
        drop_failed: bool = False,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> reembed.ReEmbedReport:
        """Replace the vectors by those of another model, or of the same one at another budget.

        Every segment and text keeps its id, times and metadata. Until all of them have their new
        vectors the old ones serve; then the new model does, at once, also in other processes that
        have this collection open. Interrupted, it goes on where it was when it is called with the
        same model and budget; see `abandon_re_embed`. With the model that serves it does nothing.

        model, token_budget: as of `create`. drop_failed: a video whose file is gone, has changed
        or cannot be read is removed at the switch; without it there is no switch then.
        progress: called with (videos done, videos in all, path) after each.
        Raises ValueError if one by another model or budget is under way; with drop_failed also if
        the model gave a vector that is none, no video could be read, or a folder of videos is not
        there or empty (its disk may not be mounted), with nothing dropped. OSError if another
        process writes.
        """
        embedder = load_embedder(model)
        with self._store.sole_writer():
            report = reembed.re_embed(
                self._store,
                self._cache,
                embedder,
                token_budget=token_budget,
                drop_failed=drop_failed,
                progress=progress,
            )
        self._serving.follow()
        if report.switched:
            self._serving.use(embedder)
        return report

    def abandon_re_embed(self) -> bool:
        """Give up the vectors of a `re_embed` that was interrupted; False if there is none."""
        with self._store.sole_writer():
            return reembed.abandon(self._store, self._cache)

    def import_shards(
        self,
        files: str | Path | Sequence[str | Path],
        *,
        progress: Callable[[int, int, str], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> exchange.ImportReport:
        """Store videos with vectors that `embed_shard` or `export_shards` wrote.

        A video that is there with the same path and content adds nothing but metadata under keys
        that it lacks; one whose content has changed replaces its segments, unless the file that is
        stored has a later time. Nothing is removed. So it may be interrupted and
        called again. Segments get new ids, but a collection that never held any takes over those
        of the first export that it imports, also when that is imported again.

        files: Parquet files, or folders of them; in folders only those with a marker that says that
        they are finished. A damaged one is reported, the others are imported.
        progress: called with (segments done, segments in all, file) on the way.
        say: called with a line before the index is made anew, and after it.
        Raises ValueError for files of another model, budget or cutting, and for a folder with
        shards of arrays of two sizes, before anything is stored.
        """
        with self._store.sole_writer():
            report = exchange.import_shards(self._store, _as_list(files), progress=progress)
            self._refresh_cache(say)
        return report

    def export_shards(
        self,
        folder: str | Path,
        *,
        rows_per_file: int = exchange.ROWS_PER_FILE,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> exchange.ExportReport:
        """Write everything into Parquet files in a new folder, as it is at one moment.

        A row is a segment: id, video, times, metadata as JSON, vector; the texts of `add_texts` are
        in a file of their own. `import_shards` reads them, as does anything that reads Parquet.

        rows_per_file: a file that has so many ends with its last video.
        progress: called with (segments done, segments in all, path) on the way.
        Raises FileExistsError if there is something under that name.
        """
        return exchange.export_shards(
            self._store, folder, rows_per_file=rows_per_file, progress=progress
        )

    def info(self) -> dict[str, Any]:
        """What it holds and how it was made, as plain values.

        text_encoder: the weights of the exported text tower, and how near its vectors are to the
        model's own; None where queries by text load the model.
        """
        settings = self._store.settings()
        hidden = ("collection_id", "ids_of", "model_source", "space")
        files = [entry for entry in self._store.folder.rglob("*") if entry.is_file()]
        stated = ("weights", "lowest_cosine", "mean_cosine", "captions")
        self._serving.follow()
        tower = self._serving.text_encoder
        text_encoder = tower and {key: tower.manifest[key] for key in stated}
        return {
            "name": self._store.name,
            "path": str(self._store.folder),
            **self._store.counts(),
            **{key: value for key, value in settings.items() if key not in hidden},
            "text_encoder": text_encoder,
            "index_file": self._cache.describe(),
            "size_bytes": sum(entry.stat().st_size for entry in files),
        }

    def close(self) -> None:
        """Let go of the files. Nothing is lost without it."""
        self._store.close()

    def __enter__(self) -> "Collection":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._store.counts()["segments"]

    def __repr__(self) -> str:
        return f"Collection({str(self._store.folder)!r})"

    def _refresh_cache(self, say: Callable[[str], None] | None = None) -> None:
        """Bring the cache up to date after a write. What was committed stands if that fails."""
        try:
            self._cache.merge_if_due(say=say or _log.info)
        except (OSError, ValueError) as error:
            _log.warning("collection %r: its index is not up to date: %s", self._store.name, error)

    @property
    def model(self) -> Embedder:
        """The model, loaded on first use. ValueError if it is not the one that built this."""
        self._serving.follow()
        return self._serving.model


def _as_list(given: str | Path | Sequence[Any]) -> list[Any]:
    return [given] if isinstance(given, str | Path) else list(given)


def _as_ids(given: int | Sequence[int]) -> list[int]:
    try:
        ids = [given] if isinstance(given, int | np.integer) else list(given)
        if isinstance(given, str):
            raise TypeError
        return [whole_number(one) for one in ids]
    except TypeError as error:
        raise ValueError(f"an id is a whole number, got {given!r}") from error
