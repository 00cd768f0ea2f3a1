"""Nine coloured hearts of the emoji set, scored once by an embedder that knows colours."""

import json
from pathlib import Path

import pytest
from colour_embedder import RGB, ColourEmbedder

from fluxclip.evaluation.budgets import evaluate
from fluxclip.evaluation.protocols import RetrievalTask
from fluxclip.evaluation.protocols.annotations import read
from fluxclip.evaluation.record import Record


@pytest.fixture(scope="session")
def model() -> ColourEmbedder:
    return ColourEmbedder()


@pytest.fixture(scope="session")
def hearts(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> RetrievalTask:
    """Nine hearts, each asked for by its colour, and three clips that no colour is named for."""
    records = json.loads((emoji / "all.json").read_text(encoding="utf-8"))
    chosen = [r for r in records if r["caption"][0].removesuffix(" heart") in RGB]
    chosen += [r for r in records if r["caption"][0] in ("rainbow", "unicorn", "octopus")]
    items = [{"video": str(emoji / r["video"]), "caption": r["caption"]} for r in chosen]
    path = tmp_path_factory.mktemp("hearts") / "hearts.json"
    path.write_text(json.dumps(items))
    return read(path)


@pytest.fixture(scope="session")
def record(model: ColourEmbedder, hearts: RetrievalTask) -> Record:
    """The hearts scored at three budgets on two grids."""
    return evaluate(model, hearts, budgets=[None, 8, 2])
