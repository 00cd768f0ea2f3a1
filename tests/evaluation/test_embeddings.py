"""Vectors are shared, kept and found again; what is not the same is computed anew."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from colour_embedder import ColourEmbedder

from fluxclip.evaluation import embeddings
from fluxclip.evaluation.budgets import evaluate
from fluxclip.evaluation.embeddings import embed_texts, embed_videos
from fluxclip.evaluation.protocols import RetrievalTask
from fluxclip.evaluation.protocols.annotations import read
from fluxclip.evaluation.record import Record
from fluxclip.video import Clip, read_clip


class Counting(ColourEmbedder):
    """Counts what it is asked for, and stops after so many clips."""

    def __init__(self, stop_after: int = 10_000) -> None:
        self.num_clips = self.num_texts = 0
        self.stop_after = stop_after

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> npt.NDArray[np.float32]:
        self.num_clips += len(videos)
        if self.num_clips > self.stop_after:
            raise KeyboardInterrupt
        return super().embed_video(videos, token_budget=token_budget)

    def embed_text(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.num_texts += len(texts)
        return super().embed_text(texts)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches out of twelve clips."""
    monkeypatch.setattr(embeddings, "_CLIPS_AT_ONCE", 5)


def test_a_stopped_run_goes_on_and_a_finished_one_embeds_nothing(
    hearts: RetrievalTask, tmp_path: Path
) -> None:
    expected = embed_videos(ColourEmbedder(), hearts.videos, [None, 8])
    stopped = Counting(stop_after=14)
    with pytest.raises(KeyboardInterrupt):
        embed_videos(stopped, hearts.videos, [None, 8], cache=tmp_path)
    again = Counting()
    found = embed_videos(again, hearts.videos, [None, 8], cache=tmp_path)
    assert 0 < again.num_clips < 24
    for budget in (None, 8):
        np.testing.assert_array_equal(found[budget].vectors_ND, expected[budget].vectors_ND)
        assert found[budget].decode_s > 0 and found[budget].embed_s > 0
    idle = Counting()
    once_more = embed_videos(idle, hearts.videos, [None, 8], cache=tmp_path)
    assert idle.num_clips == 0
    assert once_more[8].embed_s == found[8].embed_s
    embed_texts(idle, hearts.texts, cache=tmp_path)
    first = idle.num_texts
    embed_texts(idle, hearts.texts, cache=tmp_path)
    assert first == idle.num_texts == 12


def test_a_changed_file_another_model_or_a_damaged_cache_is_embedded_anew(
    hearts: RetrievalTask, tmp_path: Path
) -> None:
    videos = [Path(shutil.copy(video, tmp_path / video.name)) for video in hearts.videos[:6]]
    cache = tmp_path / "vectors"
    embed_videos(ColourEmbedder(), videos, [8], cache=cache)
    shutil.copy(videos[1], videos[0])
    os.utime(videos[0], ns=(1, 1))
    model = Counting()
    changed = embed_videos(model, videos, [8], cache=cache)[8].vectors_ND
    np.testing.assert_array_equal(changed[0], changed[1])
    assert model.num_clips == 5 + 1  # its batch, and one clip to warm up; not the other batch
    other = Counting()
    other.fingerprint = "another"
    embed_videos(other, videos, [8], cache=cache)
    assert other.num_clips == 6 + 1
    for file in cache.rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(
        embed_videos(ColourEmbedder(), videos, [8], cache=cache)[8].vectors_ND, changed
    )


def test_views_are_interleaved_and_averaged(hearts: RetrievalTask, tmp_path: Path) -> None:
    model = ColourEmbedder()
    videos = hearts.videos[:3]
    found = embed_videos(model, videos, [8], num_views=3)[8].vectors_ND
    for video, vector in zip(videos, found, strict=True):
        clip = read_clip(video, num_frames=6, side=112)
        views = [Clip(clip.frames_THWC[i::3], clip.times_s[i::3]) for i in range(3)]
        mean = model.embed_video(views, token_budget=8).mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-6)


def test_what_could_not_be_read_is_tried_again(hearts: RetrievalTask, tmp_path: Path) -> None:
    videos = [Path(shutil.copy(video, tmp_path / video.name)) for video in hearts.videos[:3]]
    whole, stat = videos[1].read_bytes(), videos[1].stat()
    videos[1].write_bytes(bytes(len(whole)))
    os.utime(videos[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    cache = tmp_path / "vectors"
    assert list(embed_videos(ColourEmbedder(), videos, [8], cache=cache)[8].broken) == [1]
    videos[1].write_bytes(whole)  # as after a disk or a network drive came back
    os.utime(videos[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not embed_videos(ColourEmbedder(), videos, [8], cache=cache)[8].broken


_SHARED = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from colour_embedder import ColourEmbedder
from fluxclip import distributed
from fluxclip.evaluation import embeddings
from fluxclip.evaluation.budgets import evaluate
from fluxclip.evaluation.protocols.annotations import read
from fluxclip.evaluation.record import save_record
embeddings._CLIPS_AT_ONCE = 5
out = Path(sys.argv[3])
task = read(sys.argv[2])
with distributed.together():
    record = evaluate(ColourEmbedder(), task, budgets=[None, 8, 2], cache=out / "vectors")
    save_record(record, out / f"{distributed.rank()}.json")
    if distributed.rank() == 1:
        task = replace(task, videos=task.videos[::-1])
    try:
        evaluate(ColourEmbedder(), task)
    except ValueError as error:
        (out / f"{distributed.rank()}.txt").write_text(str(error))
    except SystemExit as stop:
        (out / f"{distributed.rank()}.txt").write_text(str(stop.code))
"""


def test_two_processes_give_the_record_of_one(
    hearts: RetrievalTask, emoji: Path, tmp_path: Path
) -> None:
    items = json.loads(hearts.sources[0].read_text())
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    items.insert(3, {"video": str(tmp_path / "broken.mp4"), "caption": "red"})
    path = tmp_path / "hearts.json"
    path.write_text(json.dumps(items))
    script = tmp_path / "shared.py"
    script.write_text(_SHARED)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(script), str(Path(__file__).parent), str(path), str(tmp_path),
        ],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = evaluate(ColourEmbedder(), read(path), budgets=[None, 8, 2])
    assert list(expected.data.broken) == [os.path.relpath(tmp_path / "broken.mp4", tmp_path)]
    for rank in (0, 1):
        record = Record.model_validate_json((tmp_path / f"{rank}.json").read_bytes())
        assert _but_for_time(record) == _but_for_time(expected)
    # when they are not at the same videos, one says so and both stop
    assert "do not see the same" in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "1.txt").read_text() == "2"


def _but_for_time(record: Record) -> dict[str, object]:
    content: dict[str, object] = json.loads(record.model_dump_json())
    for key in ("created", "embed_text_s"):
        del content[key]
    for result in content["results"]:  # type: ignore[attr-defined]
        del result["decode_s"], result["embed_s"]
    return content
