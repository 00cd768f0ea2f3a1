"""Killed at any moment, a collection opens with all that was committed and nothing half-done."""

from pathlib import Path

from kill import OPERATIONS, kills


def test_kills_while_it_is_changed(tmp_path: Path, emoji: Path) -> None:
    """Six of the kills that `python tests/retrieval/kill.py` makes fifty of, with fewer clips."""
    clips = sorted((emoji / "clips").glob("*.mp4"))[:120]
    killed = list(kills(tmp_path / "cats", clips, num=6, seed=0, operations=OPERATIONS))
    assert [kill.operation for kill in killed] == [*OPERATIONS, *OPERATIONS[:2]]
    for kill in killed:
        assert kill.wrong == (), kill
