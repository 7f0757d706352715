"""The CPU's own kernels of attention, held to the plain definition in float64."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.ops.choose import choose
from tptrain.ops.table import Operations

Mask = tuple[int | None, float | None, float | None]  # window, scale, softcap
PLAIN: Mask = (None, None, None)


def _plain(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, softcap: float | None) -> Tensor:
    """By the definition, every score at once: (B, T, H, d) and 2 x (B, T, K, d) -> (B, T, H, d)."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))  # (B, T, H, d)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (scale or q.shape[-1] ** -0.5)  # (B, H, T, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    back = torch.arange(q.shape[1]).unsqueeze(1) - torch.arange(q.shape[1])  # (T, T): how far a key lies behind
    hidden = (back < 0) | (back >= (window or q.shape[1]))
    return torch.einsum("bhij,bjhd->bihd", F.softmax(scores.masked_fill(hidden, -torch.inf), -1), v)


# T, H, K, d: within a block of queries and a tile, whole blocks, and beyond them
SHAPES = [(1, 2, 2, 32), (32, 2, 1, 16), (128, 4, 4, 64), (300, 4, 2, 32), (257, 3, 1, 80), (75, 6, 2, 20)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(("T", "H", "K", "d"), SHAPES)
def test_results_are_those_of_the_definition(
    T: int,
    H: int,
    K: int,
    d: int,
    dtype: torch.dtype,
    most: float,
    threads: int,
    kernels: Operations,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tptrain.ops.cpu.kernels.HAS_MATRIX_UNITS", False)  # our own in bf16, too
    torch.set_num_threads(threads)
    _check(T, H, K, d, PLAIN, dtype, most, kernels)


# A window of less than a tile, of some, of a tile and a key more, of all keys but one; caps that bend most scores.
MASKS = [(7, None, None), (100, 0.3, None), (33, None, None), (299, None, 3.0), (None, 0.1, 5.0), (64, 0.3, 2.0)]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("mask", MASKS)
def test_windows_scales_and_soft_caps(
    mask: Mask, dtype: torch.dtype, most: float, kernels: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tptrain.ops.cpu.kernels.HAS_MATRIX_UNITS", False)
    _check(300, 4, 2, 32, mask, dtype, most, kernels)


def _check(T: int, H: int, K: int, d: int, mask: Mask, dtype: torch.dtype, most: float, kernels: Operations) -> None:
    torch.manual_seed(0)
    operands = [(2 * torch.randn(2, T, heads, d)).to(dtype) for heads in (H, K, K, H)]
    *inputs, grad = operands
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    y = kernels.attention(*ours) if mask == PLAIN else kernels.masked_attention(*ours, *mask)
    expected = _plain(exact[0], exact[1], exact[2], *mask)
    assert "_Attention" in type(y.grad_fn).__name__, "this is to test our own kernels"
    results = [y, *torch.autograd.grad(y, ours, grad)]
    exact_results = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for name, result, right in zip(["y", *"qkv"], results, exact_results, strict=True):
        error = (result - right).norm() / right.norm().clamp(min=1e-9)  # one key: no gradient to q and k
        assert error < most, (name, error)


def test_great_scores_neither_overflow_nor_hide_what_is_no_number(kernels: Operations) -> None:
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 64, 1, 32))
    y = kernels.attention(100 * q, 100 * k, v)  # scores in the tens of thousands: all weight on one key
    assert torch.allclose(y, _plain(100 * q.double(), 100 * k.double(), v.double(), *PLAIN).float(), atol=1e-4)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), (q, k, v)))
    spoilt = q.detach().clone()
    spoilt[0, 7] = torch.nan
    y = kernels.attention(spoilt, k, v)[0, :, 0]
    assert y[7].isnan().all()
    assert y[:7].isfinite().all()
    assert y[8:].isfinite().all()


def test_without_a_compiler_pytorch_s_kernels_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    table = choose("cpu", "auto", tmp_path)
    assert table.backend == "PyTorch"
    q, k, v = torch.randn(3, 2, 9, 2, 16)
    torch.testing.assert_close(table.attention(q, k, v), _plain(q, k, v, *PLAIN))
