"""What the tests of training share."""

from pathlib import Path

import pytest
from small_run import small_run


@pytest.fixture
def changes(tmp_path: Path, emoji: Path) -> list[str]:
    """The changes that make the demo's recipe a run of seconds in tmp_path/run."""
    return small_run(tmp_path, emoji)
