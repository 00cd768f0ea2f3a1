"""wandb on request: the real package, offline; nothing about it stops a run."""

import json
import sys
from pathlib import Path

import pytest
import wandb
from small_run import QUIET, metrics, read
from test_processes import forget_from

from fluxclip.training.loop import train
from fluxclip.training.wandb_log import WandbLog


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb as on a machine that has no account, its files in tmp_path."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for kind in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "wandb"))


def logged(run: Path) -> list[bytes]:
    """What each start of a run wrote for wandb, in order."""
    (name,) = {path.name for path in run.glob("wandb/offline-run-*/*.wandb")}
    assert name == f"run-{(run / 'wandb-id').read_text()}.wandb"
    return [path.read_bytes() for path in sorted(run.glob("wandb/offline-run-*/*.wandb"))]


@pytest.mark.usefixtures("offline")
def test_numbers_and_bad_files_are_logged_and_a_resumed_run_goes_on(
    changes: list[str], tmp_path: Path
) -> None:
    records = json.loads((tmp_path / "train.json").read_text())
    records[0]["video"] = str(tmp_path / "bad.mp4")
    (tmp_path / "bad.mp4").write_text("no video")
    (tmp_path / "train.json").write_text(json.dumps(records))
    recipe = read(
        [
            *changes, "optimizer.steps=4", "optimizer.warmup_steps=1", "validation.every=2",
            "wandb=clips",
        ]
    )  # fmt: skip
    run = train(recipe, console=QUIET)
    steps = [row for row in metrics(run) if "loss" in row]
    # sixteen clips, eight a step: the second step has come upon the bad one
    assert [row["unreadable"] for row in steps][1:] == [1, 1, 1]
    (whole,) = logged(run)
    for key in (b"clips", b"contrast_1", b"unreadable", b"gradient_norm", b"val_mrr", b"budgets"):
        assert key in whole, key
    forget_from(run, 4)
    train(recipe, resume=True, console=QUIET)
    assert [row["step"] for row in metrics(run) if "loss" in row] == [0, 1, 2, 3]
    assert [row["unreadable"] for row in metrics(run) if "loss" in row][2:] == [1, 1]
    first, second = logged(run)
    assert first == whole and b"contrast_1" in second


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_what_goes_wrong_is_said_once_and_stops_nothing(tmp_path: Path, when: str) -> None:
    said: list[str] = []
    if when == "at the start":
        (tmp_path / "wandb-id").write_text("no/id?")
    log = WandbLog("clips", folder=tmp_path, settings={})
    log.start(say=said.append)
    if when == "later":
        assert said.pop() == f"wandb: offline, kept in {tmp_path / 'wandb'} for `wandb sync`"
        log.log(0, {"loss": 2.0})
        wandb.teardown()  # what takes the numbers is gone
    for number in (1, 2):
        log.log(number, {"loss": 1.0})
    log.end(None, None, None)
    (line,) = said
    assert line.startswith("wandb: ") and line.endswith("; the run goes on without it")


def test_a_recipe_that_wants_it_where_it_is_not_is_refused(
    changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read([*changes, "wandb=clips"])
    monkeypatch.setattr(sys, "path", [])  # where installed packages are looked for
    with pytest.raises(ValueError, match=r"not installed: pip install 'fluxclip\[wandb\]'"):
        train(recipe, console=QUIET)
    assert not (tmp_path / "run").exists()
