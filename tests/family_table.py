"""Prints the table of distances in docs/huggingface.md, of every family: `python -m tests.family_table`."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from tests import reference as ref
from tests.distributed import run_ranks
from tests.families import FAMILIES
from tests.parity import Distances, Topology, distances, worst

WORLD = 4
TOPOLOGIES = {
    "tp1 x dp4": Topology(1),
    "tp1 x dp4, zero": Topology(1, zero=True),
    "tp2 x dp2": Topology(2),
    "tp2 x dp2, zero, sp": Topology(2, sequence_parallel=True, zero=True, shared=True),
    "tp2 x dp2, overlap": Topology(2, overlap=True, shared=True),
    "tp2 x dp2, kernels in C": Topology(2, shared=True),
    "tp4": Topology(4, shared=True),
    "tp4, sp": Topology(4, sequence_parallel=True),
    "tp4, selective": Topology(4, recompute="selective"),
    "tp4, sp, full": Topology(4, sequence_parallel=True, shared=True, recompute="full"),
    "tp4, overlap, sp": Topology(4, sequence_parallel=True, overlap=True),
}


def _of_family(case: ref.Case, reference: ref.Reference, compiled: Path) -> dict[str, Distances]:
    """On one rank: a family at every topology."""
    return {
        name: distances(case, reference, replace(where, kernels=compiled if "kernels" in name else None))
        for name, where in TOPOLOGIES.items()
    }


def main() -> None:
    print(f"| | {' | '.join(TOPOLOGIES)} |")
    print("| --- |" + " --- |" * len(TOPOLOGIES))
    with TemporaryDirectory() as compiled:
        for family, case in tqdm(FAMILIES.items(), disable=None):
            if family == "gpt2":  # the reference, too, is to be without the dropout that is its default
                case.ours.source.update(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            everywhere = run_ranks(WORLD, _of_family, case, ref.compute(case), Path(compiled))
            cells = [f"{worst([rank[name] for rank in everywhere])[0]:.0e}" for name in TOPOLOGIES]
            tqdm.write(f"| {family} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
