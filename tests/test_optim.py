"""The gradient buckets on one rank, against float64."""

import pytest
import torch
from torch import nn

from tptrain.layers import ShardSpec, parameter
from tptrain.mesh import make_mesh
from tptrain.optim import BUCKET_ELEMENTS, Gradients


def test_norm_of_many_gradients_is_exact_to_float32() -> None:
    """One float32 sum of this many squares is wrong in the fourth digit on a cpu, and by another amount at each tp."""
    mesh = make_mesh(1, 1, torch.device("cpu"))
    module = nn.Module()
    for i, rows in enumerate((4000, 777, 3000, 1)):
        setattr(module, f"p{i}", parameter(mesh, ShardSpec((rows, 1001), tp=1), std=1.0))
    gradients = Gradients(module, mesh)
    generator = torch.Generator().manual_seed(0)
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(grads) == 4
    for grad in grads:
        grad.copy_(torch.randn(grad.shape, generator=generator))
    exact = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().item()
    assert gradients.norm().item() == pytest.approx(exact, rel=1e-6)
    gradients.clip(gradients.norm(), largest=1.0)
    assert gradients.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_buckets_hold_every_gradient_once_and_are_bounded() -> None:
    mesh = make_mesh(1, 1, torch.device("meta"))
    module = nn.Module()
    for i in range(7):
        setattr(module, f"p{i}", parameter(mesh, ShardSpec((2**12, 2**10), tp=1), std=1.0))
    gradients = Gradients(module, mesh)
    assert sum(bucket.flat.numel() for bucket in gradients.buckets) == 7 * 2**22
    assert max(bucket.flat.numel() for bucket in gradients.buckets) <= BUCKET_ELEMENTS
    assert len(gradients.buckets) == 2
