"""Causal attention of this rank's heads: PyTorch's fused kernels, on a CPU with AVX-512 our own, native/attention.c.

Shapes: B batch, T sequence, H query heads, K KV heads, G = H / K queries that share a KV head, d head_dim, of one rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.native import run, serves

HAS_MATRIX_UNITS = torch.cpu.get_capabilities().get("amx_bf16", False)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v with the causal mask: q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    if serves(q, k, v):
        return _Attention.apply(q, k, v)  # type: ignore[return-value]
    return _sdpa(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d), 2 x (B, K, T, d)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Our kernels, but for the forward pass in bf16 where PyTorch's uses the CPU's matrix units. PyTorch's others take
    1.6 times as long (docs/performance.md).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (x.contiguous() for x in (q, k, v))
        ctx.save_for_backward(q, k, v)
        if q.dtype == torch.bfloat16 and HAS_MATRIX_UNITS:
            return _sdpa(q, k, v)
        y = torch.empty_like(q)  # (B, T, H, d)
        _run("attention_forward", q, k, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        _run("attention_backward", q, k, v, grad.contiguous(), *grads)
        return grads


def _run(name: str, q: Tensor, k: Tensor, *others: Tensor) -> None:
    """A kernel over all B * K problems. Raises MemoryError."""
    B, T, H, d = q.shape
    K = k.shape[2]
    if run(name, B * K, T, K, H // K, d, q.dtype == torch.bfloat16, q, k, *others):
        raise MemoryError(name)
