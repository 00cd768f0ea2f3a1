"""The rule of "auto" as it is stated, and efforts that are measured, not believed."""

import logging

import numpy as np
import pytest

from retrieval import index_choice
from retrieval.backends.faiss_index import FaissIndex
from retrieval.index_choice import RECALL, Sample, Wish, as_queries, tune

DIM = 32
ROOM = 10**15  # bytes, more than anything here takes


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _clustered(num: int, seed: int) -> np.ndarray:
    centres = np.random.default_rng(0).normal(size=(40, DIM))
    rng = np.random.default_rng(seed)
    return _unit(centres[rng.integers(40, size=num)] + 0.7 * rng.normal(size=(num, DIM)))


def _build(factory: str, num: int = 4000) -> FaissIndex:
    vectors = _clustered(num, seed=1)
    return FaissIndex.build([(np.arange(num), vectors)], num=num, dim=DIM, factory=factory)


@pytest.mark.parametrize(
    ("num", "memory_limit", "latency_ms", "kind"),
    [
        (1, ROOM, None, "Flat"),
        (1_000_000, ROOM, None, "Flat"),
        (1_300_000, ROOM, None, "IVF4096,SQ8"),
        (1_000_000, ROOM, 20.0, "IVF4096,SQ8"),
        (10_000_000, ROOM, None, "IVF16384,SQ8"),
        (10_000_000, ROOM, 10_000.0, "Flat"),
        (10_000_000, 3 * 10**9, None, "IVF16384,PQ64np"),
        (1_000_000, 10**9, None, "IVF4096,SQ8"),
        (3, 1, None, "Flat"),  # so few cannot be approximated
    ],
)
def test_the_rule(num: int, memory_limit: int, latency_ms: float | None, kind: str) -> None:
    assert Wish("auto", memory_limit, latency_ms).kind(num, 512) == kind


def test_the_rule_names_what_faiss_can_make_at_any_width() -> None:
    for dim in (1, 7, 8, 48, 384, 509, 512, 768):
        for wish in (Wish(latency_ms=1e-9), Wish(memory_limit=1)):
            for num in (100, 10_000, 10**8):
                kind = wish.kind(num, dim)
                assert FaissIndex.memory_needed(kind, num=num, dim=dim) > 0


def test_by_default_memory_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**28 < index_choice.available_memory() <= index_choice.physical_memory()
    monkeypatch.setattr(index_choice, "physical_memory", lambda: 10**8)
    assert Wish().kind(50_000, 512) == "IVF1024,SQ8"


@pytest.mark.parametrize(
    ("group", "limits"),
    [
        ("0::/job/step", {"/sys/fs/cgroup/job/memory.max": "7", "/sys/fs/cgroup/memory.max": "9"}),
        ("0::/", {"/sys/fs/cgroup/memory.max": "7"}),
        (
            "4:cpu,memory:/uid/job",
            {
                "/sys/fs/cgroup/memory/uid/job/memory.limit_in_bytes": "7",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            },
        ),
    ],
)
def test_memory_is_that_of_the_job(
    monkeypatch: pytest.MonkeyPatch, group: str, limits: dict[str, str]
) -> None:
    """Limits of this group and those above, of both versions of control groups."""
    files = {"/proc/self/cgroup": f"2:cpuset:/\n{group}", **limits}
    files["/sys/fs/cgroup/job/step/memory.max"] = "max"
    monkeypatch.setattr(index_choice, "_lines", lambda path: files.get(path, "").splitlines())
    assert index_choice.physical_memory() == 7


def test_a_given_kind_is_kept_and_limits_are_for_auto() -> None:
    assert Wish("HNSW32").kind(10**8, 512) == "HNSW32"
    with pytest.raises(ValueError, match="memory_limit is for the index"):
        Wish("HNSW32", memory_limit=1)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="latency_ms must be more than 0"):
            Wish(latency_ms=wrong)
    wish = Wish("auto", 10**9, 20.0)
    assert Wish.of(wish.settings()) == wish and Wish.of({"index": "Flat"}) == Wish("Flat")
    assert Wish.of({"index": "Flat", "latency_ms": 20}) == Wish("Flat")


@pytest.mark.parametrize("factory", ["IVF64,SQ8", "IVF64,PQ4np", "HNSW8", "SQ4", "PQ8np"])
def test_the_least_effort_that_suffices_for_every_kind_of_query(factory: str) -> None:
    index = _build(factory)
    gap = _unit(np.random.default_rng(3).normal(size=(1, DIM)))
    samples = {
        "video": Sample(index.vectors_ND[:100], index.ids_N[:100]),
        "text": Sample(_unit(_clustered(100, seed=2) + gap)),
    }
    tuned = tune(index, samples)
    assert min(tuned["recall"].values()) >= RECALL
    fresh = Sample(_unit(_clustered(200, seed=5) + gap)).queries_QD  # and for others like these
    found, _ = index.search(fresh, 10)
    best = np.argsort(-(fresh @ index.vectors_ND.T), axis=1)[:, :10]
    shared = [len(set(a[:10]) & set(b)) / 10 for a, b in zip(found.tolist(), best, strict=True)]
    assert np.mean(shared) >= RECALL - 0.03
    if tuned["effort"] is not None and tuned["effort"] > index.efforts[0]:
        less = index.efforts[index.efforts.index(tuned["effort"]) - 1]
        index.set_effort(less, candidates=tuned["candidates"])
        worst = min(_recall(index, sample) for sample in samples.values())
        assert worst < RECALL


def _recall(index: FaissIndex, sample: Sample) -> float:
    """The oracle: recall@10 by brute force, without the query itself."""
    scores = sample.queries_QD @ index.vectors_ND.T
    if sample.own_ids_Q is not None:
        scores[np.arange(len(scores)), sample.own_ids_Q] = -np.inf
    best = np.argsort(-scores, axis=1)[:, :10]
    shares = []
    for number, found in enumerate(index.search(sample.queries_QD, 11)[0].tolist()):
        own = None if sample.own_ids_Q is None else sample.own_ids_Q[number]
        shares.append(len(set([id for id in found if id != own][:10]) & set(best[number])) / 10)
    return float(np.mean(shares))


def test_an_index_that_cannot_do_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """One byte for 64 numbers of noise says too little, whatever is ranked anew."""
    rng = np.random.default_rng(0)
    vectors = _unit(rng.normal(size=(20_000, 64)))
    index = FaissIndex.build([(np.arange(20_000), vectors)], num=20_000, dim=64, factory="PQ1np")
    with caplog.at_level(logging.WARNING):
        tuned = tune(index, {"text": Sample(_unit(rng.normal(size=(50, 64))))})
    assert tuned["recall"]["text"] < RECALL and "choose one that is more exact" in caplog.text


def test_without_queries_nothing_is_claimed() -> None:
    assert tune(_build("SQ8", 50), {"text": Sample(np.empty((0, DIM), np.float32))}) == {
        "effort": None,
        "candidates": 1,
        "recall": {},
    }


def test_limits_are_numbers() -> None:
    for value in ("4GB", True, float("nan"), 0):
        with pytest.raises(ValueError, match="memory_limit must be more than 0"):
            Wish(memory_limit=value)  # type: ignore[arg-type]


def test_queries_of_ones_own_are_checked() -> None:
    given = np.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(np.linalg.norm(as_queries(given, 3), axis=1), 1, atol=1e-6)
    for wrong in (given[0], given[:, :2], given[:0], np.zeros((1, 3)), np.full((1, 3), np.nan)):
        with pytest.raises(ValueError, match="quer"):
            as_queries(wrong, 3)
