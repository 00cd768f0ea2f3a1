"""What every record says of the model, the data, the cost and the machine."""

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from fluxclip.evaluation.embeddings import Embedded, EvaluatedModel
from fluxclip.evaluation.protocols import Videos
from fluxclip.evaluation.record import DataFacts, ModelFacts, TextFacts

_PACKAGES = ("fluxclip", "torch", "numpy", "av", "transformers", "open_clip_torch")


def check_budgets(budgets: Sequence[int | None]) -> list[int | None]:
    """The budgets, each once; ValueError for none at all or one below 1."""
    budgets = list(dict.fromkeys(budgets))
    if not budgets:
        raise ValueError("no token budget to evaluate at; give at least one (None is all tokens)")
    for budget in budgets:
        if budget is not None and budget < 1:
            raise ValueError(f"a token budget must be at least 1, got {budget}")
    return budgets


def broken_videos(task: Videos, embedded: Mapping[int | None, Embedded]) -> dict[str, str]:
    """Id -> reason of the videos that cannot be read at some budget; ValueError if it is all."""
    reasons = {row: why for at_budget in embedded.values() for row, why in at_budget.broken.items()}
    if len(reasons) == len(task.videos):
        raise ValueError(
            f"cannot score {task.protocol}: none of its {len(task.videos)} videos can be read; "
            f"the first: {reasons[0]}"
        )
    return {task.ids[row]: reasons[row] for row in sorted(reasons)}


def model_facts(model: EvaluatedModel) -> ModelFacts:
    """Which model it is, and what selects its tokens, where it says."""
    return ModelFacts(
        name=model.name,
        fingerprint=model.fingerprint,
        dim=model.dim,
        logit_scale=float(model.logit_scale),
        scorer=getattr(model, "scorer", None),
        filter=getattr(model, "filter", None),
        text_limit=getattr(model, "text_limit", None),
    )


def data_facts(
    task: Videos, broken: dict[str, str], model: EvaluatedModel, texts: list[str], *, clean_up: bool
) -> DataFacts:
    """What was scored, with the checksums of the annotations; `texts` are those embedded."""
    are_cut = getattr(model, "are_cut", None)
    return DataFacts(
        protocol=task.protocol,
        choices=task.choices,
        files={
            str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in task.sources
        },
        num_expected=task.num_expected,
        num_videos=len(task.videos) - len(broken),
        missing=task.missing,
        broken=broken,
        texts=TextFacts(
            num_texts=len(texts),
            num_expected=getattr(task, "num_texts_expected", None),
            num_repeated=len(texts) - len(set(texts)),
            num_cut=None if are_cut is None else sum(are_cut(texts)),
            clean_up=clean_up,
        ),
    )  # fmt: skip


def cost(model: EvaluatedModel, budget: int | None, embedded: Embedded) -> dict[str, Any]:
    """The fields of `record.Cost`."""
    num_frames, side = model.grid(budget)
    grid_tokens = model.num_tokens(num_frames, side)
    macs_of = getattr(model, "macs", None)
    macs = None if macs_of is None else macs_of(num_frames, side, budget)
    num_tokens = grid_tokens if budget is None else min(budget, grid_tokens)
    tokens_of_clips = None
    if embedded.costs_N2 is not None:
        of_read = np.delete(embedded.costs_N2, list(embedded.broken), axis=0)
        tokens_of_clips = of_read[:, 0].round().astype(int).tolist()
        num_tokens, macs = of_read.mean(0).round().astype(int).tolist()
    return {
        "token_budget": budget,
        "num_tokens": num_tokens,
        "tokens_of_clips": tokens_of_clips,
        "grid_tokens": grid_tokens,
        "num_frames": num_frames,
        "side": side,
        "macs": macs,
        "decode_s": embedded.decode_s,
        "embed_s": embedded.embed_s,
    }


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(model: EvaluatedModel) -> dict[str, str]:
    """Versions, machine and the model's device; nothing is imported to find them."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    found["machine"] = f"{platform.system()} {platform.machine()}"
    found["cpus"] = str(os.cpu_count())
    found["device"] = getattr(model, "device_name", "unknown")
    return found
