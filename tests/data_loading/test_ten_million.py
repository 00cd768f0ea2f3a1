"""Ten million records: nothing walks all of them, and nothing holds a list of them."""

import pickle
import tracemalloc
from pathlib import Path

from fluxclip.data import sources
from fluxclip.data.loader import Augment, Source, Steps
from fluxclip.tokens.budget import FluxSampling

SAMPLING = FluxSampling((2, 4, 1), (28, 56, 28), (4, 64), (16, 8))
MANY = 10_000_000


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
