"""Several processes train as one: the same pairs, losses and weights, and states that move."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from small_run import DEMO, metrics, small_run

from fluxclip import load_model
from fluxclip.data import loader
from fluxclip.training import checkpoint
from fluxclip.training.loop import dataset
from fluxclip.training.recipe import read

STEPS = 4


@pytest.fixture
def short(tmp_path: Path, emoji: Path) -> list[str]:
    """Four steps with drop path on: what it draws does not depend on the number of processes."""
    return [
        *small_run(tmp_path, emoji),
        f"optimizer.steps={STEPS}", "optimizer.warmup_steps=1", "validation.every=2",
        "model.drop_path=0.2", "save_minutes=0",
    ]  # fmt: skip


def start(of_each: Sequence[Sequence[str]]) -> list[subprocess.Popen[str]]:
    """Start `fluxclip train` in as many processes as there are lists of changes, as one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank, words in enumerate(of_each):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(of_each)),
            "LOCAL_WORLD_SIZE": str(len(of_each)), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "fluxclip.cli", "train", str(DEMO), *words]
        running.append(
            subprocess.Popen(
                command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    return running


def job(of_each: Sequence[Sequence[str]]) -> list[subprocess.CompletedProcess[str]]:
    """The processes of `start` when they have ended."""
    done = []
    for process in start(of_each):
        out, err = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def sets(changes: Sequence[str], *more: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)] + list(more)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


def forget_from(run: Path, step: int) -> None:
    """Leave the run as one that was killed before it saved the state of `step`."""
    for path in checkpoint.states(run / "state"):
        if int(path.name.removeprefix("step-")) >= step:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


def test_two_processes_are_one_run_and_their_states_move(short: list[str], tmp_path: Path) -> None:
    records = json.loads((tmp_path / "train.json").read_text())
    for i in (3, 11):  # one that each process comes upon in its first steps, and its neighbour not
        records[i]["video"] = str(tmp_path / f"bad{i}.mp4")
        (tmp_path / f"bad{i}.mp4").write_text("no video")
    (tmp_path / "train.json").write_text(json.dumps(records))
    alone, two = ([*short, f"output={tmp_path / name}"] for name in ("alone", "two"))
    (one,) = job([sets(alone)])
    assert one.returncode == 0, one.stderr
    both = job([sets(two)] * 2)
    assert [done.returncode for done in both] == [0, 0], both
    # what is said and written comes from one of them
    assert str(tmp_path / "two" / "best") in both[0].stdout
    assert both[1].stdout == both[1].stderr == ""
    for i in (3, 11):
        assert one.stderr.count(f"bad{i}.mp4") == both[0].stderr.count(f"bad{i}.mp4") == 1
    expected = losses(tmp_path / "alone")
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=2e-4)
    weights = [load_model(tmp_path / name / "last").model.state_dict() for name in ("alone", "two")]
    for name, tensor in weights[0].items():
        assert (weights[1][name] - tensor).abs().max() < 2e-3, name
    # so has DeepSpeed
    zero = [*short, f"output={tmp_path / 'zero'}", "engine=deepspeed"]
    assert [done.returncode for done in job([sets(zero)] * 2)] == [0, 0]
    assert losses(tmp_path / "zero") == pytest.approx(expected, abs=2e-4)
    # a state of one goes on in two, one of two alone, and one of DeepSpeed without it
    for name, processes in (("alone", 2), ("two", 1), ("zero", 1)):
        forget_from(tmp_path / name, STEPS)
        again = job([sets([*short, f"output={tmp_path / name}"], "--resume")] * processes)
        assert [done.returncode for done in again] == [0] * processes, again
        assert len(losses(tmp_path / name)) == STEPS
        assert losses(tmp_path / name) == pytest.approx(expected, abs=2e-4)


def test_processes_share_the_pairs_of_one(short: list[str]) -> None:
    recipe = read(DEMO, short)
    whole = dataset(recipe)
    parts = [
        loader.Steps(
            whole.sources, whole.sampling, whole.augment, seed=whole.seed, rank=r, world_size=2
        )
        for r in range(2)
    ]
    for number in range(3):
        expected = sorted(c for batch in whole[number].batches for c in batch.captions)
        shared = [c for part in parts for batch in part[number].batches for c in batch.captions]
        assert sorted(shared) == expected
        frames = whole[number].batches[0].frames_BTHWC
        first, second = (part[number].batches[0].frames_BTHWC for part in parts)
        assert (frames[: len(first)] == first).all() and (frames[len(first) :] == second).all()


def test_what_is_wrong_in_one_process_stops_all_with_one_line(
    short: list[str], tmp_path: Path
) -> None:
    cases = [
        (
            [sets(short), sets(short, "--set", "optimizer.lr=1e-4")],
            "have different recipes or files: 'lr =",
        ),
        ([sets(short, "--set", "data.1.batch=5")] * 2, "data.1.batch, 5 pairs a step, is not shar"),
        ([sets([*short, f"output={tmp_path / 'val.json' / 'run'}"])] * 2, "val.json is no folder"),
    ]
    for of_each, message in cases:
        done = job(of_each)
        assert [process.returncode for process in done] == [2, 2]
        assert message in done[0].stderr and done[0].stderr.count("\n") == 1
        assert done[1].stderr == ""
        assert not (tmp_path / "run").exists()


def until_saved(processes: list[subprocess.Popen[str]], run: Path) -> None:
    while not (run / "state" / "step-1").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_a_signal_to_one_process_stops_all_alike(short: list[str], tmp_path: Path) -> None:
    both = start([sets([*short, "optimizer.steps=1000"])] * 2)
    try:
        until_saved(both, tmp_path / "run")
        both[1].send_signal(signal.SIGTERM)
        ended = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [143, 143], ended
    assert "--resume goes on from there" in ended[0][1]
    last = int(checkpoint.states(tmp_path / "run" / "state")[-1].name.removeprefix("step-"))
    assert len(losses(tmp_path / "run")) == last


def test_a_process_that_dies_ends_the_job(short: list[str], tmp_path: Path) -> None:
    """Killed outright, it can tell nobody; the other one ends within a minute and says so."""
    both = start([sets([*short, "optimizer.steps=1000"])] * 2)
    try:
        until_saved(both, tmp_path / "run")
        both[1].kill()
        _, said = both[0].communicate(timeout=60)
    finally:
        for process in both:
            process.kill()
    assert both[0].returncode == 2
    assert said.splitlines()[-1].startswith("fluxclip: another process of this job has ended")
    assert "Traceback" not in said
    saved = checkpoint.states(tmp_path / "run" / "state")[-1]
    assert checkpoint.read_progress(saved).step >= 1
