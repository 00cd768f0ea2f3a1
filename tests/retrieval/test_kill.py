"""Killed at any moment, a collection opens with every committed video and nothing half-added."""

from pathlib import Path

from kill_add import kills, look, start

from retrieval.ingest import CLIPS_PER_BATCH


def test_twenty_kills_while_all_clips_are_added(tmp_path: Path, emoji: Path) -> None:
    folder, clips = tmp_path / "cats", sorted((emoji / "clips").glob("*.mp4"))
    assert len(clips) == 734
    killed = list(kills(folder, clips, model=None, num=20, seed=0))
    assert len(killed) == 20 and killed[-1].num_after < len(clips)
    for kill in killed:
        assert kill.wrong == ()
        num_added = kill.num_after - kill.num_before
        assert num_added >= 1
        assert num_added <= kill.num_embedded <= num_added + CLIPS_PER_BATCH
    process = start(folder, emoji / "clips", None)
    process.communicate()
    assert process.returncode == 0
    assert look(folder, None) == (len(clips), [])
