"""Runs that were stopped, by a kill, a signal or a full disk, and go on as if they never had."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_run import DEMO, QUIET, metrics, read, small_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fluxclip import cli
from fluxclip.training import checkpoint
from fluxclip.training.loop import train
from fluxclip.training.signals import StopSignals

STEPS = 9  # four and a half epochs of the clips
TIMINGS = ("seconds", "clips_per_s", "tokens_per_s", "data_share", "memory_gib")


def short(folder: Path, emoji: Path) -> list[str]:
    """Nine steps with all that is random on; a state after every step."""
    return [
        *small_run(folder, emoji),
        f"optimizer.steps={STEPS}", "optimizer.warmup_steps=2", "validation.every=4",
        "model.drop_path=0.2", "save_minutes=0",
    ]  # fmt: skip


def hashes(folder: Path, *names: str) -> dict[str, str]:
    """SHA-256 of the tensors in folders, by default those of the models best/ and last/."""
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name in names or ("best", "last")
        for path in (folder / name).glob("*.safetensors")
    }


def numbers(run: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says, timings aside."""
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in metrics(run)]


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.states(run / "state")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads before a break as after it, and no waiting for a second core that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return train(read(short(folder, emoji)), console=QUIET)


class Trigger(io.StringIO):
    """A console's file that sends this process a signal when `word` is written."""

    def __init__(self, word: str, *numbers: int) -> None:
        super().__init__()
        self.word, self.numbers = word, numbers

    def write(self, text: str) -> int:
        if self.word in text:
            for number in self.numbers:
                os.kill(os.getpid(), number)
        return super().write(text)


def test_a_killed_run_ends_with_the_same_weights(
    tmp_path: Path, emoji: Path, uninterrupted: Path
) -> None:
    changes, run = short(tmp_path, emoji), tmp_path / "run"
    sets = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-m", "fluxclip.cli", "train", str(DEMO), *sets]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        while not (run / "state" / "step-3").exists() and process.poll() is None:
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= steps_of(run)[-1] < STEPS
    at_kill = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert at_kill.get("lr", 1) > 0
    train(read(changes), resume=True, console=QUIET)
    assert hashes(run) == hashes(uninterrupted)
    assert numbers(run) == numbers(uninterrupted)


def test_signals_save_the_step_and_leave(tmp_path: Path, emoji: Path, uninterrupted: Path) -> None:
    """Stopped twice, once by each signal, with no state but those of the signals."""
    changes, run = [*short(tmp_path, emoji), "save_minutes=1e6"], tmp_path / "run"
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said = Trigger("pairs", signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        train(read(changes), console=Console(file=said))
    assert stop.value.code == 143
    assert steps_of(run) == [1]
    assert "stopped after step 1 of 9; --resume goes on from there" in said.getvalue()
    said = Trigger("step 4:", signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(read(changes), resume=True, console=Console(file=said))
    assert steps_of(run) == [1, 4]
    assert "resumed after step 1 of 9" in said.getvalue()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    train(read(changes), resume=True, console=QUIET)
    assert hashes(run) == hashes(uninterrupted)
    assert numbers(run) == numbers(uninterrupted)
    # tensorboard, too, shows each step once
    logged = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in logged] == list(range(STEPS))


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, emoji: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        said = Trigger("pairs", signal.SIGINT, signal.SIGINT)
        train(read(short(tmp_path, emoji)), console=Console(file=said))
    assert steps_of(tmp_path / "run") == []


def before_the_last_step(uninterrupted: Path, run: Path) -> None:
    """Make `run` what the uninterrupted one was when a step was left."""
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "last")
    shutil.rmtree(run / "state" / f"step-{STEPS}")


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before, inside = signal.getsignal(signal.SIGINT), []

    def run() -> None:
        with StopSignals() as stop:
            inside.append((signal.getsignal(signal.SIGINT), stop.received))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [(before, None)]


def test_a_kill_between_state_and_logs_leaves_no_trace(
    tmp_path: Path, emoji: Path, uninterrupted: Path
) -> None:
    """Logs ahead of the state, a torn line, half a state: what a kill at a bad moment leaves."""
    changes, run = short(tmp_path, emoji), tmp_path / "run"
    before_the_last_step(uninterrupted, run)
    (run / "state" / f".step-{STEPS}.partial").mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "sec')
    train(read(changes), resume=True, console=QUIET)
    assert hashes(run) == hashes(uninterrupted)
    assert numbers(run) == numbers(uninterrupted)
    assert sorted(path.name for path in (run / "state").iterdir()) == ["step-8", "step-9"]


def test_a_finished_run_stays_as_it_is(uninterrupted: Path, emoji: Path) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in sorted(uninterrupted.rglob("*"))}

    before, said = files(), io.StringIO()
    recipe = read(short(uninterrupted.parent, emoji))
    assert train(recipe, resume=True, console=Console(file=said, soft_wrap=True)) == uninterrupted
    assert said.getvalue() == f"{uninterrupted} is finished\n"
    assert files() == before


