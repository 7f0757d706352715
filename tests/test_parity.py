"""tp = 1, 2, 4 compute what Transformers computes: loss, logits, every gradient, the norm and one optimizer step."""

import pytest

from tests import reference as ref
from tests.distributed import run_ranks
from tests.parity import MUTATIONS, Distances, distances, worst

WORLD = 4
TOLERANCE = 1e-5  # relative, in the 2-norm of each tensor, float32
TOPOLOGIES = {"tp1 x dp4": 1, "tp2 x dp2": 2, "tp4": 4}


def _all_distances(references: dict[str, ref.Reference]) -> dict[str, Distances]:
    """On one rank: every case at every topology, then every mutation. One start of the ranks serves all tests."""
    found = {
        f"{case} {topology}": distances(case, references[case], tp)
        for case in ref.CASES
        for topology, tp in TOPOLOGIES.items()
    }
    for mutation in MUTATIONS:
        # this case has replicated KV heads and biases at tp=4, so that every mutation has something to break
        found[mutation] = distances("llama_kv_replicated", references["llama_kv_replicated"], 4, mutation)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Distances]]:
    return run_ranks(WORLD, _all_distances, {name: ref.compute(case) for name, case in ref.CASES.items()})


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("case", ref.CASES)
def test_matches_transformers(found: list[dict[str, Distances]], case: str, topology: str) -> None:
    distance, what = worst([rank[f"{case} {topology}"] for rank in found])
    assert distance < TOLERANCE, what


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_broken_code_is_noticed(found: list[dict[str, Distances]], mutation: str) -> None:
    distance, _ = worst([rank[mutation] for rank in found])
    assert distance > 100 * TOLERANCE
