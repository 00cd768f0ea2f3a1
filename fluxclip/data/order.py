"""The order of an epoch: a permutation of the records, known from its seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np
import numpy.typing as npt

SHUFFLED_UP_TO = 100_000  # records; a shuffled list of ten million takes 80 MB in every process
_ROUNDS = 6
_OPEN = 4  # groups in use at a time


@dataclass(frozen=True, eq=False)
class Groups:
    """Records that lie together, far away: group g is those from starts_G1[g] to starts_G1[g + 1].

    An order that keeps to groups needs few of them at a time.
    """

    starts_G1: npt.NDArray[np.int64]


def place_in_epoch(seed: Sequence[int], size: int, at: int, *, groups: Groups | None = None) -> int:
    """Which of `size` records comes at place `at` of an epoch: a permutation for each seed.

    With groups, it is one in which each place is far from few of its own group.
    """
    if groups is not None:
        return grouped_epoch(tuple(seed), groups).record(at)
    if size <= SHUFFLED_UP_TO:
        return int(_shuffled(tuple(seed), size)[at])
    return permuted(seed, size, at)


@lru_cache(maxsize=16)
def _shuffled(seed: tuple[int, ...], size: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(size)


class GroupedEpoch:
    """An epoch in which at most `_OPEN` groups are in use at a time.

    Groups come in a random order. The records of each are dealt out evenly to its own turn and the
    next ones, and what a turn has been dealt is shuffled.
    """

    def __init__(self, seed: tuple[int, ...], groups: Groups) -> None:
        self._seed, self._starts_G1 = seed, groups.starts_G1
        sizes_G = np.diff(groups.starts_G1)
        self._turn_G = np.random.default_rng(seed).permutation(len(sizes_G))
        self._dealt_GO = (sizes_G[self._turn_G, None] + np.arange(_OPEN)) // _OPEN
        sizes_S = np.zeros(len(sizes_G) + _OPEN - 1, np.int64)
        for part in range(_OPEN):
            sizes_S[part : part + len(sizes_G)] += self._dealt_GO[:, part]
        self._turns_S1 = np.concatenate([[0], np.cumsum(sizes_S)])
        self._kept: dict[int, npt.NDArray[np.int64]] = {}

    def record(self, at: int) -> int:
        turn = int(np.searchsorted(self._turns_S1, at, side="right")) - 1
        if turn not in self._kept:
            self._kept = {turn: self._records(turn)}  # places are asked for one after the other
        return int(self._kept[turn][at - self._turns_S1[turn]])

    def coming(self, at: int) -> int | None:
        """A record of the group whose turn is next after that of place `at`; None if there is none.

        It has to be there then, while the groups in use are.
        """
        turn = int(np.searchsorted(self._turns_S1, at, side="right"))
        return int(self._starts_G1[self._turn_G[turn]]) if turn < len(self._turn_G) else None

    def _records(self, turn: int) -> npt.NDArray[np.int64]:
        """The records of a turn, in their order."""
        hands = []
        for part in range(_OPEN):
            if 0 <= turn - part < len(self._turn_G):
                group = int(self._turn_G[turn - part])
                start, stop = self._starts_G1[group : group + 2]
                shuffled = np.random.default_rng([*self._seed, 0, group]).permutation(stop - start)
                cuts = np.concatenate([[0], np.cumsum(self._dealt_GO[turn - part])])
                hands.append(start + shuffled[cuts[part] : cuts[part + 1]])
        return np.random.default_rng([*self._seed, 1, turn]).permutation(np.concatenate(hands))


@lru_cache(maxsize=4)
def grouped_epoch(seed: tuple[int, ...], groups: Groups) -> GroupedEpoch:
    """The order of an epoch by groups, made once."""
    return GroupedEpoch(seed, groups)


def permuted(seed: Sequence[int], size: int, at: int) -> int:
    """Where a permutation of range(size) takes `at`, computed without any list.

    A Feistel network over a rectangle that holds the range, walked until it is back inside (Black
    and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, methods 2 and 3).
    """
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    key = b"".join(number.to_bytes(8, "little") for number in seed)
    while True:
        row, column = divmod(at, columns)
        for turn in range(0, _ROUNDS, 2):
            row = (row + _hash(key, turn, column)) % rows
            column = (column + _hash(key, turn + 1, row)) % columns
        at = row * columns + column
        if at < size:
            return at


def _hash(key: bytes, turn: int, value: int) -> int:
    """A number of 64 bits that a key, a round and half of a place give."""
    message = bytes([turn]) + value.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(message, key=key, digest_size=8).digest(), "little")
