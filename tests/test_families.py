"""Every native family computes what Transformers computes, at tp = 1, 2 and 4: loss, logits, every gradient, a step."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests import reference as ref
from tests.distributed import run_ranks
from tests.families import ELSEWHERE, FAMILIES
from tests.parity import Distances, Topology, distances, worst

WORLD = 4
CASES = {name: case for name, case in FAMILIES.items() if name not in ELSEWHERE}
TOLERANCE = 1e-5  # relative, in the 2-norm of each tensor, float32
TOPOLOGIES = {
    "tp1 x dp4": Topology(1),
    "tp2 x dp2, selective": Topology(2, shared=True, recompute="selective"),
    "tp2 x dp2, kernels in C": Topology(2, shared=True),
    "tp4, sequence parallel, recomputed": Topology(4, sequence_parallel=True, recompute="full"),
}


def _all_distances(references: dict[str, ref.Reference], compiled: Path) -> dict[str, Distances]:
    """On one rank: every family at every topology."""
    return {
        f"{name} {topology}": distances(
            case, references[name], replace(where, kernels=compiled if "kernels" in topology else None)
        )
        for name, case in CASES.items()
        for topology, where in TOPOLOGIES.items()
    }


@pytest.fixture(scope="module")
def by_rank(compiled: Path) -> list[dict[str, Distances]]:
    return run_ranks(WORLD, _all_distances, {name: ref.compute(case) for name, case in CASES.items()}, compiled)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("family", CASES)
def test_matches_transformers(by_rank: list[dict[str, Distances]], family: str, topology: str) -> None:
    distance, what = worst([rank[f"{family} {topology}"] for rank in by_rank])
    assert distance < TOLERANCE, what
