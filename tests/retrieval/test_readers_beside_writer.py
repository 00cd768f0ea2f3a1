"""Readers of other processes see one revision each, whatever the writer does."""

from pathlib import Path

from readers_beside_writer import run


def test_every_answer_is_that_of_an_exact_search(tmp_path: Path, emoji: Path) -> None:
    """A short one of what `python tests/retrieval/readers_beside_writer.py` does for a minute."""
    total = run(tmp_path / "cats", seconds=3, num_readers=3, clips=emoji / "clips")
    assert total["wrong"] == []
    assert total["writes"] > 0 and total["compared_without_snapshot"] > 0
