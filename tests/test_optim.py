"""The gradient buckets, against float64, and the flag that rides with the norm."""

import math

import pytest
import torch
from torch import nn

from tests.distributed import mesh, run_ranks
from tptrain.config.schema import OptimConfig
from tptrain.config.sizes import BUCKET_ELEMENTS
from tptrain.layers import ShardSpec, parameter, parameters
from tptrain.mesh import make_mesh
from tptrain.optim import Optimizer


def test_norm_of_many_gradients_is_exact_to_float32() -> None:
    """One float32 sum of this many squares is wrong in the fourth digit on a cpu, and by another amount at each tp."""
    mesh = make_mesh(1, 1, torch.device("cpu"))
    module = nn.Module()
    for i, rows in enumerate((4000, 777, 3000, 1)):
        setattr(module, f"p{i}", parameter(mesh, ShardSpec((rows, 1001), tp=1), std=1.0))
    optimizer = Optimizer(module, OptimConfig(grad_clip=1.0), mesh, torch.float32, zero=False)
    generator = torch.Generator().manual_seed(0)
    grads = [p.main_grad for _, p in parameters(module)]
    assert len(grads) == 4
    for grad in grads:
        grad.copy_(torch.randn(grad.shape, generator=generator))
    exact = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().item()
    assert optimizer.norm()[0].item() == pytest.approx(exact, rel=1e-6)
    optimizer.clip(optimizer.norm()[0])
    assert optimizer.norm()[0].item() == pytest.approx(1.0, rel=1e-5)


def test_buckets_hold_every_gradient_once_and_are_bounded() -> None:
    mesh = make_mesh(1, 1, torch.device("meta"))
    module = nn.Module()
    for i in range(7):
        setattr(module, f"p{i}", parameter(mesh, ShardSpec((2**12, 2**10), tp=1), std=1.0))
    buckets = Optimizer(module, OptimConfig(), mesh, torch.float32, zero=False).buckets
    assert sum(len(bucket.grads) for bucket in buckets) == 7 * 2**22
    assert max(len(bucket.grads) for bucket in buckets) <= BUCKET_ELEMENTS
    assert len(buckets) == 2


def test_a_flag_raised_on_one_rank_is_seen_by_all_and_changes_no_gradient() -> None:
    for found in run_ranks(4, _flags):
        for flagged, (flag, norm) in found.items():
            assert flag == (flagged is not None)
            # 40 elements of a matrix, the sum of two dp ranks; 3 of a vector, the sum of two tp ranks beside
            assert norm == pytest.approx(math.sqrt(40 * 1.0**2 + 3 * 2.0**2))


def _flags() -> dict[int | None, tuple[float, float]]:
    """Per rank that raises the flag (None: nobody): what this rank reads of flag and norm, on a 2 x 2 grid."""
    grid = mesh(2)
    found: dict[int | None, tuple[float, float]] = {}
    for flagged in (None, 0, 1, 2, 3):
        module = nn.Module()
        module.plain = parameter(grid, ShardSpec((8, 5), tp=2), std=1.0)
        module.partial = parameter(grid, ShardSpec((3,), 2, 0, 2, partial_grad=True), constant=1.0)
        optimizer = Optimizer(module, OptimConfig(), grid, torch.float32, zero=flagged != 0)
        for _, p in parameters(module):
            p.main_grad.fill_(0.5)
        optimizer.reduce()
        norm, flag = optimizer.norm(flag=grid.rank == flagged).tolist()
        found[flagged] = (flag, norm)
    return found
