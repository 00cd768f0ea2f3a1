"""A collection: a folder of searchable videos, kept by one model at one token budget.

Shape legend: N segments or texts, D width of the model's vectors.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np

from fluxclip.video import is_image

from .cache import IndexCache
from .ingest import (
    Embedder,
    Reader,
    check_vectors,
    embed_sources,
    find_sources,
    full_path,
    vector_problem,
)
from .query_encoder import FOLDER, QueryEncoder, export_text_encoder
from .store import DATABASE, MetadataValue, SegmentRow, Store, encode_metadata, now, refuse_existing

TEXTS_PER_BATCH = 256
# Scores closer than this may come out of an index in either order, by rounding in single precision.
_SCORE_ROUNDING = 1e-5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hit:
    """An answer: [start_s, end_s) of a video (an image is [0, 0)), the best with the highest score.

    id: of the segment, never reused. video: absolute path. score: cosine, -1 to 1 up to rounding.
    metadata: of the video. A hit among texts has `video` "" and the text as `metadata["text"]`;
    its id counts texts.
    """

    id: int
    video: str
    start_s: float
    end_s: float
    score: float
    metadata: dict[str, MetadataValue] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same JSON from Python, the command line and a service."""
        return asdict(self)


@dataclass(frozen=True)
class AddReport:
    """What became of the files given to `Collection.add`.

    added: number of videos that are new or had changed. skipped: number that were there already.
    failed: path -> reason. named_failed: those of `failed` that were given by themselves, not
    found in a folder or by a pattern.
    """

    added: int
    skipped: int
    failed: dict[str, str] = field(default_factory=dict)
    named_failed: tuple[str, ...] = ()


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

    def __init__(self, store: Store, model: Embedder | None = None) -> None:
        self._store = store
        self._settings = store.settings()
        self._cache = IndexCache(store)
        if model is not None:
            self.model = self._accept(model)

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        model: str | Path | Embedder,
        token_budget: int | None = None,
        window_s: float = 10.0,
    ) -> "Collection":
        """Make a new folder for videos embedded by `model`, and open it.

        model: what `fluxclip.load_model` takes, or an object with an Embedder's members.
        token_budget: tokens per segment; None for all of the model's default grid.
        window_s: videos longer than this many seconds are cut into windows of that length.
        Raises FileExistsError if the path exists, ValueError for bad settings.
        """
        folder = Path(full_path(path))
        refuse_existing(folder)  # before the model is loaded, which may take seconds
        if token_budget is not None and (type(token_budget) is not int or token_budget < 1):
            raise ValueError(
                f"a token budget must be a whole number of tokens, 1 or more; got {token_budget!r}"
            )
        if not 0 < window_s < float("inf"):
            raise ValueError(f"window_s must be more than 0 seconds, got {window_s!r}")
        embedder = _load(model)
        embedder.grid(token_budget)  # the model refuses a budget it cannot serve
        settings = {
            "collection_id": uuid4().hex,  # tells its index.faiss from another collection's
            "created_at": now(),
            "model_source": str(getattr(embedder, "source", embedder.name)),
            "model_name": embedder.name,
            "fingerprint": embedder.fingerprint,
            "dim": embedder.dim,
            "token_budget": token_budget,
            "window_s": float(window_s),
            "index": "Flat",
        }

        def export(unfinished: Path) -> None:
            try:
                export_text_encoder(embedder, unfinished / FOLDER)
            except ValueError as error:
                _log.info("collection %r: queries by text need the model: %s", folder.name, error)

        Store.create(folder, settings, beside=export)
        return cls(Store(folder), embedder)

    @classmethod
    def open(cls, path: str | Path, *, model: str | Path | Embedder | None = None) -> "Collection":
        """Open an existing collection, with the model it remembers unless one is given.

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
                model = None if source == store.settings()["model_source"] else _load(model)
            return cls(store, model)
        except BaseException:
            store.close()
            raise

    def add(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        metadata: Mapping[str, MetadataValue] | None = None,
        recursive: bool = True,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> AddReport:
        """Add files, folders and patterns (`*?[`): each video in one transaction of its own.

        A file that is there already, with the same path and content, adds nothing; one whose
        content has changed replaces its segments, under new ids. The same content under another
        path is another video. A file that fails keeps what was stored of it before. Interrupted,
        every finished video stays, and adding again goes on.

        metadata: key -> text, number or bool, for every video of this call, also for those that
        are there already; merged with what they have.
        progress: called with (videos done, videos in all, path) after each.
        Raises ValueError if no video is found, OSError if another process writes.
        """
        encode_metadata(metadata)  # refuses a bad value before any work
        sources = find_sources(_as_list(paths), recursive=recursive)
        added = skipped = 0
        failed: dict[str, str] = {}
        named_failed: list[str] = []
        with self._store.sole_writer():
            before = self._store.revision()
            finished = embed_sources(
                sources,
                known=self._store.files(),
                model=lambda: self.model,
                token_budget=self._settings["token_budget"],
                window_s=self._settings["window_s"],
            )
            with closing(finished):
                for done, source in enumerate(finished, 1):
                    if source.error is not None:
                        failed[source.path] = source.error
                        named_failed += [source.path] if source.is_named else []
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
                        added += 1
                    if progress is not None:
                        progress(done, len(sources), source.path)
            if self._store.revision() != before:
                self._refresh_cache()
        return AddReport(added, skipped, failed, tuple(named_failed))

    def add_texts(self, texts: str | Sequence[str]) -> int:
        """Add texts to be found with `search(..., target="text")`; returns how many are new."""
        wanted = list(dict.fromkeys(_as_list(texts)))
        if not all(isinstance(text, str) and text.strip() for text in wanted):
            raise ValueError("a text to add must not be empty")
        with self._store.sole_writer():
            held = {text for _, text in self._store.texts()[0]}
            new = [text for text in wanted if text not in held]
            for at in range(0, len(new), TEXTS_PER_BATCH):
                batch = new[at : at + TEXTS_PER_BATCH]
                vectors_ND = check_vectors(self.model.embed_text(batch), len(batch), self.model)
                for text, vector_D in zip(batch, vectors_ND, strict=True):
                    if problem := vector_problem(vector_D):
                        raise ValueError(
                            f"model {self.model.name!r} gave a vector that is {problem} for the "
                            f"text {text!r}"
                        )
                self._store.put_texts(batch, vectors_ND)
        return len(new)

    def search(
        self,
        text: str | None = None,
        *,
        video: str | Path | None = None,
        image: str | Path | None = None,
        vector: np.ndarray | None = None,
        k: int = 10,
        where: Mapping[str, MetadataValue] | None = None,
        group_by: Literal["video"] | None = None,
        target: Literal["video", "text"] = "video",
    ) -> list[Hit]:
        """The k best answers to one query, the best first; equal scores by id.

        Fewer than k where there are not that many. vector: (D,), any length but zero.
        where: only videos with all of this metadata, equal in type and value. group_by="video":
        only the best segment of each video. target="text": among the texts of `add_texts`.
        Raises ValueError for k below 1, and for no query, an empty one, or more than one.
        """
        if type(k) is not int or k < 1:
            raise ValueError(f"k must be a whole number, 1 or more; got {k!r}")
        if group_by not in (None, "video"):
            raise ValueError(f'group_by must be "video" or None, got {group_by!r}')
        if target not in ("video", "text"):
            raise ValueError(f'target must be "video" or "text", got {target!r}')
        if target == "text" and (where or group_by):
            raise ValueError(
                'where and group_by are about videos; they cannot go with target="text"'
            )
        encode_metadata(where)
        query_D = self._query(text, video, image, vector)
        if target == "text":
            return self._best_texts(query_D, k)
        with self._cache.snapshot():
            hits = [
                Hit(
                    row.id,
                    row.video,
                    row.start_s,
                    row.end_s,
                    score,
                    self._store.metadata(row.video_id),
                )
                for row, score in self._best_segments(query_D, k, where, group_by == "video")
            ]
        self._cache.merge_if_free()
        return hits

    def remove(
        self,
        *,
        video: str | Path | None = None,
        id: int | None = None,
        text: str | None = None,
    ) -> int:
        """Remove a video, one segment by its id, or a text; returns how many segments or texts.

        A video goes with its last segment. ValueError for what is not there.
        """
        if sum(given is not None for given in (video, id, text)) != 1:
            raise ValueError("remove takes one of video, id and text")
        with self._store.sole_writer():
            if text is not None:
                what, removed = f"text {text!r}", self._store.remove_text(text)
            elif video is not None:
                path = full_path(video)
                what, removed = f"video {path!r}", self._store.remove_video(path)
            else:
                assert id is not None
                what, removed = f"segment {id}", self._store.remove_segment(int(id))
            if not removed:
                raise ValueError(f"collection {self._store.name!r} holds no {what}")
            if text is None:
                self._refresh_cache()
        return removed

    def check(self) -> CheckReport:
        """Look at everything that is stored, and mend what a kill or a damage left of the cache."""
        problems = self._store.problems()
        if problems:  # what else is read from a damaged file says nothing
            return CheckReport(tuple(problems), (), ())
        num_bytes = 4 * self._store.dim
        for id, path, data in self._store.raw_vectors():
            wrong: str | None = f"of {len(data)} bytes instead of {num_bytes}"
            if len(data) == num_bytes:
                wrong = vector_problem(np.frombuffer(data, "<f4"))
            if wrong:
                problems.append(
                    f"the vector of segment {id} is {wrong}: remove {path!r} and add it again"
                )
        fixed: list[str] = []
        if not problems:
            try:
                fixed += self._store.remove_unfinished() + self._cache.mend()
            except OSError as error:
                problems.append(f"what is wrong beside the videos cannot be mended: {error}")
        missing = [path for path in self._store.files() if not os.path.exists(path)]
        return CheckReport(tuple(problems), tuple(fixed), tuple(missing))

    def rebuild(self, *, index: str | None = None) -> None:
        """Make `index.faiss` anew from SQLite, as another kind of index if one is given.

        index: a FAISS factory string, kept from now on. "Flat", the default of a collection,
        compares with every vector; others are approximate, but their scores are exact, and so is
        a search with `where`. ValueError for an unknown one or for too few vectors, OSError if the
        file cannot be written.
        """
        with self._store.sole_writer():
            self._cache.rebuild(index or self._store.settings()["index"], or_flat=index is None)

    def info(self) -> dict[str, Any]:
        """What it holds and how it was made, as plain values.

        text_encoder: the weights of the exported text tower, and how near its vectors are to the
        model's own; None where queries by text load the model.
        """
        settings = self._store.settings()
        hidden = ("collection_id", "model_source")
        files = [entry for entry in self._store.folder.rglob("*") if entry.is_file()]
        stated = ("weights", "lowest_cosine", "mean_cosine", "captions")
        text_encoder = self._query_encoder and {
            key: self._query_encoder.manifest[key] for key in stated
        }
        return {
            "name": self._store.name,
            "path": str(self._store.folder),
            **self._store.counts(),
            **{key: value for key, value in settings.items() if key not in hidden},
            "text_encoder": text_encoder,
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

    def _refresh_cache(self) -> None:
        """Bring the cache up to date after a write. What was committed stands if that fails."""
        try:
            self._cache.merge_if_due()
        except (OSError, ValueError) as error:
            _log.warning("collection %r: its index is not up to date: %s", self._store.name, error)

    # -- the model

    @cached_property
    def model(self) -> Embedder:
        """The model, loaded on first use. ValueError if it is not the one that built this."""
        source = self._settings["model_source"]
        try:
            model = _load(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"collection {self._store.name!r} was built by model {source!r}, which cannot be "
                f"loaded; open it with model=...: {error}"
            ) from error
        return self._accept(model)

    def _accept(self, model: Embedder) -> Embedder:
        settings = self._settings
        if (model.fingerprint, model.dim) != (settings["fingerprint"], settings["dim"]):
            built_by = f"{settings['model_name']}@{settings['fingerprint'][:6]}"
            raise ValueError(
                f"collection {self._store.name!r} was built by {built_by}; "
                f"this model is {model.name}@{model.fingerprint[:6]}"
            )
        return model

    @cached_property
    def _query_encoder(self) -> QueryEncoder | None:
        """The exported text tower, if there is one, it is whole, and it is that of the model."""
        folder = self._store.folder / FOLDER
        if not folder.exists():
            return None
        try:
            encoder = QueryEncoder(folder)
            built_by = self._settings["fingerprint"]
            if encoder.manifest["fingerprint"] != built_by or encoder.dim != self._store.dim:
                raise ValueError(f"{str(folder)!r} was exported from another model")
        except (OSError, ValueError) as error:
            _log.warning(
                "collection %r: queries by text load the model: %s", self._store.name, error
            )
            return None
        return encoder

    def _query(
        self,
        text: str | None,
        video: str | Path | None,
        image: str | Path | None,
        vector: np.ndarray | None,
    ) -> np.ndarray:
        """One query of any kind -> unit vector (D,) float32."""
        if sum(given is not None for given in (text, video, image, vector)) != 1:
            raise ValueError("search takes one query: a text, video=, image= or vector=")
        if vector is not None:
            query = np.asarray(vector, np.float32)
            if query.shape != (self._store.dim,):
                raise ValueError(
                    f"the query vector has shape {query.shape}; collection {self._store.name!r} "
                    f"holds vectors of {self._store.dim} numbers"
                )
        elif text is not None:
            if not isinstance(text, str) or not text.strip():
                raise ValueError("the query is empty: say what to look for")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"the query is not valid Unicode text: {text!r}")
            if self._query_encoder is not None:
                query = self._query_encoder.embed_text([text])[0]
            else:
                query = check_vectors(self.model.embed_text([text]), 1, self.model)[0]
        else:
            path = video if video is not None else image
            assert path is not None
            if image is not None and not is_image(path):
                raise ValueError(f"{str(path)!r} is not an image: give a video with video=")
            budget = self._settings["token_budget"]
            clip = Reader.of(self.model, budget).read(path)
            query = check_vectors(
                self.model.embed_video([clip], token_budget=budget), 1, self.model
            )[0]
        length = np.linalg.norm(query)
        if not np.isfinite(length) or length == 0:
            raise ValueError(
                "the query's vector is zero or not finite: there is no direction in it"
            )
        return query / length

    # -- ranking

    def _best_segments(
        self,
        query_D: np.ndarray,
        k: int,
        where: Mapping[str, MetadataValue] | None,
        only_best_of_video: bool,
    ) -> list[tuple[SegmentRow, float]]:
        """Candidates from the index, ranked by their exact scores, more of them until it is sure.

        Scores are computed anew from the stored vectors: equal vectors then score equally, which
        sums in single precision do not promise, and an approximate index gives exact scores.
        """
        allowed_N = self._store.segment_ids(where) if where else None
        num = 2 * k + 16
        while True:
            ids_N, bound = self._cache.nearest(query_D, num, allowed_N=allowed_N)
            ranked = self._ranked(query_D, ids_N)
            best = _first_of_each_video(ranked) if only_best_of_video else ranked
            # what was left out scores no more than the bound
            is_sure = len(best) >= k and best[k - 1][1] > bound + _SCORE_ROUNDING
            if is_sure or bound == -np.inf:
                return best[:k]
            num *= 4

    def _ranked(self, query_D: np.ndarray, ids_N: np.ndarray) -> list[tuple[SegmentRow, float]]:
        ids_N, vectors_ND = self._store.vectors(ids_N)
        rows = self._store.segments(ids_N)
        scores_N = _scores(vectors_ND, query_D)
        order = np.lexsort((ids_N, -scores_N))
        return [(rows[int(ids_N[i])], float(scores_N[i])) for i in order]

    def _best_texts(self, query_D: np.ndarray, k: int) -> list[Hit]:
        rows, vectors_ND = self._store.texts()
        scores_N = _scores(vectors_ND, query_D)
        order = np.argsort(-scores_N, kind="stable")[:k]  # rows are in the order of their ids
        return [
            Hit(rows[i][0], "", 0.0, 0.0, float(scores_N[i]), {"text": rows[i][1]}) for i in order
        ]


def _load(model: str | Path | Embedder) -> Embedder:
    """The model that a name or folder stands for."""
    if not isinstance(model, str | Path):
        return model
    from fluxclip import load_model  # imports torch

    return load_model(model)


def _as_list(given: str | Path | Sequence[Any]) -> list[Any]:
    return [given] if isinstance(given, str | Path) else list(given)


def _scores(vectors_ND: np.ndarray, query_D: np.ndarray) -> np.ndarray:
    """Inner products (N,) in double precision, each row's sum taken alike wherever it stands."""
    return (vectors_ND.astype(np.float64) * query_D).sum(axis=1)


def _first_of_each_video(
    ranked: Sequence[tuple[SegmentRow, float]],
) -> list[tuple[SegmentRow, float]]:
    first: dict[int, tuple[SegmentRow, float]] = {}
    for row, score in ranked:
        first.setdefault(row.video_id, (row, score))
    return list(first.values())