def fluxclip(*arguments: object, stderr: io.StringIO) -> int:
    """The command's exit code, run in this process."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(stderr):
        patch.setattr(sys, "argv", ["fluxclip", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop, redirect_stdout(io.StringIO()):
            cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes_of_the_command(tmp_path: Path, emoji: Path, number: int, code: int) -> None:
    sets = [word for change in short(tmp_path, emoji) for word in ("--set", change)]
    said = Trigger("pairs", number)
    assert fluxclip("train", DEMO, *sets, stderr=said) == code
    assert "--resume goes on from there" in said.getvalue()
    assert steps_of(tmp_path / "run") == [1]


def refused(changes: list[str], *options: str) -> str:
    """The one line that a mistake answers, with exit code 2; what else was said is no error."""
    sets = [word for change in changes for word in ("--set", change)]
    said = io.StringIO()
    assert fluxclip("train", DEMO, *sets, *options, stderr=said) == 2
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("fluxclip: ")]
    assert "Traceback" not in said.getvalue()
    return line.removeprefix("fluxclip: ")


def test_what_cannot_be_resumed_is_said(tmp_path: Path, emoji: Path, uninterrupted: Path) -> None:
    changes, run = short(tmp_path, emoji), tmp_path / "run"
    (run / "best").mkdir(parents=True)
    assert "holds a model but no saved state" in refused(changes, "--resume")
    (run / "best").rmdir()
    shutil.copy(uninterrupted / "recipe.toml", run)
    assert "continue it with --resume" in refused(changes)
    shutil.copytree(uninterrupted / "state", run / "state")
    shutil.rmtree(run / "state" / f"step-{STEPS}")
    other = refused([*changes, "optimizer.lr=1e-9", "data.1.batch=3"], "--resume")
    assert "optimizer.lr was 0.0015 and is 1e-09; data.1.batch was 4 and is 3" in other
    annotations = tmp_path / "stills.json"
    records = json.loads(annotations.read_text())
    annotations.write_text(json.dumps(records[1:]))
    assert "the file of data.1.annotations has changed" in refused(changes, "--resume")


def test_a_run_that_had_saved_nothing_starts_over(
    tmp_path: Path, emoji: Path, uninterrupted: Path
) -> None:
    changes, run = short(tmp_path, emoji), tmp_path / "run"
    run.mkdir()
    shutil.copy(uninterrupted / "recipe.toml", run)
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 7.0}\n')
    train(read(changes), resume=True, console=QUIET)
    assert numbers(run) == numbers(uninterrupted)


def test_sigterm_before_the_first_step_is_no_request_to_resume(tmp_path: Path, emoji: Path) -> None:
    changes = short(tmp_path, emoji)
    sets = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-X", "importtime", "-m", "fluxclip.cli", "train", str(DEMO), *sets]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:  # torch is loaded next, which takes seconds
            if line.endswith(" fluxclip.distributed\n"):
                process.terminate()
                break
        process.stderr.read()
    assert process.returncode == 1
    assert not (tmp_path / "run").exists()


def test_a_state_of_another_model_is_refused(
    tmp_path: Path, emoji: Path, uninterrupted: Path
) -> None:
    changes, run = short(tmp_path, emoji), tmp_path / "run"
    before_the_last_step(uninterrupted, run)
    path = run / "state" / "step-8" / "tensors.safetensors"
    tensors = load_file(path)
    tensors["parameters/stranger"] = tensors.pop("exp_avg/model.log_scale")
    save_file(tensors, path)
    line = refused(changes, "--resume")
    assert "missing exp_avg/model.log_scale; unexpected parameters/stranger" in line
    path.write_bytes(path.read_bytes()[:-100])
    assert "delete that folder to continue from the one before" in refused(changes, "--resume")


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk says, without root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("share", "named"), [(0.9, "last"), (1.1, f"state/step-{STEPS}")])
def test_a_disk_that_is_full(
    tmp_path: Path, emoji: Path, uninterrupted: Path, share: float, named: str
) -> None:
    """One line names the folder; what was saved before is whole, and the run goes on from it."""
    changes, run = short(tmp_path, emoji), tmp_path / "run"
    before_the_last_step(uninterrupted, run)
    before = hashes(run / "state", "step-8")
    size = (uninterrupted / "last" / "model.safetensors").stat().st_size
    with files_limited_to(int(share * size)):
        line = refused(changes, "--resume")
    assert f"cannot write {run / named}: File too large" in line
    assert hashes(run / "state", "step-8") == before
    assert steps_of(run) == [8]
    assert not list(run.rglob("*.partial"))
    train(read(changes), resume=True, console=QUIET)
    assert hashes(run) == hashes(uninterrupted)
