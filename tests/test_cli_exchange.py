"""Vectors that come and go on the command line: embed --shard, index import, export, re-embed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_cli import fluxclip, refused

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "embed.sbatch"


@pytest.fixture
def few(tmp_path: Path, emoji: Path) -> Path:
    """A folder of four clips and a file that is none."""
    folder = tmp_path / "few"
    folder.mkdir()
    for path in sorted((emoji / "clips").iterdir())[:4]:
        shutil.copy(path, folder)
    (folder / "empty.mp4").touch()
    return folder


def hits(collection: Path) -> list[dict[str, object]]:
    done = fluxclip("search", collection, "a cyclone", "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_shards_to_a_collection_to_files_to_a_collection(few: Path, tmp_path: Path) -> None:
    shards = tmp_path / "new" / "shards"
    options = ["--model", "emoji-tiny", "--output", shards, "--meta", "camera=north"]
    for was_done in (False, True):
        said = ""
        for number in range(2):
            done = fluxclip("embed", few, *options, "--shard", f"{number}/2", "--window-s", 2)
            assert done.returncode == 0, done.stderr  # what is broken was found in a folder
            assert done.stdout.rstrip().endswith("it was done already") == was_done
            said += done.stderr
        assert "not embedded: " in said and "empty.mp4" in said
    imported = tmp_path / "imported"
    done = fluxclip("index", "import", imported, shards, "--create", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["added"], report["skipped"], report["failed"]) == (4, 0, {})
    (imported / "index.faiss").write_bytes(b"damaged")
    done = fluxclip("index", "import", imported, shards)
    assert "0 videos added, 4 skipped" in done.stdout
    assert "making an index Flat of " in done.stderr
    assert [hit["metadata"] for hit in hits(imported)] == [{"camera": "north"}] * report["segments"]

    done = fluxclip("index", "export", imported, tmp_path / "exported")
    assert f"4 videos, {report['segments']} segments" in done.stdout
    copy = tmp_path / "copy"
    assert fluxclip("index", "import", copy, tmp_path / "exported", "--create").returncode == 0
    assert hits(copy) == hits(imported)
    assert pq.read_table(tmp_path / "exported").num_rows == report["segments"]

    (shards / "_shard-00001-of-00002.done").unlink()
    assert "marker" in refused("index", "import", imported, shards)
    (shards / "shard-00001-of-00002.parquet").unlink()
    done = fluxclip("index", "import", imported, shards)
    assert done.returncode == 0 and "note: " in done.stderr and "not there" in done.stderr


def test_another_budget_and_what_stands_in_its_way(few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    fluxclip("index", "create", folder, "--model", "emoji-tiny")
    fluxclip("index", "add", folder, few)
    before = hits(folder)
    gone, broken, *_ = sorted(path for path in few.iterdir() if path.stat().st_size)
    gone.rename(tmp_path / "elsewhere.mp4")
    broken.write_bytes(b"x")
    again = ["index", "re-embed", folder, "--model", "emoji-tiny", "--token-budget", 64]
    done = fluxclip(*again)
    assert done.returncode == 2
    assert "2 videos re-embedded; the old vectors of emoji-tiny serve" in done.stdout
    assert "serves now" not in done.stdout
    for path, reason in ((gone, "No such file"), (broken, "add it again")):
        assert f"not re-embedded: {path}: " in done.stderr and reason in done.stderr
    assert "--drop-failed" in done.stderr
    assert hits(folder) == before
    other = refused("index", "re-embed", folder, "--model", "emoji-tiny", "--token-budget", 32)
    assert "at 64 tokens, not by emoji-tiny" in other and "--abandon" in other
    (tmp_path / "elsewhere.mp4").rename(gone)
    done = fluxclip(*again, "--drop-failed", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["done"], list(report["failed"]), report["switched"]) == (1, [str(broken)], True)
    after = hits(folder)
    assert {hit["id"] for hit in after} == {h["id"] for h in before if h["video"] != str(broken)}
    assert "token_budget: 64" in fluxclip("index", "info", folder).stdout
    assert "nothing was under way" in fluxclip("index", "re-embed", folder, "--abandon").stdout


def test_mistakes_answer_in_one_line(few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    fluxclip("index", "create", folder, "--model", "emoji-tiny")
    embed = ["embed", few, "--model", "emoji-tiny", "--output", tmp_path / "shards"]
    assert "--shard takes i/N" in refused(*embed, "--shard", "3")
    assert "there is no shard 4/4" in refused(*embed, "--shard", "4/4")
    assert "go with --shard" in refused(*embed, "--window-s", 2)
    assert not (tmp_path / "shards").exists()
    assert "either --model or --abandon" in refused("index", "re-embed", folder)
    assert fluxclip(*embed, "--shard", "0/1").returncode == 0
    assert "takes no .npz" in refused(*embed[:-1], tmp_path / "x.npz", "--shard", "0/1")
    for added in (4, 0):  # stopped after it was made, the same command goes on
        done = fluxclip("index", "import", folder, tmp_path / "shards", "--create")
        assert done.returncode == 0 and f"{added} videos added" in done.stdout, done.stderr
    assert fluxclip("embed", few / "empty.mp4", *embed[2:], "--shard", "0/1").returncode == 2
    other = tmp_path / "other"
    fluxclip(*embed[:-1], other, "--shard", "0/1", "--window-s", 3)
    line = refused("index", "import", folder, other, "--create")
    assert "import it into a collection of its own" in line
    assert "--model goes with --create" in refused(
        "index", "import", folder, other, "--model", "emoji-tiny"
    )


def test_the_job_array_script(few: Path, tmp_path: Path) -> None:
    """With a stand-in for srun, which runs the job's one task."""
    (tmp_path / "srun").write_text(
        '#!/usr/bin/env bash\n[[ $1 == --cpus-per-task=8 ]] && exec "${@:2}"\n'
    )
    (tmp_path / "srun").chmod(0o755)
    commands = [str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]
    env = os.environ | {"PATH": os.pathsep.join(commands), "OMP_NUM_THREADS": "1"}
    env["SLURM_CPUS_PER_TASK"] = "8"
    words = ["2", str(few), "--model", "emoji-tiny", "--output", str(tmp_path / "shards")]

    def submit(number: int | None, words: list[str]) -> "subprocess.Popen[str]":
        task = {} if number is None else {"SLURM_ARRAY_TASK_ID": str(number)}
        return subprocess.Popen(
            ["bash", str(SCRIPT), *words], env=env | task, text=True, stderr=subprocess.PIPE
        )

    jobs = [submit(number, words) for number in range(2)]
    for job in jobs:
        _, err = job.communicate(timeout=240)
        assert job.returncode == 0, err
    with_rows = [
        pq.read_metadata(path).num_rows for path in (tmp_path / "shards").glob("*.parquet")
    ]
    assert len(with_rows) == 2 and sum(with_rows) >= 4
    assert len(list((tmp_path / "shards").glob("_*.done"))) == 2
    for number, mistake in ((None, words), (0, ["2"])):
        job = submit(number, mistake)
        assert "usage: sbatch" in job.communicate(timeout=60)[1] and job.returncode == 2
