"""Stopping before the end, on real ranks: whoever is asked, whenever, all stop at one step, and nothing is lost."""

import copy
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.commands import losses
from tests.corpus import overrides
from tests.distributed import mesh, run_ranks, spare_garbage_collection
from tptrain.checkpoint.commit import read_commit
from tptrain.config import Config, load_config
from tptrain.config.schema import kv_heads
from tptrain.optim.reduce import Reducer
from tptrain.parallel.mesh import Mesh
from tptrain.records.run_dir import committed, step_of
from tptrain.train.loop import train
from tptrain.train.stop import Agreement, Stop

WORLD, STEPS = 4, 60


@cache
def _config(*lines: str) -> Config:
    return load_config(list(lines))


def _train(
    folder: str, name: str, wish: Callable[[Mesh], Any] | None = None, *changes: str, allocation: Any = None
) -> Any:
    lines = [*overrides(Path(folder), name), "parallel.tp=2", f"train.steps={STEPS}", "optim=constant", *changes]
    config = copy.deepcopy(_config(*lines))
    Path(config.run.dir or "").mkdir(parents=True, exist_ok=True)
    grid = mesh(2, kv_heads(config.model))
    stop = Stop(grid, allocation, wish(grid)) if wish else Stop(grid, allocation)
    spare_garbage_collection()
    return train(config, grid, stop), grid.box.state.step


def _soak(folder: str) -> list[tuple[int, int, Agreement | None]]:
    """Stop over and over, each time by a random rank after a random number of steps: (rank, step, what was agreed)."""
    draw, stops = random.Random(1), []
    agreed: Agreement | None = Agreement("", True, False)
    while agreed is not None:
        rank, after = draw.randrange(WORLD), draw.randint(1, 3)

        def wish(mesh: Mesh, rank: int = rank, after: int = after) -> Callable[[], str | None]:
            calls = iter(range(1, 10**6))
            return lambda: "SIGTERM" if mesh.rank == rank and next(calls) >= after else None

        agreed, step = _train(
            folder, "soaked", wish, "checkpoint.every=4", "checkpoint.keep=1000", "train.eval_every=5"
        )
        stops.append((rank, step, agreed))
    _train(folder, "calm", None, "train.eval_every=5")
    return stops


def test_stops_by_random_ranks_change_nothing(tmp_path: Path) -> None:
    everywhere = run_ranks(WORLD, _soak, str(tmp_path))
    assert all(stops == everywhere[0] for stops in everywhere), "all ranks stop at the same steps, for the same reason"
    stops = everywhere[0]
    assert len(stops) >= 25
    assert {rank for rank, _, _ in stops} == set(range(WORLD))
    steps = [step for _, step, _ in stops]
    assert steps == sorted(set(steps)), "each attempt gets further, and none does a step again"
    saved = [step_of(path) for path in committed(tmp_path / "soaked" / "checkpoints")]
    assert set(steps) <= set(saved)
    assert losses(tmp_path / "soaked") == losses(tmp_path / "calm")


class _TimeIsUp:
    """A scheduler that will kill the job at once."""

    def reason(self, signals: set[str]) -> tuple[str, bool, float | None]:
        return f"preempted by {sorted(signals)}", True, time.time() - 1


def _without_time(folder: str) -> list[Any]:
    def wish(mesh: Mesh) -> Callable[[], str | None]:
        calls = iter(range(1, 10**6))
        return lambda: "SIGUSR2" if mesh.rank == 3 and next(calls) >= 7 else None

    def near_the_end(mesh: Mesh) -> Callable[[], str | None]:
        if mesh.is_main:
            mesh.box.state.end_time = time.time() + 3  # a step and a save fit now, and soon will not
        return lambda: None

    return [
        _train(folder, "killed-soon", wish, allocation=_TimeIsUp()),
        _train(folder, "limited", near_the_end, "train.steps=100000"),
    ]


def test_the_time_that_is_left_decides(tmp_path: Path) -> None:
    for (agreed, step), (limited, last) in run_ranks(WORLD, _without_time, str(tmp_path)):
        assert agreed == Agreement("preempted by ['SIGUSR2']", save=False, requeue=True)
        assert step == 7
        assert committed(tmp_path / "killed-soon" / "checkpoints") == []
        assert limited == Agreement("the time limit is near", save=True, requeue=True)
        assert [step_of(path) for path in committed(tmp_path / "limited" / "checkpoints")][-1] == last


def _skip(folder: str) -> Any:
    """A step whose gradient is no number, left out: what follows is as good as before, also after a resume."""
    right, calls = Reducer.norm_and_flags, iter(range(1, 10**6))

    def spoiled(self: Reducer, flag: bool = False) -> torch.Tensor:
        norm, flags = right(self, flag)
        return torch.stack([norm * float("nan") if next(calls) == 6 else norm, flags])

    with patch.object(Reducer, "norm_and_flags", spoiled):
        return _train(folder, "skip", None, "train.on_nan=skip", "train.steps=20")


@pytest.mark.parametrize("world", [2])
def test_on_nan_skip_leaves_the_update_out(tmp_path: Path, world: int) -> None:
    assert [result for result in run_ranks(world, _skip, str(tmp_path))] == [(None, 20)] * world
    rows = losses(tmp_path / "skip")
    assert len(rows) == 20
    assert rows[-1] < rows[4]
    commit = read_commit(committed(tmp_path / "skip" / "checkpoints")[-1])
    assert not isinstance(commit, str)
    assert (commit.step, commit.updates) == (20, 19)
