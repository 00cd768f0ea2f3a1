"""scripts/train.sbatch, run with stand-ins for Slurm's own commands."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from small_run import DEMO, metrics, small_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.sbatch"

# one process per task with the variables that Slurm sets, a signal passed on to all of them, and
# the highest exit code of them at the end
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 9
shift
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
echo $$ > "$SLURM_FAKE/srun.pid"
highest=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
  ((code > highest)) && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$SLURM_FAKE/scontrol.txt"
if [[ $1 == show ]]; then echo localhost; fi
"""


def submit(folder: Path, words: list[str], *, restarts: int = 0) -> subprocess.Popen[str]:
    """Run the script as one job of two tasks on this machine."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "srun.pid").unlink(missing_ok=True)
    commands = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    env = os.environ | {
        "PATH": os.pathsep.join(commands),
        "SLURM_FAKE": str(folder), "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_RESTART_COUNT": str(restarts), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(SCRIPT), *words], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def end(job: subprocess.Popen[str]) -> None:
    """Leave nothing of the job, its tasks included."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)


def finished(job: subprocess.Popen[str]) -> tuple[str, str]:
    """What a job said that ended by itself, and well."""
    try:
        said = job.communicate(timeout=240)
    finally:
        end(job)
    assert job.returncode == 0, said
    return said


def test_a_job_that_is_stopped_queues_itself_and_goes_on(tmp_path: Path, emoji: Path) -> None:
    changes = [*small_run(tmp_path, emoji), "save_minutes=0", "validation.every=1000"]
    words = [str(DEMO), *(word for change in changes for word in ("--set", change))]
    job = submit(tmp_path, words)
    try:
        while not list((tmp_path / "run" / "state").glob("step-*")):
            assert job.poll() is None, job.communicate()
            time.sleep(0.05)
        os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
        said = job.communicate(timeout=240)
    finally:
        end(job)
    assert job.returncode == 143, said
    assert (tmp_path / "scontrol.txt").read_text().splitlines()[-1] == f"requeue {os.getpid()}"
    done = len(metrics(tmp_path / "run"))
    assert 0 < done < 40
    again = submit(tmp_path, words, restarts=1)
    said = finished(again)
    assert "resumed after step" in said[1]
    assert len([row for row in metrics(tmp_path / "run") if "loss" in row]) == 40
    assert "requeue" not in (tmp_path / "scontrol.txt").read_text().splitlines()[-1]


def test_a_restart_before_the_first_state_starts_the_run(tmp_path: Path, emoji: Path) -> None:
    changes = [*small_run(tmp_path, emoji), "optimizer.steps=2", "optimizer.warmup_steps=1"]
    words = [str(DEMO), *(word for change in changes for word in ("--set", change))]
    job = submit(tmp_path, words, restarts=1)
    finished(job)
    assert len([row for row in metrics(tmp_path / "run") if "loss" in row]) == 2


def test_a_wrong_recipe_ends_the_job_for_good(tmp_path: Path) -> None:
    job = submit(tmp_path, [str(tmp_path / "none.toml")])
    _, err = job.communicate(timeout=120)
    assert job.returncode == 2 and "no recipe" in err
    assert "requeue" not in (tmp_path / "scontrol.txt").read_text()
    assert submit(tmp_path, []).wait(timeout=60) == 2
