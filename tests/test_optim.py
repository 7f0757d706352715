"""Gradients and their norm, against float64, and the flag that rides with the norm."""

import math

import pytest
import torch
from torch import nn

from tests.distributed import mesh, run_ranks
from tptrain.config.schema import OptimConfig
from tptrain.nn.parameter import parameter, parameters, sharding
from tptrain.nn.store import Store
from tptrain.optim.adamw import Optimizer
from tptrain.parallel.mesh import Mesh


def _optimizer(module: nn.Module, grid: Mesh, zero: bool = False) -> Optimizer:
    return Optimizer(Store(module, torch.float32, grid.size("dp")), OptimConfig(), grid, zero)


def test_norm_of_many_gradients_is_exact_to_float32() -> None:
    """One float32 sum of this many squares is wrong in the fourth digit on a cpu, and by another amount at each tp."""
    grid = mesh(1)
    module = nn.Module()
    for i, rows in enumerate((4000, 777, 3000, 1)):
        setattr(module, f"p{i}", parameter(grid, sharding(grid, (rows, 1001)), std=1.0))
    reducer = _optimizer(module, grid).reducer
    generator = torch.Generator().manual_seed(0)
    grads = [p.main_grad for _, p in parameters(module) if p.main_grad is not None]
    assert len(grads) == 4
    for grad in grads:
        grad.copy_(torch.randn(grad.shape, generator=generator))
    exact = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().item()
    assert reducer.norm_and_flags()[0].item() == pytest.approx(exact, rel=1e-6)
    reducer.clip(reducer.norm_and_flags()[0], 1.0)
    assert reducer.norm_and_flags()[0].item() == pytest.approx(1.0, rel=1e-5)


def test_a_flag_raised_on_one_rank_is_seen_by_all_and_changes_no_gradient() -> None:
    for answers in run_ranks(4, _flags):
        for flagged, (flag, norm) in answers.items():
            assert flag == (flagged is not None)
            # 40 elements of a matrix, the sum of two dp ranks; 3 of a vector, the sum of two tp ranks beside
            assert norm == pytest.approx(math.sqrt(40 * 1.0**2 + 3 * 2.0**2))


def _flags() -> dict[int | None, tuple[float, float]]:
    """Per rank that raises the flag (None: nobody): what this rank reads of flag and norm, on a 2 x 2 grid."""
    grid = mesh(2)
    answers: dict[int | None, tuple[float, float]] = {}
    for flagged in (None, 0, 1, 2, 3):
        module = nn.Module()
        module.cut = parameter(grid, sharding(grid, (8, 5), {0: "tp"}), std=1.0)
        module.summed = parameter(grid, sharding(grid, (3,), summed=("tp",)), constant=1.0)
        reducer = _optimizer(module, grid, zero=flagged != 0).reducer
        for _, p in parameters(module):
            assert p.main_grad is not None
            p.add_grad(torch.full_like(p.main_grad, 0.5))
        reducer.finish()
        norm, flag = reducer.norm_and_flags(flag=grid.rank == flagged).tolist()
        answers[flagged] = (flag, norm)
    return answers
