"""What a run could not read is in its folder, with kinds and reasons, whoever met it and when."""

import json
import multiprocessing
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console
from small_run import QUIET, metrics, read

from fluxclip.data.batch import Step
from fluxclip.data.faults import Fault
from fluxclip.data.loader import Steps
from fluxclip.training import checkpoint
from fluxclip.training.loop import dataset, train
from fluxclip.training.unreadable import UnreadableFiles

EMPTY = Fault("empty", "an empty file (0 bytes)")


@pytest.fixture
def broken(changes: list[str], tmp_path: Path) -> list[str]:
    """A run of four steps, two thirds of an epoch, with two broken files among its 24."""
    records = json.loads((tmp_path / "train.json").read_text())
    for index, content in ((2, b""), (9, b"no video")):
        records[index]["video"] = str(tmp_path / f"bad{index}.mp4")
        (tmp_path / f"bad{index}.mp4").write_bytes(content)
    (tmp_path / "train.json").write_text(json.dumps(records))
    return [*changes, "optimizer.steps=4", "optimizer.warmup_steps=1", "validation.every=2"]


def rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "unreadable.jsonl").read_text().splitlines()]


def test_what_could_not_be_read_is_listed_once_and_two_runs_are_alike(
    broken: list[str], tmp_path: Path
) -> None:
    with (tmp_path / "said").open("w") as said:
        run = train(read(broken), console=Console(file=said, width=1000))
    found = rows(run)
    assert {row["path"]: row["kind"] for row in found} == {
        str(tmp_path / "bad2.mp4"): "empty", str(tmp_path / "bad9.mp4"): "not a video",
    }  # fmt: skip
    assert len(found) == 2 and all(list(r) == ["step", "path", "kind", "reason"] for r in found)
    data = dataset(read(broken))
    for row in found:  # the step is the first that comes upon it
        steps = [n for n in range(4) if row["path"] in data[n].unreadable]
        assert steps[0] == row["step"]
    for row in metrics(run):
        if "loss" in row:
            assert row["unreadable"] == sum(r["step"] <= row["step"] for r in found)
    assert f"2 unreadable: 1 empty, 1 not a video; {run / 'unreadable.jsonl'} lists them" in (
        tmp_path / "said"
    ).read_text().replace("\n", " ")
    other = train(read([*broken, f"output={tmp_path / 'other'}"]), console=QUIET)
    listed = (run / "unreadable.jsonl").read_bytes()
    assert (other / "unreadable.jsonl").read_bytes() == listed
    weights = (run / "last" / "model.safetensors").read_bytes()
    assert (other / "last" / "model.safetensors").read_bytes() == weights
    # as a kill in the third step may leave it
    for path in checkpoint.states(other / "state")[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with (other / "unreadable.jsonl").open("a") as file:
        file.write('{"step": 3, "pa')
    train(read([*broken, f"output={other}"]), resume=True, console=QUIET)
    assert (other / "unreadable.jsonl").read_bytes() == listed
    assert (other / "last" / "model.safetensors").read_bytes() == weights


def test_none_may_be_unreadable(broken: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"\d of 24 files cannot be read, more than 0%: .*; mend the data, leave out what "
        r".*run/unreadable\.jsonl lists, or raise max_unreadable",
    ) as kept:
        uncached = ["data.0.cache_frames=0", "data.1.cache_frames=0", "workers=1"]
        train(read([*broken, *uncached, "max_unreadable=0"]), console=QUIET)
    # though the error, and with it what was going on, is kept
    assert kept.value and multiprocessing.active_children() == []
    assert rows(tmp_path / "run")[0]["kind"] in ("empty", "not a video")


def step_with(data: Steps, number: int, unreadable: Mapping[str, Fault]) -> Step:
    return Step(number, data.sampling.draw(0, number), (), unreadable)


def test_a_run_that_goes_on_opens_no_file_again_that_hung(
    changes: list[str], tmp_path: Path
) -> None:
    data = dataset(read(changes))
    video = str(data.sources[0].records[0].video)
    hung, said = Fault("timeout", "not read within 5 s"), []
    listed = UnreadableFiles(tmp_path, data, start=0, most=0.1)
    assert not listed and str(listed) == ""
    listed.note(step_with(data, 3, {video: hung}), say=said.append)
    listed.note(step_with(data, 5, {"b.mp4": EMPTY, video: hung}), say=said.append)
    assert said == [
        f"unreadable (timeout), another takes its place: {video}: not read within 5 s",
        "unreadable (empty), another takes its place: b.mp4: an empty file (0 bytes)",
    ]
    assert str(listed) == "1 empty, 1 timeout"
    later = dataset(read(changes))
    assert later[0].unreadable.keys() <= {"b.mp4"}
    listed = UnreadableFiles(tmp_path, later, start=5, most=0.1)
    assert listed.kinds == {video: "timeout"} and later.hopeless == {video: hung}
    met = [path for number in range(2) for path in later[number].unreadable]
    assert met == [video]  # which is whole, in truth
    assert listed.num_new(step_with(later, 5, {"b.mp4": EMPTY, video: hung})) == 1
    # what the first part met after its last state is met again
    assert [row["path"] for row in rows(tmp_path)] == [video]


def test_as_many_files_may_be_missing_as_may_be_unreadable(
    changes: list[str], tmp_path: Path
) -> None:
    records = json.loads((tmp_path / "train.json").read_text())
    records[0]["video"] = str(tmp_path / "gone.mp4")
    (tmp_path / "train.json").write_text(json.dumps(records))
    data = dataset(read(changes))
    found = {path: fault for number in range(2) for path, fault in data[number].unreadable.items()}
    assert found == {str(tmp_path / "gone.mp4"): Fault("missing", "no such file")}
    with pytest.raises(FileNotFoundError, match=r"train\.json: 1 of 16 .* not found: .*gone\.mp4"):
        dataset(read([*changes, "max_unreadable=0.06"]))


def test_files_count_once_however_many_records_they_have(
    changes: list[str], tmp_path: Path
) -> None:
    records = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(records * 3))
    assert dataset(read(changes)).num_files == 24
