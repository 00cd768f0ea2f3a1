"""The order of an epoch: every record once, computed place by place."""

import numpy as np
import pytest

from fluxclip.data.order import SHUFFLED_UP_TO, Groups, permuted, place_in_epoch


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


def test_an_order_by_groups_has_every_record_and_few_groups_at_a_time() -> None:
    sizes = np.random.default_rng(0).integers(1, 60, 40)
    groups = Groups(np.cumsum([0, *sizes]))
    group_of = np.repeat(np.arange(40), sizes)
    epochs = []
    for epoch in range(3):
        order = [
            place_in_epoch((5, 0, epoch), len(group_of), at, groups=groups)
            for at in range(len(group_of))
        ]
        assert sorted(order) == list(range(len(group_of)))
        used = group_of[order]
        first = np.array([np.argmax(used == group) for group in range(40)])
        last = len(used) - 1 - np.array([np.argmax(used[::-1] == group) for group in range(40)])
        at_once = [np.sum((first <= at) & (last >= at)) for at in range(len(used))]
        # those of a turn, and at its ends those of the next or the last one
        assert max(at_once) <= 4 + 3
        assert np.mean(used[:-1] != used[1:]) > 0.5
        epochs.append(order)
    assert epochs[0] != epochs[1] != epochs[2]
