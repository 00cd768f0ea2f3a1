"""Queries -> unit vectors, by the model of the space that serves.

Texts go through the exported text tower where there is one; the model is loaded when something
needs it: a video, an image, or a text without such a tower.
Shape legend: Q queries, N texts or files, D width.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Real
from pathlib import Path
from typing import TypeVar

import numpy as np

from fluxclip.video import is_image

from .ingest import CLIPS_PER_BATCH, Embedder, Reader, check_vectors
from .query_encoder import QueryEncoder, text_encoder_folder
from .store import Store

# A mix this much shorter than the sum of its weights points nowhere: what is left is rounding.
_LEAST_LENGTH = 1e-4
TEXTS_PER_BATCH = 256

_log = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Query:
    """One thing to look for: a text, a video, an image or a vector (D,) of any length but zero.

    weight: its share of a mix, negative for what is not wanted. Raises ValueError unless exactly
    one is given and says something.
    """

    text: str | None = None
    _: KW_ONLY
    video: str | Path | None = None
    image: str | Path | None = None
    vector: np.ndarray | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        given = (self.text, self.video, self.image, self.vector)
        if sum(part is not None for part in given) != 1:
            raise ValueError("a query is one of a text, video=, image= and vector=")
        if self.text is not None:
            if not isinstance(self.text, str) or not self.text.strip():
                raise ValueError("the query is empty: say what to look for")
            if any("\ud800" <= character <= "\udfff" for character in self.text):
                raise ValueError(f"the query is not valid Unicode text: {self.text!r}")
        if self.image is not None and not is_image(self.image):
            raise ValueError(f"{str(self.image)!r} is not an image: give a video with video=")
        is_number = isinstance(self.weight, Real) and not isinstance(self.weight, bool)
        if not is_number or not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"a weight must be a finite number and not 0, got {self.weight!r}")

    @property
    def file(self) -> str | Path | None:
        """The video or image that is to be read."""
        return self.video if self.video is not None else self.image


class ServingModel:
    """The model of the space that serves: settings, model and exported text tower, as they are now.

    model: used while the space is one of it, else the one that the collection remembers. Raises
    ValueError if it is not the one that built the collection.
    """

    def __init__(self, store: Store, model: Embedder | None = None) -> None:
        self._store = store
        self._model: Embedder | None = None
        self._text_encoder: QueryEncoder | None = None
        self._looked_for_text_encoder = False
        self._revision: tuple[int, str] | None = None  # of the settings
        self.settings = store.settings()
        if model is not None:
            self.use(model)

    def follow(self) -> None:
        """Read the settings anew; let go of what belonged to a space that serves no longer."""
        # first, so that what changes in between is noticed the next time
        if self._revision == (revision := self._store.revision()):
            return
        self._revision, settings = revision, self._store.settings()
        if settings != self.settings:
            if settings["space"] != self.settings["space"]:
                self._text_encoder, self._looked_for_text_encoder = None, False
            self.settings = settings
            if self._model is not None and not self._fits(self._model):
                self._model = None

    @property
    def is_current(self) -> bool:
        """Whether the space that was followed last is the one of the present snapshot."""
        return bool(self._store.space == self.settings["space"])

    def use(self, model: Embedder) -> None:
        """Take this model from now on. ValueError if it is not the one that built the space."""
        settings = self.settings
        if not self._fits(model):
            built_by = f"{settings['model_name']}@{settings['fingerprint'][:6]}"
            raise ValueError(
                f"collection {self._store.name!r} was built by {built_by}; "
                f"this model is {model.name}@{model.fingerprint[:6]}"
            )
        self._model = model

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> Embedder:
        """The model, loaded on first use. ValueError if it is not the one that built the space."""
        if self._model is None:
            source = self.settings["model_source"]
            try:
                model = load_embedder(source)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"collection {self._store.name!r} was built by model {source!r}, which cannot "
                    f"be loaded; open it with model=...: {error}"
                ) from error
            self.use(model)
        assert self._model is not None
        return self._model

    @property
    def text_encoder(self) -> QueryEncoder | None:
        """The exported text tower, if there is one, it is whole, and it is that of the model."""
        if not self._looked_for_text_encoder:
            self._text_encoder, self._looked_for_text_encoder = self._open_text_encoder(), True
        return self._text_encoder

    def vectors(
        self, mixes: Sequence[Sequence[Query]], *, token_budget: int | None = None
    ) -> np.ndarray:
        """Unit vectors (Q, D) float32, one per mix: the weighted sum of its queries' directions.

        token_budget: of videos and images; None for the one of the collection. Raises ValueError
        for a vector of another width, for one without direction, and for a mix that cancels.
        """
        queries = [query for mix in mixes for query in mix]
        of_texts = self._texts([query.text for query in queries if query.text is not None])
        of_files = self._files(
            [query.file for query in queries if query.file is not None], token_budget
        )
        sums = []
        for mix in mixes:
            mixed_D = np.zeros(self.settings["dim"])
            for query in mix:
                if query.vector is not None:
                    vector_D = self._given(query.vector)
                else:
                    vector_D = next(of_texts if query.text is not None else of_files)
                mixed_D += query.weight * _unit(vector_D)
            if np.linalg.norm(mixed_D) < _LEAST_LENGTH * sum(abs(query.weight) for query in mix):
                raise ValueError("the queries of the mix cancel each other: change the weights")
            sums.append(_unit(mixed_D))
        return np.array(sums, np.float32).reshape(len(mixes), self.settings["dim"])

    def _texts(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        encoder = self.text_encoder if texts else None
        for batch in _batches(texts, TEXTS_PER_BATCH):
            if encoder is not None:
                yield from encoder.embed_text(batch)
            else:
                yield from check_vectors(self.model.embed_text(batch), len(batch), self.model)

    def _files(self, paths: Sequence[str | Path], token_budget: int | None) -> Iterator[np.ndarray]:
        if token_budget is None:
            token_budget = self.settings["token_budget"]
        for batch in _batches(paths, CLIPS_PER_BATCH):
            reader = Reader.of(self.model, token_budget)
            clips = [reader.read(path) for path in batch]
            vectors_ND = self.model.embed_video(clips, token_budget=token_budget)
            yield from check_vectors(vectors_ND, len(batch), self.model)

    def _given(self, vector: np.ndarray) -> np.ndarray:
        vector_D, dim = np.asarray(vector, np.float32), self.settings["dim"]
        if vector_D.shape != (dim,):
            raise ValueError(
                f"the query vector has shape {vector_D.shape}; collection {self._store.name!r} "
                f"holds vectors of {dim} numbers"
            )
        return vector_D

    def _fits(self, model: Embedder) -> bool:
        settings = self.settings
        return (model.fingerprint, model.dim) == (settings["fingerprint"], settings["dim"])

    def _open_text_encoder(self) -> QueryEncoder | None:
        folder = self._store.folder / text_encoder_folder(self.settings["space"])
        if not folder.exists():
            return None
        try:
            encoder = QueryEncoder(folder)
            of_model = (encoder.manifest["fingerprint"], encoder.dim)
            if of_model != (self.settings["fingerprint"], self.settings["dim"]):
                raise ValueError(f"{str(folder)!r} was exported from another model")
        except (OSError, ValueError) as error:
            _log.warning(
                "collection %r: queries by text load the model: %s", self._store.name, error
            )
            return None
        return encoder


def load_embedder(model: str | Path | Embedder) -> Embedder:
    """The model that a name or folder stands for."""
    if not isinstance(model, str | Path):
        return model
    from fluxclip import load_model  # imports torch

    return load_model(model)


def as_mix(query: str | Query | Iterable[Query]) -> tuple[Query, ...]:
    """What may be searched for, as the queries of a mix; ValueError for what is none."""
    if isinstance(query, str):
        return (Query(query),)
    if isinstance(query, Query):
        return (query,)
    if not isinstance(query, Iterable):
        raise ValueError(f"a query is a text, a Query(...) or a mix of these, got {query!r}")
    mix = tuple(query)
    if not mix:
        raise ValueError("a mix needs at least one query")
    for part in mix:
        if not isinstance(part, Query):
            raise ValueError(f"a mix is of Query(...), got {part!r}")
    return mix


def check_query_budget(token_budget: int | None, mixes: Sequence[Sequence[Query]]) -> None:
    """ValueError for a number of tokens that is none, or that no query is about."""
    if token_budget is None:
        return
    if type(token_budget) is not int or token_budget < 1:
        raise ValueError(
            f"token_budget must be a whole number of tokens, 1 or more; got {token_budget!r}"
        )
    if all(query.file is None for mix in mixes for query in mix):
        raise ValueError("token_budget is about a video or image that is looked for; there is none")


def _unit(vector_D: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vector_D)
    if not np.isfinite(length) or length == 0:
        raise ValueError("the query's vector is zero or not finite: there is no direction in it")
    return vector_D / length


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for at in range(0, len(items), size):
        yield list(items[at : at + size])
