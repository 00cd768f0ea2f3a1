"""The stage table: what is measured adds up, changes nothing, and comes from every process."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import read
from test_processes import job, sets

from fluxclip import stages
from fluxclip.training.loop import dataset
from fluxclip.training.profile import MEASURED, OF_DATA, OF_TRAINING, WARM_UP, profile


@pytest.fixture
def tiny(changes: list[str]) -> list[str]:
    """Small steps of four pairs that are decoded each time."""
    uncached = ["data.0.cache_frames=0", "data.1.cache_frames=0"]
    small = ["data.0.batch=2", "data.1.batch=2", "flux.sides=[28,28,28]", "flux.tokens=[4,16]"]
    return [*changes, *uncached, *small]


def test_stages_share_the_time_that_went_by() -> None:
    start = time.perf_counter()
    with stages.measured() as seconds, stages.stage("other"):
        with stages.stage("forward"):
            time.sleep(0.02)
            with stages.stage("communicate"):
                time.sleep(0.03)
        assert list(stages.each("wait", range(3))) == [0, 1, 2]
        with stages.measured() as inner, stages.stage("decode"):
            time.sleep(0.01)
    whole = time.perf_counter() - start
    assert set(seconds) == {"other", "forward", "communicate", "wait"}
    assert set(inner) == {"decode"}
    assert seconds["forward"] >= 0.02 and seconds["communicate"] >= 0.03
    assert seconds["other"] >= inner["decode"] >= 0.01
    assert 0.06 <= sum(seconds.values()) <= whole


def test_what_goes_on_beside_is_counted_when_all_is_over() -> None:
    with stages.measured() as seconds:
        stages.beside("gradients", lambda: 2.0)
        stages.beside("gradients", lambda: 1.0)
        assert seconds == {}
    assert seconds == {"gradients": 3.0}


def test_the_device_is_waited_for_at_both_ends_of_a_stage() -> None:
    calls: list[None] = []
    with stages.measured(lambda: calls.append(None)), stages.stage("forward"):
        assert len(calls) == 1
    assert len(calls) == 2


def test_nothing_is_measured_unless_asked() -> None:
    assert not stages.is_measured()
    assert stages.stage("read") is stages.stage("decode")  # nothing is made for either
    stages.beside("gradients", lambda: pytest.fail("nobody wants to know"))


def test_an_error_ends_a_measurement() -> None:
    with pytest.raises(KeyError), stages.measured() as seconds, stages.stage("read"):
        raise KeyError
    assert not stages.is_measured() and set(seconds) == {"read"}


@pytest.mark.parametrize("cache_frames", [0, 8])
def test_steps_are_the_same_when_they_are_timed(changes: list[str], cache_frames: int) -> None:
    recipe = read([*changes, f"data.0.cache_frames={cache_frames}"])
    data, timed = dataset(recipe), dataset(recipe)
    timed.timed = True
    for number in range(3):
        start = time.perf_counter()
        step = timed[number]
        took = time.perf_counter() - start
        assert 0 < sum(step.seconds.values()) <= took
        assert {"collate", "other"} <= set(step.seconds) <= set(OF_DATA)
        expected = data[number]
        assert expected.seconds == {}
        for one, other in zip(expected.batches, step.batches, strict=True):
            assert torch.equal(one.frames_BTHWC, other.frames_BTHWC)
            assert replace(one, frames_BTHWC=other.frames_BTHWC) == other
        assert replace(expected, batches=()) == replace(step, batches=(), seconds={})
    if not cache_frames:
        assert set(step.seconds) == set(OF_DATA)


@pytest.mark.parametrize(
    "how", [["workers=1", "pieces=2"], ["data.0.cache_frames=8"]], ids=["worker", "cache"]
)
def test_a_profile_names_every_stage_and_leaves_nothing(
    tiny: list[str], tmp_path: Path, how: list[str]
) -> None:
    recipe = read([*tiny, *how])
    before = set(tmp_path.iterdir())
    start = time.perf_counter()
    found = profile(recipe)
    whole = time.perf_counter() - start
    assert set(tmp_path.iterdir()) == before
    assert tuple(found.training_s) == OF_TRAINING and tuple(found.data_s) == OF_DATA
    assert min(*found.training_s.values(), *found.data_s.values()) >= 0
    for stage in ("wait", "forward", "backward", "step"):
        assert found.training_s[stage] > 0, stage
    assert found.training_s["communicate"] == found.gradients_s == 0
    made_s = sum(found.data_s.values())
    if recipe.workers:
        assert min(found.data_s.values()) > 0
        assert found.warm_up == WARM_UP + 2
    else:
        # what makes a step is what is waited for
        assert found.data_s["crop"] > 0
        assert made_s <= found.training_s["wait"]
    assert found.num_steps == MEASURED and found.num_pairs == 4
    assert MEASURED * (found.step_s + found.no_data_s + found.alone_s) <= whole
    text = "\n".join(found.lines())
    for stage in (*OF_TRAINING, *OF_DATA, "training", "data", "loader alone"):
        assert f"\n  {stage} " in text or f"\n{stage} " in text, stage
    assert f"\nwith data     {4 / found.step_s:9.1f} clips/s; {found.waiting:.1%} of a" in text
    assert "gradients" not in text


def test_two_processes_measure_one_profile(tiny: list[str], tmp_path: Path) -> None:
    done = job([sets(tiny, "--profile")] * 2)
    assert [process.returncode for process in done] == [0, 0], done
    assert done[1].stdout == "" and not (tmp_path / "run").exists()
    lines = {words[0]: words for line in done[0].stdout.splitlines() if (words := line.split())}
    assert "20 steps after 3, 2 pairs a process, processes: 2, cpu" in done[0].stdout
    for stage in ("communicate", "gradients"):
        assert float(lines[stage][1]) > 0, stage
