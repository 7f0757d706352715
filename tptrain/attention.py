"""Causal attention of this rank's heads: PyTorch's fused kernels, and on a CPU in bf16 a backward pass of our own.

Shapes: B batch, T sequence, H query heads, K KV heads, G = H / K queries that share a KV head, d head_dim, of one rank.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # query positions at once: a block skips the keys after its last query
SCORES = 2**19  # at once, 1 MiB in bf16: half of a core's second-level cache


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v with the causal mask: q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return _Attention.apply(q, k, v)  # type: ignore[return-value]
    return _sdpa(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d), 2 x (B, K, T, d)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


class _Attention(torch.autograd.Function):
    """PyTorch's kernel forward; backward, scores again by blocks as in flash attention (Dao et al. 2022,
    arXiv:2205.14135), but in whole matrix products, which a CPU's bf16 units need. PyTorch's takes about twice as long
    (docs/performance.md).

    Backward works on X = B * K independent problems, each of T * G queries, ordered by time, over T keys.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(q, k, v)
        return _sdpa(q, k, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        B, T, K, d = k.shape
        q, grad = (x.reshape(B, T, K, -1, d).transpose(1, 2).reshape(B * K, -1, d) for x in (q, grad))  # (X, T*G, d)
        k, v = (x.transpose(1, 2).reshape(B * K, T, d) for x in (k, v))  # (X, T, d)
        q = q * d**-0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for some, queries, keys, mask in _blocks(q, k):
            g, query, key = grad[some, queries], q[some, queries], k[some, keys]
            scores = torch.bmm(query, key.transpose(1, 2))  # (x, b*G, n)
            scores[..., -mask.shape[1] :] += mask
            p = scores.softmax(-1)  # (x, b*G, n), summed in float32
            grad_v[some, keys] += torch.bmm(p.transpose(1, 2), g)
            grad_p = torch.bmm(g, v[some, keys].transpose(1, 2))  # (x, b*G, n)
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_p, p, -1, p.dtype
            )  # p * (grad_p - sum(p * grad_p))
            grad_k[some, keys] += torch.bmm(grad_scores.transpose(1, 2), query)
            torch.bmm(grad_scores, key, out=grad_q[some, queries])
        grad_q = (grad_q * d**-0.5).view(B, K, T, -1, d).transpose(1, 2).reshape(B, T, -1, d)
        return grad_q, *(x.view(B, K, T, d).transpose(1, 2) for x in (grad_k, grad_v))


@cache
def _mask(length: int, G: int, dtype: torch.dtype) -> Tensor:
    """(b*G, b): what hides later keys from queries; one tensor for all layers and steps."""
    time = torch.arange(length)
    unseen = time > time.repeat_interleave(G).unsqueeze(1)
    return torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Problems, queries and keys of each block, and the additive mask of the keys that only some of its queries see."""
    X, T, _ = k.shape
    G = q.shape[1] // T
    for start in range(0, T, BLOCK):
        end = min(start + BLOCK, T)
        mask = _mask(end - start, G, q.dtype)
        count = max(1, SCORES // (mask.shape[0] * end))
        for first in range(0, X, count):
            yield slice(first, first + count), slice(start * G, end * G), slice(end), mask
