"""The parity tests on a GPU: tp=1 over NCCL, and two ranks sharing one GPU over gloo for tp=2."""

from pathlib import Path

import pytest
import torch

from tests import commands
from tests import reference as ref
from tests.commands import tptrain
from tests.corpus import overrides
from tests.distributed import run_ranks
from tests.parity import Distances, Topology, distances, worst
from tptrain.parallel.device_clock import DeviceClock

pytestmark = pytest.mark.cuda
TOLERANCE = 1e-5  # relative, as on the cpu


def _all_cases(references: dict[str, ref.Reference], tp: int) -> dict[str, Distances]:
    return {case: distances(ref.CASES[case], references[case], Topology(tp), device="cuda") for case in ref.CASES}


@pytest.mark.parametrize(("tp", "backend"), [(1, "nccl"), (2, "gloo")])
def test_matches_transformers(tp: int, backend: str) -> None:
    references = {name: ref.compute(case) for name, case in ref.CASES.items()}
    by_rank = run_ranks(tp, _all_cases, references, tp, backend=backend)
    for case in ref.CASES:
        distance, what = worst([rank[case] for rank in by_rank])
        assert distance < TOLERANCE, f"{case}: {what}"


@pytest.mark.parametrize(
    "lines", [["parallel.tp=1"], ["parallel.tp=2", "parallel.backend=gloo"]], ids=["nccl tp1", "gloo tp2"]
)
def test_a_run_on_the_gpu_has_the_losses_of_the_cpu_and_resumes(tmp_path: Path, lines: list[str]) -> None:
    def losses(name: str) -> list[float]:
        return commands.losses(tmp_path / name)

    def launch(name: str, *changes: str) -> None:
        done = tptrain("launch", *overrides(tmp_path, name), *lines, *changes)
        assert done.returncode == 0, done.stdout

    launch("cpu", "parallel.backend=gloo")
    launch("gpu", "train.device=cuda")
    assert max(abs(a - b) for a, b in zip(losses("gpu"), losses("cpu"), strict=True)) < 2e-5
    launch("bf16", "train.device=cuda", "train.precision=bf16")
    assert max(abs(a - b) for a, b in zip(losses("bf16"), losses("cpu"), strict=True)) < 0.05
    launch("resumed", "train.device=cuda", "optim=constant", "train.steps=10")
    launch("resumed", "train.device=cuda", "optim=constant")
    launch("whole", "train.device=cuda", "optim=constant")
    assert losses("resumed") == losses("whole")


def test_the_device_clock_follows_the_stream_and_does_not_wait_for_it() -> None:
    clock, passed = DeviceClock(torch.cuda.Event), []
    clock.note(passed.append, 1)
    torch.cuda._sleep(10**9)  # cycles: half a second or so
    clock.note(passed.append, 2)
    clock.poll()
    assert 2 not in passed
    torch.cuda.synchronize()
    clock.poll()
    assert passed == [1, 2]
