"""The CPU's own backward pass of attention, held to PyTorch's plain one in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.attention import WIDE, attention


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By the definition, every score at once: (B, T, H, d) and 2 x (B, T, K, d) -> (B, T, H, d)."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))  # (B, T, H, d)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5  # (B, H, T, T)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", F.softmax(scores.masked_fill(later, -torch.inf), -1), v)


@pytest.mark.parametrize(("dtype", "d", "most"), [(torch.float32, WIDE, 2e-6), (torch.bfloat16, 32, 2e-2)])
@pytest.mark.parametrize(("T", "H", "K"), [(1, 2, 2), (128, 4, 4), (300, 4, 2), (257, 3, 1)])
def test_gradients_are_those_of_the_definition(T: int, H: int, K: int, dtype: torch.dtype, d: int, most: float) -> None:
    torch.manual_seed(0)
    made = [torch.randn(2, T, heads, d).to(dtype) for heads in (H, K, K, H)]
    *inputs, grad = made
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    y, expected = attention(*ours), _plain(*exact)
    assert "_Attention" in type(y.grad_fn).__name__, "this is to test our own backward pass"
    results = [y, *torch.autograd.grad(y, ours, grad)]
    exact_results = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for name, result, right in zip(["y", *"qkv"], results, exact_results, strict=True):
        error = (result - right).norm() / right.norm().clamp(min=1e-9)  # one key: no gradient to q and k
        assert error < most, (name, error)
