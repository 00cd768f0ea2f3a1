"""Losses, gradients and memory of 1, 2 and 4 processes against one process with all pairs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_ranks import CHUNKS, FOLDER, PAIRS, ROWS, TYPES, WORLDS, Towers, pairs

from fluxclip import plugins

OBJECTIVES = plugins.available(FOLDER)
Found = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Found]]:
    """What each rank of each world found, as loss_ranks.py writes it."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("loss_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        for world in WORLDS
    }


def test_captions_recur_across_the_ranks_of_every_world() -> None:
    for world in WORLDS[1:]:
        labels = [{int(x) for x in pairs(rank, world)[2].flatten()} for rank in range(world)]
        assert any(labels[0] & other for other in labels[1:])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("negatives", ["local", "full"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ranks_have_the_loss_and_gradients_of_one_process(
    worlds: dict[int, list[Found]], objective: str, negatives: str, chunk: int
) -> None:
    towers = Towers(objective)
    loss, parts = towers(pairs(), "local")
    loss.backward()
    expected = {"loss": loss.detach()}
    for name, part in parts.items():
        expected[f"part {name}"] = part.double()
    for name, parameter in towers.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-4
        expected[f"gradient {name}"] = parameter.grad
    for ranks in worlds.values():
        for found in ranks:
            mean = found[f"step/{objective}/{negatives}/{chunk}"]
            torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("negatives", ["local", "full"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_memory_grows_by_the_gathered_vectors_only(
    worlds: dict[int, list[Found]], objective: str, negatives: str
) -> None:
    def growth(logits: int) -> int:
        two, four = (worlds[w][0][f"peak/{objective}/{negatives}/{logits}"] for w in (2, 4))
        return four - two

    # a row added is some 20 numbers: vectors, gradients, labels, sums; a column of logits is ROWS
    assert growth(ROWS**2) < 2 * ROWS * 8 * 64
    assert growth(2**40) > 2 * ROWS * 8 * ROWS


@pytest.mark.parametrize("number_type", TYPES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_gathered_rows_are_in_rank_order_and_gradients_are_summed(
    worlds: dict[int, list[Found]], world: int, number_type: torch.dtype
) -> None:
    ranks = [found[f"gather_rows/{number_type}"] for found in worlds[world]]
    rows = torch.cat([rank["x"] for rank in ranks])
    summed = torch.stack([rank["weight"] for rank in ranks]).sum(0)
    for number, rank in enumerate(ranks):
        assert torch.equal(rank["y"], rows)
        assert rank["y"].dtype == number_type
        if number_type.is_floating_point:
            assert torch.equal(rank["gradient"], summed.chunk(world)[number])
        else:
            assert rank["gradient"] is None


@pytest.mark.parametrize("number_type", TYPES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_exchanged_blocks_go_to_their_rank_and_gradients_come_back(
    worlds: dict[int, list[Found]], world: int, number_type: torch.dtype
) -> None:
    ranks = [found[f"exchange_rows/{number_type}"] for found in worlds[world]]
    for number, rank in enumerate(ranks):
        blocks = [other["x"].chunk(world)[number] for other in ranks]
        assert torch.equal(rank["y"], torch.cat(blocks))
        if number_type.is_floating_point:
            weights = [other["weight"].chunk(world)[number] for other in ranks]
            assert torch.equal(rank["gradient"], torch.cat(weights))


def test_chunks_of_the_test_divide_the_captions_and_do_not() -> None:
    sizes = {chunk // rows for chunk in CHUNKS[1:] for rows in (PAIRS, PAIRS // 2, PAIRS // 4)}
    assert any(PAIRS % size == 0 for size in sizes)
    assert any(PAIRS % size for size in sizes)
    assert max(sizes) <= PAIRS
