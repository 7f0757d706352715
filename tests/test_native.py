"""The CPU's own element-wise kernels, held to torch's modules and to definitions, in float64 and by autograd."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.ops.table import Operations

MOST = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # norm of the error over that of the result: half a last place
EPS = 1e-5
types = pytest.mark.parametrize("dtype", MOST)
widths = pytest.mark.parametrize("width", [1, 15, 16, 40, 256])  # within sixteen, sixteens, and beyond them


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest, kernels: Operations) -> None:
    torch.set_num_threads(request.param)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _exact(*tensors: Tensor) -> list[Tensor]:
    return [x.double().requires_grad_() for x in tensors]


def _close(results: Any, right: Any, most: float) -> None:
    for place, (ours, exact) in enumerate(zip(results, right, strict=True)):
        assert (ours - exact).norm() <= most * exact.norm() + 1e-30, (place, (ours - exact).norm() / exact.norm())


@types
@widths
@pytest.mark.parametrize("rows", [1, 200])
def test_norm(width: int, rows: int, dtype: torch.dtype, kernels: Operations) -> None:
    torch.manual_seed(0)
    x, y, to_total, to_normed = (_random(rows, width, dtype=dtype) for _ in range(4))
    weight = _random(width, dtype=dtype)
    results = kernels.add_rms_norm(x, y, weight, EPS)
    exact_x, exact_y, exact_weight = _exact(x, y, weight)
    total = exact_x + exact_y
    normed = F.rms_norm(total, (width,), exact_weight, EPS)
    squares = total.square().sum(-1, keepdim=True)
    _close(results, (total, normed, squares), MOST[dtype])

    kept = total.to(dtype)  # what a backward pass gets: rounded
    (exact_kept,) = _exact(kept)
    normed = F.rms_norm(exact_kept, (width,), exact_weight, EPS)
    through_norm, to_weight = torch.autograd.grad(normed, (exact_kept, exact_weight), to_normed.double())
    squares = exact_kept.detach().square().sum(-1, keepdim=True).float()
    results = kernels.add_rms_norm_backward(to_total, to_normed, kept, weight, squares, EPS)
    # at width 1 the gradient through the norm is all cancellation
    _close(results, (through_norm + to_total, to_weight), MOST[dtype] if width > 1 else 2e-2)
    if width > 1:
        results = kernels.rms_norm_backward(to_normed, kept, weight, squares, EPS)
        _close(results, (through_norm, to_weight), 4 * MOST[dtype])
    results = kernels.rms_norm(kept, weight, EPS)
    _close(results, (normed, squares), MOST[dtype])


@types
@widths
def test_gated_activation(width: int, dtype: torch.dtype, kernels: Operations) -> None:
    torch.manual_seed(0)
    x, grad = 4 * _random(50, 2 * width, dtype=dtype), _random(50, width, dtype=dtype)
    (exact,) = _exact(x)
    y = F.silu(exact[:, :width]) * exact[:, width:]
    _close([kernels.gate_product(x, "silu")], [y], MOST[dtype])
    _close([kernels.gate_product_backward(grad, x, "silu")], torch.autograd.grad(y, exact, grad.double()), MOST[dtype])
    y = F.gelu(exact[:, :width], approximate="tanh") * exact[:, width:]
    _close([kernels.gate_product(x, "gelu_new")], [y], 2 * MOST[dtype])
    expected = torch.autograd.grad(y, exact, grad.double())
    _close([kernels.gate_product_backward(grad, x, "gelu_new")], expected, 2 * MOST[dtype])
    y = F.gelu(exact[:, :width]) * exact[:, width:]
    _close([kernels.gate_product(x, "gelu")], [y], 4 * MOST[dtype])  # not by a kernel


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_gates_far_from_zero_are_open_or_shut(act: str, kernels: Operations) -> None:
    gate = torch.tensor([-torch.inf, -1e30, -100.0, 100.0, 1e30])
    x = torch.stack([gate[1:], torch.ones(4)]).view(1, 8)
    y, grad = kernels.gate_product(x, act), kernels.gate_product_backward(torch.ones(1, 4), x, act)
    torch.testing.assert_close(y, torch.tensor([[0.0, 0.0, 100.0, 1e30]]), atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(grad[:, :4], torch.tensor([[0.0, 0.0, 1.0, 1.0]]), atol=1e-30, rtol=1e-6)


@types
@pytest.mark.parametrize(("H", "K", "d"), [(2, 2, 2), (3, 1, 20), (4, 2, 32), (6, 3, 80)])
def test_rotary(H: int, K: int, d: int, dtype: torch.dtype, kernels: Operations) -> None:
    """Dims i and i + d/2 are the parts of a complex number, which turns by the position's angle."""
    torch.manual_seed(0)
    B, T = 2, 9
    angles = torch.randn(T, 1, d // 2)
    cos, sin, heads = angles.cos(), angles.sin(), [H, K, K]
    qkv = _random(B, T, H + 2 * K, d, dtype=dtype)

    def turned(x: Tensor, way: int) -> Tensor:
        numbers = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones(()), way * angles)
        return torch.cat((numbers.real, numbers.imag), -1)

    q, k, v = qkv.split(heads, 2)
    _close(kernels.rotate_qkv(qkv, cos, sin, heads), (turned(q, 1), turned(k, 1), v.double()), MOST[dtype])
    exact = torch.cat((turned(q, -1), turned(k, -1), v.double()), 2)
    _close([kernels.rotate_qkv_backward(q, k, v, cos, sin)], [exact], MOST[dtype])
    _close([kernels.rotate(q, cos, sin)], [turned(q, 1)], MOST[dtype])


@types
@pytest.mark.parametrize("columns", [1, 15, 16, 1000])
def test_loss_of_half_a_vocabulary(columns: int, dtype: torch.dtype, kernels: Operations) -> None:
    torch.manual_seed(0)
    rows, scale = 40, 0.25
    logits = 5 * _random(rows, 2 * columns, dtype=dtype)
    targets = torch.randint(2 * columns, (rows,))
    exact = logits.double().requires_grad_()
    loss = F.cross_entropy(exact, targets, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum() * scale, exact)
    halves = [logits[:, :columns].contiguous(), logits[:, columns:].contiguous()]
    local = [targets, targets - columns]
    both = [kernels.statistics(*each) for each in zip(halves, local, strict=True)]
    lse, at_target = torch.cat(both).unbind(1)
    _close([lse.logsumexp(0) - at_target.sum(0)], [loss], 1e-6)
    grads = [
        kernels.logit_gradient_(half, lse.logsumexp(0), column, at_target.sum(0), scale)
        for half, column in zip(halves, local, strict=True)
    ]
    _close(grads, grad.split(columns, 1), MOST[dtype])


def test_great_and_spoilt_logits(kernels: Operations) -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [torch.nan, 0.0, 0.0], [-torch.inf, 0.0, 0.0]])
    statistics = kernels.statistics(logits, torch.tensor([1, 1, 1]))
    assert statistics[0, 0].tolist() == pytest.approx([1e4, torch.nan, 0.6931472], nan_ok=True)


def test_results_do_not_depend_on_the_threads(kernels: Operations) -> None:
    torch.manual_seed(0)
    grad, x, weight = torch.randn(1000, 48), torch.randn(1000, 48), torch.randn(48)
    squares = x.square().sum(-1, keepdim=True)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(kernels.rms_norm_backward(grad, x, weight, squares, EPS))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
