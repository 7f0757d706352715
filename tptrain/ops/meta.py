"""What each operation makes, without computing it: shapes and types on the meta device, for a dry run of a model.

Compiled operations and kernels in C make nothing but their results; plain PyTorch also makes what lies between, so its
functions are run on meta tensors as they are.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tptrain.ops.table import REFERENCE, Operations


def meta_table(table: Operations) -> Operations:
    """The rules of the operations that `table` computes with."""
    if table.backend == REFERENCE.backend:
        return replace(table, attention=_attention)
    rules: dict[str, Any] = {
        "rms_norm": lambda x, weight, eps: (torch.empty_like(x), _row_of(x)),
        "add_rms_norm": lambda x, y, weight, eps: (torch.empty_like(x), torch.empty_like(x), _row_of(x)),
        "rms_norm_backward": lambda grad, x, weight, *_: (torch.empty_like(x), weight.float()),
        "add_rms_norm_backward": lambda grad_total, grad, x, weight, *_: (torch.empty_like(x), weight.float()),
        "gate_product": lambda x, act: x.new_empty(len(x), x.shape[1] // 2),
        "gate_product_backward": lambda grad, x, act: torch.empty_like(x),
        "rotate": lambda x, cos, sin: x.new_empty(x.shape),
        "rotate_qkv": lambda qkv, cos, sin, heads: tuple(
            qkv.new_empty(*qkv.shape[:2], count, qkv.shape[3]) for count in heads
        ),
        "rotate_qkv_backward": lambda q, k, v, cos, sin: q.new_empty(
            *q.shape[:2], q.shape[2] + 2 * k.shape[2], q.shape[3]
        ),
        "attention": _kernel_attention if table.device == "cpu" else _attention,
        "statistics": lambda logits, local: logits.new_empty((1, 2, len(logits)), dtype=torch.float32),
        "logit_gradient_": lambda logits, lse, local, at_target, scale: logits,
    }
    if table.device == "cpu":
        rules["masked_attention"] = lambda q, k, v, *mask: _kernel_attention(q, k, v)
    return replace(table, **rules)


def _row_of(x: Tensor) -> Tensor:
    """A float32 for each row of x."""
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's: a fused kernel, but for grouped queries in float32 on CUDA, where k and v are repeated for each query
    head and the T x T probabilities are kept (F.scaled_dot_product_attention's documentation, PyTorch 2.13).
    """
    if q.dtype == torch.float32 and q.shape[2] != k.shape[2]:
        return REFERENCE.attention(q, k, v)
    return _Attention.apply(q, k, v, True)  # type: ignore[return-value]


def _kernel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _Attention.apply(q, k, v, False)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    """A fused kernel: keeps its inputs and, with `keeps_output`, its output and the log-sum-exp of each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keeps_output: bool) -> Tensor:  # type: ignore[override]
        q, k, v = (x.contiguous() for x in (q, k, v))
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, *((y, _row_of(q)) if keeps_output else ()))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None
