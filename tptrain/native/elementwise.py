"""What fused.py computes, by elementwise.c: functions of the same names, which return None for what is not for them."""

import torch
from torch import Tensor

from tptrain.native import run, serves

BLOCK = 64  # rows whose gradients to a norm's weight are summed before they are added to those of other rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    if not serves(x, weight):
        return None
    x = x.contiguous()
    normed, squares = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    run("add_rms_norm", *_sizes(x), eps, x, None, None, weight, None, normed, squares)
    return normed, squares


def add_rms_norm(
    x: Tensor, y: Tensor, other: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    if not serves(x, y, weight):
        return None
    x, y, other = x.contiguous(), y.contiguous(), None if other is None else other.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    squares = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    run("add_rms_norm", *_sizes(x), eps, x, y, other, weight, total, normed, squares)
    return total, normed, squares


def add(x: Tensor, y: Tensor) -> Tensor | None:
    if not serves(x, y):
        return None
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    run("add", *_sizes(x), x.contiguous(), y.contiguous(), total)
    return total


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, squares: Tensor, eps: float
) -> tuple[Tensor, Tensor] | None:
    return _norm_backward(None, grad, x, weight, squares, eps)


def add_rms_norm_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, weight: Tensor, squares: Tensor, eps: float
) -> tuple[Tensor, Tensor] | None:
    return _norm_backward(grad_total.contiguous(), grad, total, weight, squares, eps)


def _norm_backward(
    grad_total: Tensor | None, grad: Tensor, x: Tensor, weight: Tensor, squares: Tensor, eps: float
) -> tuple[Tensor, Tensor] | None:
    if not serves(x, grad, weight):
        return None
    x, grad = x.contiguous(), grad.contiguous()
    half, N, D = _sizes(x)
    grad_x, grad_weight = torch.empty_like(x), squares.new_empty(-(-N // BLOCK), D)
    run("add_rms_norm_backward", half, N, D, BLOCK, eps, grad_total, grad, x, weight, squares, grad_x, grad_weight)
    return grad_x, grad_weight.sum(0)


def gate_product(x: Tensor, act: str) -> Tensor | None:
    if act != "silu" or not serves(x):
        return None
    x = x.contiguous()
    half, N, F = _sizes(x)
    y = x.new_empty(N, F // 2)
    run("gate_product", half, N, F // 2, x, y)
    return y


def gated_backward(grad: Tensor, x: Tensor, act: str) -> Tensor | None:
    if act != "silu" or not serves(x, grad):
        return None
    grad, grad_x = grad.contiguous(), torch.empty_like(x)
    run("gate_product_backward", *_sizes(grad), grad, x.contiguous(), grad_x)
    return grad_x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    if not serves(x):
        return None
    y = torch.empty(x.shape, dtype=x.dtype)
    _rotate(x.contiguous(), (y, None, None), cos, sin, (x.shape[2], 0), back=False)
    return y


def rotate_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, heads: list[int]) -> tuple[Tensor, Tensor, Tensor] | None:
    if not serves(qkv):
        return None
    B, T, _, d = qkv.shape
    q, k, v = (qkv.new_empty(B, T, count, d) for count in heads)
    _rotate(qkv.contiguous(), (q, k, v), cos, sin, (heads[0], heads[1]), back=False)
    return q, k, v


def rotate_qkv_backward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    if not serves(q, k, v):
        return None
    heads = q.shape[2], k.shape[2]
    qkv = q.new_empty(*q.shape[:2], heads[0] + 2 * heads[1], q.shape[3])
    _rotate(qkv, (q.contiguous(), k.contiguous(), v.contiguous()), cos, sin, heads, back=True)
    return qkv


def _rotate(
    qkv: Tensor,
    parts: tuple[Tensor, Tensor | None, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    back: bool,
) -> None:
    """From qkv (B, T, H + 2 K, d) to its parts, or back."""
    B, T, _, d = qkv.shape
    half = qkv.dtype == torch.bfloat16
    run("rotate_qkv", half, B * T, T, *heads, d, back, cos.contiguous(), sin.contiguous(), qkv, *parts)


def statistics(logits: Tensor, local: Tensor) -> Tensor | None:
    if not serves(logits):
        return None
    lse, at_target = both = torch.empty(2, len(logits))
    run("statistics", *_sizes(logits), logits.contiguous(), local.contiguous(), lse, at_target)
    return both.unsqueeze(0)


def logit_gradient(logits: Tensor, lse: Tensor, local: Tensor, scale: float) -> Tensor | None:
    """It takes the place of the logits."""
    if not serves(logits):
        return None
    logits = logits.contiguous()
    run("logit_gradient", *_sizes(logits), scale, logits, lse.contiguous(), local.contiguous())
    return logits


def _sizes(x: Tensor) -> tuple[bool, int, int]:
    """Whether x is bfloat16, its rows and their length."""
    return x.dtype == torch.bfloat16, x.shape[:-1].numel(), x.shape[-1]
