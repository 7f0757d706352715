"""What rank 0 makes of the ranks' reports. The GPUs are made up here: the real faults are in test_slurm.py."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import tptrain
from tptrain.config import Config, UserError, load_config
from tptrain.models.cost import CHECKPOINT_BYTES
from tptrain.models.settings import decoder_spec
from tptrain.nn.decoder import parameter_count
from tptrain.records.run_dir import COMMIT, step_folder
from tptrain.run.preflight import Report, check_disk, problem, source_version


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
    assert words in (problem(entries, config(tmp_path, "train.compile=elementwise")) or "")


def test_what_is_allowed_is_let_through(tmp_path: Path) -> None:
    entries = reports(4)
    entries[3] = replace(entries[3], node="n2", device="GPU-0")
    assert problem(entries, config(tmp_path, "parallel.tp_across_nodes=true")) is None
    entries[1] = replace(entries[1], operations="PyTorch")
    assert problem(entries, config(tmp_path, "parallel.tp_across_nodes=true")) is None, "all compute with PyTorch then"
    shared = [replace(report, device="GPU-0") for report in reports(2)]
    assert problem(shared, config(tmp_path, "parallel.backend=gloo")) is None


@pytest.mark.parametrize("name", ["ops/cpu/attention.c", "ops/cpu/vector.h", "nn/linear.py"])
def test_another_source_is_another_version(tmp_path: Path, name: str) -> None:
    shutil.copytree(Path(tptrain.__file__).parent, tmp_path / "tptrain", ignore=shutil.ignore_patterns("__pycache__"))
    assert source_version(tmp_path / "tptrain") == source_version()
    with (tmp_path / "tptrain" / name).open("a") as file:
        file.write("\n")
    assert source_version(tmp_path / "tptrain") != source_version()


# ---------------------------------------------------------------------------------------------------------------- disk

LONG = "train.steps=1000", "checkpoint.every=100"


@pytest.mark.parametrize(
    ("lines", "steps_on_disk", "needed"),
    [
        (LONG, [], 3),  # two are kept, and the newest is written before the oldest goes
        ([*LONG, "checkpoint.keep=5"], [], 6),
        (LONG, [100], 2),
        (LONG, [100, 200], 1),
        ([*LONG, "checkpoint.keep=1"], [100, 200, 300], 1),  # more than are to be kept from now on
        ([*LONG, "checkpoint.keep=50"], [], 10),  # it writes no more
        ([*LONG, "checkpoint.keep=50"], [750], 3),  # after steps 800, 900 and 1000
        ([*LONG, "checkpoint.keep=50", "train.steps=1001"], [750], 4),
        ([*LONG, "checkpoint.every=0"], [], 1),
        ([*LONG, "checkpoint.every=0"], [100], 1),
        ([*LONG, "train.steps=100"], [100], 0),  # nothing is left to save
    ],
)
def test_there_is_room_for_all_checkpoints_of_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], steps_on_disk: list[int], needed: int
) -> None:
    run = config(tmp_path, *lines)
    one = CHECKPOINT_BYTES * parameter_count(decoder_spec(run.model))
    for step in steps_on_disk:
        _checkpoint(tmp_path, step, one).joinpath(COMMIT).touch()
    _set_free(monkeypatch, needed * one + 1 if needed else 0)
    check_disk(run)
    if needed:
        _set_free(monkeypatch, needed * one)
        with pytest.raises(UserError, match=r"one checkpoint of tiny takes 0\.0 GiB") as raised:
            check_disk(run)
        assert ("lower checkpoint.keep" in str(raised.value)) == (needed > 1)


def test_what_a_cut_off_save_left_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path, *LONG)
    one = CHECKPOINT_BYTES * parameter_count(decoder_spec(run.model))
    for step in (100, 200):
        _checkpoint(tmp_path, step, one).joinpath(COMMIT).touch()
    _checkpoint(tmp_path, 300, one)
    _set_free(monkeypatch, 1)
    check_disk(run)


def test_too_little_room_is_told_with_the_sum_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_config([*LONG, "model=llama3_8b", f"run.dir={tmp_path}/run"])
    _checkpoint(tmp_path, 100, 90 * 2**30).joinpath(COMMIT).touch()
    _set_free(monkeypatch, 100 * 2**30)
    with pytest.raises(UserError) as raised:
        check_disk(run)
    assert str(raised.value) == (
        f"run.dir={tmp_path}/run: 100.0 GiB free, and one checkpoint of llama3_8b takes 89.7 GiB. With "
        "checkpoint.keep=2 those to come need 179.2 GiB beside the 90.0 GiB that are there: the newest is written "
        "before the oldest goes. Free some space, lower checkpoint.keep or choose another run.dir."
    )


def _checkpoint(folder: Path, step: int, size: int) -> Path:
    """A checkpoint of `folder`/run that is not committed: one file of that size, with nothing in it."""
    path = step_folder(folder / "run" / "checkpoints", step)
    path.mkdir(parents=True)
    with (path / "__0_0.distcp").open("wb") as file:
        file.truncate(size)
    return path


def _set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
