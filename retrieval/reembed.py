"""Another model for a collection: new vectors grow beside the old ones, which serve until the end.

Everything that is stored keeps its ids, times and metadata; only vectors are made, in the staged
space of the store. What is committed stays: killed, it goes on where it was. One transaction then
lets the new space serve, whose text tower and index are there already.
Shape legend: N segments, D width.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fluxclip.video import Cutting

from .cache import IndexCache
from .ingest import (
    Embedder,
    Source,
    embed_sources,
    embed_texts,
    is_there_or_gone_alone,
    settings_of_model,
)
from .query_encoder import FOLDER, export_text_encoder, text_encoder_folder
from .store import Store

SEGMENTS_PER_COMMIT = 256
_SEGMENTS_PER_LOOK = 4096
_TEXTS_PER_COMMIT = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReEmbedReport:
    """What `Collection.re_embed` did.

    done: number of videos that got vectors in this call. failed: path -> reason. switched: whether
    the new model serves; with videos that failed it does not, unless they were to be dropped.
    """

    done: int
    failed: dict[str, str] = field(default_factory=dict)
    switched: bool = True


def re_embed(
    store: Store,
    cache: IndexCache,
    model: Embedder,
    *,
    token_budget: int | None,
    drop_failed: bool,
    progress: Callable[[int, int, str], None] | None,
) -> ReEmbedReport:
    """Give all that is stored vectors by `model`, and let these serve; for the only writer.

    See `Collection.re_embed`.
    """
    model.grid(token_budget)  # the model refuses a budget it cannot serve
    _clean(store)
    if not _stage(store, model, token_budget):
        return ReEmbedReport(0)
    while batch := store.unstaged_texts(_TEXTS_PER_COMMIT):
        vectors_ND = embed_texts(model, [text for _, text in batch])
        store.put_staged_texts([id for id, _ in batch], vectors_ND)
    done, failed, by_model = _embed_segments(store, model, token_budget, progress)
    if failed and not drop_failed:
        return ReEmbedReport(done, failed, switched=False)
    if failed:
        _refuse_to_drop(store, failed, by_model)
    staged = store.staged()
    assert staged is not None
    _export_tower(store, model, staged["space"])
    cache.build_beside(staged["space"])
    store.switch_space(removing=list(failed))
    try:
        cache.adopt()
        _clean(store)
    except OSError as error:  # the next call, or check, does it
        _log.warning("collection %r: what served before is still there: %s", store.name, error)
    return ReEmbedReport(done, failed)


def abandon(store: Store, cache: IndexCache) -> bool:
    """Give up the vectors that were made so far, for the only writer; False if there are none."""
    if store.staged() is None:
        return False
    store.drop_staged()
    cache.adopt()
    _clean(store)
    return True


def mend(store: Store) -> list[str]:
    """Remove what a killed re-embedding left; says what was done.

    While another process writes, that one may still need it: then nothing is done.
    """
    if not (store.old_tables() or _old_folders(store)):
        return []
    try:
        with store.sole_writer(wait_s=0):
            return [f"{name} was removed: a killed process left it" for name in _clean(store)]
    except BlockingIOError:
        return []


def _clean(store: Store) -> list[str]:
    """Remove vectors and text towers that neither serve nor will; says what these were."""
    names = store.old_tables()
    store.drop_old_spaces()
    for folder in _old_folders(store):
        shutil.rmtree(folder)
        names.append(folder.name)
    return names


def _old_folders(store: Store) -> list[Path]:
    staged = store.staged()
    kept = {text_encoder_folder(space) for space in (store.space, (staged or {}).get("space", 0))}
    # those with a dot are of exports that were killed
    ours = re.compile(rf"{FOLDER}(-\d+)?|\.{FOLDER}(-\d+)?\..*")
    entries = store.folder.glob(f"*{FOLDER}*")
    return sorted(path for path in entries if ours.fullmatch(path.name) and path.name not in kept)


def _stage(store: Store, model: Embedder, token_budget: int | None) -> bool:
    """Begin, or go on with what was begun; False if this model serves already."""
    wanted = settings_of_model(model, token_budget)
    staged = store.staged()
    if staged is None:
        if _same(store.settings(), wanted):
            return False
        store.stage_space(wanted)
    elif not _same(staged, wanted):
        raise ValueError(
            f"collection {store.name!r} is being re-embedded by {_said(staged)}, not by "
            f"{_said(wanted)}: go on with that one, or give it up first (--abandon)"
        )
    return True


def _refuse_to_drop(store: Store, failed: Mapping[str, str], by_model: Sequence[str]) -> None:
    """Raise ValueError where anything else than the files themselves may be to blame."""
    if by_model:
        raise ValueError(
            f"{by_model[0]}: {failed[by_model[0]]}{_and_more(by_model)}; that is not the fault of "
            "a file, so nothing was dropped and nothing switched"
        )
    if store.num_unstaged_videos() == store.counts()["videos"]:
        raise ValueError(
            f"not one video of collection {store.name!r} could be read "
            f"({next(iter(failed))}{_and_more(list(failed))}), so none was dropped: "
            "is the disk mounted?"
        )
    if lost := [path for path in failed if not is_there_or_gone_alone(path)]:
        raise ValueError(
            f"{lost[0]}{_and_more(lost)}: the folder is not there, empty or cannot be looked into, "
            "so nothing was dropped: is the disk mounted? If it is, remove them (index remove)"
        )


def _and_more(paths: Sequence[str]) -> str:
    return f" and {len(paths) - 1} more" if len(paths) > 1 else ""


def _embed_segments(
    store: Store,
    model: Embedder,
    token_budget: int | None,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[int, dict[str, str], list[str]]:
    """Embed what has no vector in the staged space.

    Number of videos done; which failed, with reasons; those of them that failed by the model.
    """
    total = store.num_unstaged_videos()
    failed: dict[str, str] = {}
    by_model: list[str] = []
    ids_of: dict[str, list[int]] = {}  # of videos on their way
    ids: list[int] = []
    vectors: list[np.ndarray] = []

    def commit() -> None:
        if ids:
            store.put_staged(ids, np.stack(vectors))
        ids.clear()
        vectors.clear()

    finished = embed_sources(
        _unstaged(store, ids_of),
        known=store.files(),
        model=lambda: model,
        token_budget=token_budget,
        cutting=Cutting(),  # nothing is cut
    )
    with closing(finished):
        for num, source in enumerate(finished, 1):
            ids_of_source = ids_of.pop(source.path)
            if source.error is not None:
                failed[source.path] = source.error
                by_model += [source.path] if source.is_models_fault else []
            else:
                ids += ids_of_source
                vectors += source.vectors
            if len(ids) >= SEGMENTS_PER_COMMIT or num == total:
                commit()
            if progress is not None:
                progress(num, total, source.path)
    commit()
    return total - len(failed), failed, by_model


def _unstaged(store: Store, ids_of: dict[str, list[int]]) -> Iterator[Source]:
    """The videos that lack vectors, with the segments in question; their ids go into `ids_of`."""
    source: Source | None = None
    after = None
    while rows := store.unstaged_segments(_SEGMENTS_PER_LOOK, after=after):
        for row in rows:
            if source is None or source.path != row.video:
                if source is not None:
                    yield source
                source = Source(row.video)
                ids_of[row.video] = []
            source.segments.append((row.start_s, row.end_s))
            ids_of[row.video].append(row.id)
        after = rows[-1]
    if source is not None:
        yield source


def _export_tower(store: Store, model: Embedder, space: int) -> None:
    """Write the text tower of the new model to where it is looked for once it serves."""
    folder = store.folder / text_encoder_folder(space)
    if folder.exists():  # of a call that was killed after it
        shutil.rmtree(folder)
    try:
        export_text_encoder(model, folder)
    except ValueError as error:
        _log.info("collection %r: queries by text need the model: %s", store.name, error)


def _same(settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(settings[key] == wanted[key] for key in ("fingerprint", "dim", "token_budget"))


def _said(settings: Mapping[str, Any]) -> str:
    budget = settings["token_budget"]
    name = f"{settings['model_name']}@{settings['fingerprint'][:6]}"
    return f"{name} at {'all' if budget is None else budget} tokens"
