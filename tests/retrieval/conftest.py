"""Real clips and a collection of them."""

from pathlib import Path

import pytest
from layout_embedder import LayoutEmbedder

from retrieval import Collection, database


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests in which one writer holds up another need not wait long to see it."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.2)


@pytest.fixture(scope="session")
def embedder() -> LayoutEmbedder:
    return LayoutEmbedder()


@pytest.fixture(scope="session")
def clips(emoji: Path) -> list[Path]:
    """Twenty clips of a few seconds, sorted."""
    return sorted((emoji / "clips").glob("*.mp4"))[:20]


@pytest.fixture(scope="session")
def film(assets: Path) -> Path:
    """24 seconds, 24 frames a second."""
    return assets / "film" / "film_720p.mp4"


@pytest.fixture
def many_windows(tmp_path: Path, embedder: LayoutEmbedder) -> Collection:
    """An empty collection that cuts even clips of a few seconds."""
    return Collection.create(tmp_path / "windows", model=embedder, window_s=0.5)


@pytest.fixture
def cats(tmp_path: Path, embedder: LayoutEmbedder) -> Collection:
    """An empty collection."""
    return Collection.create(tmp_path / "cats", model=embedder, window_s=5.0)
