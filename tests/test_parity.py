"""tp = 1, 2, 4 compute what Transformers computes: loss, logits, every gradient, the norm and one optimizer step."""

import pytest

from tests import reference as ref
from tests.distributed import run_ranks
from tests.parity import MUTATIONS, Distances, Topology, distances, worst

WORLD = 4
TOLERANCE = 1e-5  # relative, in the 2-norm of each tensor, float32
TOPOLOGIES = {
    "tp1 x dp4": Topology(1),
    "tp2 x dp2": Topology(2, shared=True),
    "tp4": Topology(4, shared=True),
    "tp1 x dp4, zero": Topology(1, zero=True),
    "tp2 x dp2, zero, sequence parallel": Topology(2, sequence_parallel=True, zero=True, shared=True),
    "tp4, sequence parallel": Topology(4, sequence_parallel=True, recompute="selective"),
    "tp2 x dp2, overlap": Topology(2, zero=True, overlap=True, shared=True),
    "tp4, overlap, shared": Topology(4, shared=True, recompute="selective", overlap=True),
    "tp2 x dp2, everything recomputed": Topology(2, recompute="full", shared=True),
    "tp4, sequence parallel, shared": Topology(4, sequence_parallel=True, shared=True),
    "tp4, sequence parallel, everything recomputed": Topology(4, sequence_parallel=True, recompute="full"),
}
# This case has replicated KV heads and biases at tp=4, so that every mutation has something to break.
BROKEN = {
    **{mutation: (mutation, Topology(4)) for mutation in MUTATIONS},
    **{
        f"{mutation}, sequence parallel": (mutation, Topology(4, sequence_parallel=True))
        for mutation in ("drop the forward sum", "average instead of sum", "keep partial gradients partial")
    },
}


def _all_distances(references: dict[str, ref.Reference]) -> dict[str, Distances]:
    """On one rank: every case at every topology, then every mutation. One start of the ranks serves all tests."""
    by_rank = {
        f"{case} {topology}": distances(ref.CASES[case], references[case], where)
        for case in ref.CASES
        for topology, where in TOPOLOGIES.items()
    }
    broken = ref.CASES["llama_kv_replicated"]
    for name, (mutation, where) in BROKEN.items():
        by_rank[name] = distances(broken, references["llama_kv_replicated"], where, mutation)
    return by_rank


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Distances]]:
    return run_ranks(WORLD, _all_distances, {name: ref.compute(case) for name, case in ref.CASES.items()})


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("case", ref.CASES)
def test_matches_transformers(by_rank: list[dict[str, Distances]], case: str, topology: str) -> None:
    distance, what = worst([rank[f"{case} {topology}"] for rank in by_rank])
    assert distance < TOLERANCE, what


@pytest.mark.parametrize("mutation", BROKEN)
def test_broken_code_is_noticed(by_rank: list[dict[str, Distances]], mutation: str) -> None:
    distance, _ = worst([rank[mutation] for rank in by_rank])
    assert distance > 100 * TOLERANCE
