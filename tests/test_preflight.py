"""What rank 0 makes of the ranks' reports. The GPUs are made up here: the real faults are in test_slurm.py."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import tptrain
from tptrain.config import Config, load_config
from tptrain.run.preflight import Report, problem, source_version


def reports(world: int, nodes: int = 1, gpus: bool = True) -> list[Report]:
    share = world // nodes
    return [
        Report(rank, f"n{rank // share + 1}", rank % share, f"GPU-{rank % share}" if gpus else "cpu", "/runs/a", "C")
        for rank in range(world)
    ]


def config(tmp_path: Path, *changes: str) -> Config:
    return load_config([f"run.dir={tmp_path}/run", "parallel.tp=2", *changes])


def test_ranks_that_fit_together_are_let_through(tmp_path: Path) -> None:
    assert problem(reports(8, nodes=2), config(tmp_path)) is None
    assert problem(reports(8, gpus=False), config(tmp_path)) is None


FAULTS: dict[str, tuple[Callable[[list[Report]], None], str]] = {
    "one GPU for two": (
        lambda entries: entries.__setitem__(3, replace(entries[3], device="GPU-2")),
        "ranks 2, 3 on n1 share one GPU (GPU-2)",
    ),
    "torch": (lambda entries: entries.__setitem__(1, replace(entries[1], torch="2.0")), "2.0 at rank 1 on n1"),
    "tptrain": (lambda entries: entries.__setitem__(0, replace(entries[0], tptrain="9")), "tptrain: 9 at rank 0 on n1"),
    "python": (lambda entries: entries.__setitem__(2, replace(entries[2], python="3.99")), "python: 3."),
    "run.dir": (lambda entries: entries.__setitem__(2, replace(entries[2], run_dir="/b")), "the ranks disagree"),
    "operations": (
        lambda entries: entries.__setitem__(1, replace(entries[1], operations="PyTorch")),
        "rank 0 on n1 would compute with C, rank 1 on n1 with PyTorch",
    ),
    "another node": (
        lambda entries: entries.__setitem__(3, replace(entries[3], node="n2")),
        "the TP group of ranks 2 to 3 spans the nodes n1, n2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(tmp_path: Path, fault: str) -> None:
    entries = reports(4)
    spoil, words = FAULTS[fault]
    spoil(entries)
    assert words in (problem(entries, config(tmp_path)) or "")


def test_what_is_allowed_is_let_through(tmp_path: Path) -> None:
    entries = reports(4)
    entries[3] = replace(entries[3], node="n2", device="GPU-0")
    assert problem(entries, config(tmp_path, "parallel.tp_across_nodes=true")) is None
    shared = [replace(report, device="GPU-0") for report in reports(2)]
    assert problem(shared, config(tmp_path, "parallel.backend=gloo")) is None


@pytest.mark.parametrize("name", ["ops/cpu/attention.c", "ops/cpu/vector.h", "nn/linear.py"])
def test_another_source_is_another_version(tmp_path: Path, name: str) -> None:
    shutil.copytree(Path(tptrain.__file__).parent, tmp_path / "tptrain", ignore=shutil.ignore_patterns("__pycache__"))
    assert source_version(tmp_path / "tptrain") == source_version()
    with (tmp_path / "tptrain" / name).open("a") as file:
        file.write("\n")
    assert source_version(tmp_path / "tptrain") != source_version()
