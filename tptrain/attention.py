"""Causal attention of this rank's heads: PyTorch's fused kernels, and on a CPU a backward pass of our own.

Shapes: B batch, T sequence, H query heads, K KV heads, G = H / K queries that share a KV head, d head_dim, of one rank.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # query positions at once: a block skips the keys after its last query
SCORES_BYTES = 2**20  # of the scores at once: half of a core's second-level cache
WIDE = 64  # head_dim from which on float32 gains too


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v with the causal mask: q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or q.shape[-1] >= WIDE):
        return _Attention.apply(q, k, v)  # type: ignore[return-value]
    return _sdpa(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d), 2 x (B, K, T, d)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


class _Attention(torch.autograd.Function):
    """PyTorch's kernel forward; backward, scores again by blocks as in flash attention (Dao et al. 2022,
    arXiv:2205.14135), but in whole matrix products. PyTorch's takes 1.3 times as long in float32, and twice in bf16,
    where a CPU's matrix units need them (docs/performance.md).

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
        for some, queries, keys, unseen in _blocks(q, k):
            g, query, key = grad[some, queries], q[some, queries], k[some, keys]
            p = torch.bmm(query, key.transpose(1, 2))  # (x, b*G, n), the scores
            p[..., -unseen.shape[1] :].masked_fill_(unseen, -torch.inf)
            torch.softmax(p, -1, out=p)  # summed in float32
            grad_v[some, keys].baddbmm_(p.transpose(1, 2), g)
            grad_scores = torch.bmm(g, v[some, keys].transpose(1, 2))  # (x, b*G, n), of p until the next line
            torch.ops.aten._softmax_backward_data.out(grad_scores, p, -1, p.dtype, grad_input=grad_scores)
            grad_k[some, keys].baddbmm_(grad_scores.transpose(1, 2), query)
            torch.bmm(grad_scores, key, out=grad_q[some, queries])
        grad_q = (grad_q * d**-0.5).view(B, K, T, -1, d).transpose(1, 2).reshape(B, T, -1, d)
        return grad_q, *(x.view(B, K, T, d).transpose(1, 2) for x in (grad_k, grad_v))


@cache
def _unseen(length: int, G: int) -> Tensor:
    """(b*G, b): the later keys of each query; one tensor for all layers and steps."""
    time = torch.arange(length)
    return time > time.repeat_interleave(G).unsqueeze(1)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Problems, queries and keys of each block, and which of its last keys its queries do not see."""
    X, T, _ = k.shape
    G = q.shape[1] // T
    for start in range(0, T, BLOCK):
        end = min(start + BLOCK, T)
        unseen = _unseen(end - start, G)
        count = max(1, SCORES_BYTES // (q.itemsize * len(unseen) * end))
        for first in range(0, X, count):
            yield slice(first, first + count), slice(start * G, end * G), slice(end), unseen
