"""Ten million records: nothing walks all of them, and nothing holds a list of them."""

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fluxclip.data import sources
from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.data.order import SHUFFLED_UP_TO, permuted, place_in_epoch
from fluxclip.tokens.budget import FluxSampling

SAMPLING = FluxSampling((2, 4, 1), (28, 56, 28), (4, 64), (16, 8))
MANY = 10_000_000


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 97, 1000])
def test_computed_orders_are_permutations(size: int) -> None:
    for epoch in range(5):
        order = [permuted((0, 1, epoch), size, at) for at in range(size)]
        assert sorted(order) == list(range(size))


def test_a_large_epoch_is_a_permutation_that_looks_random() -> None:
    size = SHUFFLED_UP_TO + 3
    order = np.array([place_in_epoch((7, 0, 2), size, at) for at in range(size)])
    assert np.array_equal(np.sort(order), np.arange(size))
    # a tenth of the places have a tenth of each tenth of the records, give or take five deviations
    table, *_ = np.histogram2d(np.arange(size), order, bins=10)
    assert np.abs(table - size / 100).max() < 5 * np.sqrt(size / 100)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    # neighbours in one epoch are none in another, nor with another seed
    for seed in ((7, 0, 3), (8, 0, 2), (7, 1, 2)):
        other = np.array([place_in_epoch(seed, size, at) for at in range(2000)])
        assert (other == order[:2000]).sum() < 5
        assert abs(np.corrcoef(other, order[:2000])[0, 1]) < 0.1


def test_small_epochs_are_numpys_permutations() -> None:
    """As runs have had them since the first version: a resumed run goes on with its own."""
    order = [place_in_epoch((3, 1, 4), 1000, at) for at in range(1000)]
    assert order == np.random.default_rng([3, 1, 4]).permutation(1000).tolist()


def test_steps_of_ten_million_records_are_small() -> None:
    tracemalloc.start()
    data = Steps([Source(sources.read("synthetic", f"{MANY}?side=56"), 16)], SAMPLING, Augment(),
                 seed=0)  # fmt: skip
    assert len(pickle.dumps(data)) < 10_000
    # of twenty epochs
    seen = [
        index for step in range(0, 20 * MANY // 16, MANY // 32) for index in data.order(0, step)
    ]
    assert len(data[MANY].batches[0].captions) == 16
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6
    assert 0 <= min(seen) < MANY / 10 and MANY * 0.9 < max(seen) < MANY
    assert len(set(seen)) > 0.99 * len(seen)


def test_a_large_file_is_known_by_its_size_and_pieces(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**29)
    empty = sources.fingerprint_of_file(path)
    for place in (0, 2**29 - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        other = sources.fingerprint_of_file(path)
        assert other != empty
        empty = other
    with path.open("ab") as file:
        file.write(b"\0")
    assert sources.fingerprint_of_file(path) != empty
    assert sources.fingerprint_of_file(tmp_path / "none") == ""
