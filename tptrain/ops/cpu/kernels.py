"""The operations by the kernels of elementwise.c and attention.c: one walk over memory each.

Tensors are float32 or bfloat16, all of one type, on the CPU.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tptrain.ops import reference
from tptrain.ops.cpu.library import Library
from tptrain.ops.table import Operations

GATES = {"silu": False, "gelu_new": True, "gelu_pytorch_tanh": True}  # activations that are computed; whether GELU
BLOCK = 64  # rows whose gradients to a norm's weight are summed before they are added to those of other rows
HAS_MATRIX_UNITS = torch.cpu.get_capabilities().get("amx_bf16", False)


def kernel_table(library: Library, others: Operations) -> Operations:
    """`others`, with the kernels in place of what they can do."""
    kernels = Kernels(library, others)
    names = ["rms_norm", "rms_norm_backward", "add_rms_norm", "add_rms_norm_backward", "gate_product"]
    names += ["gate_product_backward", "rotate", "rotate_qkv", "rotate_qkv_backward", "attention", "masked_attention"]
    names += ["statistics", "logit_gradient_"]
    backend = f"C kernels {library.digest}, else {others.backend}"
    return replace(others, backend=backend, **{name: getattr(kernels, name) for name in names})


class Kernels:
    """Methods of the operations' names and contracts."""

    def __init__(self, library: Library, others: Operations) -> None:
        self.run, self.others = library.run, others

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if weight.dtype != x.dtype:  # of a norm that multiplies by 1 + weight
            return self.others.rms_norm(x, weight, eps)
        x = x.contiguous()
        normed, squares = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        self.run("add_rms_norm", *_sizes(x), eps, x, None, weight, None, normed, squares)
        return normed, squares

    def add_rms_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        if weight.dtype != x.dtype:
            return self.others.add_rms_norm(x, y, weight, eps)
        x, y = x.contiguous(), y.contiguous()
        total, normed = torch.empty_like(x), torch.empty_like(x)
        squares = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        self.run("add_rms_norm", *_sizes(x), eps, x, y, weight, total, normed, squares)
        return total, normed, squares

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, squares: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if weight.dtype != x.dtype:
            return self.others.rms_norm_backward(grad, x, weight, squares, eps)
        return self._norm_backward(None, grad, x, weight, squares, eps)

    def add_rms_norm_backward(
        self, grad_total: Tensor, grad: Tensor, total: Tensor, weight: Tensor, squares: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if weight.dtype != total.dtype:
            return self.others.add_rms_norm_backward(grad_total, grad, total, weight, squares, eps)
        return self._norm_backward(grad_total.contiguous(), grad, total, weight, squares, eps)

    def _norm_backward(
        self, grad_total: Tensor | None, grad: Tensor, x: Tensor, weight: Tensor, squares: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, grad = x.contiguous(), grad.contiguous()
        half, N, D = _sizes(x)
        grad_x, grad_weight = torch.empty_like(x), squares.new_empty(-(-N // BLOCK), D)
        self.run(
            "add_rms_norm_backward", half, N, D, BLOCK, eps, grad_total, grad, x, weight, squares, grad_x, grad_weight
        )
        return grad_x, grad_weight.sum(0)

    def gate_product(self, x: Tensor, act: str) -> Tensor:
        if act not in GATES:
            return self.others.gate_product(x, act)
        x = x.contiguous()
        half, N, F = _sizes(x)
        y = x.new_empty(N, F // 2)
        self.run("gate_product", half, N, F // 2, GATES[act], x, y)
        return y

    def gate_product_backward(self, grad: Tensor, x: Tensor, act: str) -> Tensor:
        if act not in GATES:
            return self.others.gate_product_backward(grad, x, act)
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        self.run("gate_product_backward", *_sizes(grad), GATES[act], grad, x.contiguous(), grad_x)
        return grad_x

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        self._rotate(x.contiguous(), (y, None, None), cos, sin, (x.shape[2], 0), back=False)
        return y

    def rotate_qkv(self, qkv: Tensor, cos: Tensor, sin: Tensor, heads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _, d = qkv.shape
        q, k, v = (qkv.new_empty(B, T, count, d) for count in heads)
        self._rotate(qkv.contiguous(), (q, k, v), cos, sin, (heads[0], heads[1]), back=False)
        return q, k, v

    def rotate_qkv_backward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = q.shape[2], k.shape[2]
        qkv = q.new_empty(*q.shape[:2], heads[0] + 2 * heads[1], q.shape[3])
        self._rotate(qkv, (q.contiguous(), k.contiguous(), v.contiguous()), cos, sin, heads, back=True)
        return qkv

    def _rotate(
        self,
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
        self.run("rotate_qkv", half, B * T, T, *heads, d, back, cos.contiguous(), sin.contiguous(), qkv, *parts)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _Attention.apply(q, k, v, None, None, None, self)  # type: ignore[return-value]

    def masked_attention(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        return _Attention.apply(q, k, v, window, scale, softcap, self)  # type: ignore[return-value]

    def statistics(self, logits: Tensor, local: Tensor) -> Tensor:
        lse, at_target = both = torch.empty(2, len(logits))
        self.run("statistics", *_sizes(logits), logits.contiguous(), local.contiguous(), lse, at_target)
        return both.unsqueeze(0)

    def logit_gradient_(self, logits: Tensor, lse: Tensor, local: Tensor, at_target: Tensor, scale: float) -> Tensor:
        assert logits.is_contiguous()
        self.run("logit_gradient", *_sizes(logits), scale, logits, lse.contiguous(), local.contiguous())
        return logits


class _Attention(torch.autograd.Function):
    """Our kernels, but for the forward pass in bf16 where PyTorch's uses the CPU's matrix units. PyTorch's others take
    1.6 times as long (docs/performance.md).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        scale: float | None,
        softcap: float | None,
        kernels: Kernels,
    ) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, k, v))
        ctx.save_for_backward(q, k, v)
        ctx.kernels, ctx.scores = kernels, (window, scale, softcap)
        if q.dtype == torch.bfloat16 and HAS_MATRIX_UNITS and softcap is None:
            return reference.masked_attention(q, k, v, *ctx.scores)
        y = torch.empty_like(q)  # (B, T, H, d)
        _run_attention(kernels, "attention_forward", ctx.scores, q, k, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        _run_attention(ctx.kernels, "attention_backward", ctx.scores, q, k, v, grad.contiguous(), *grads)
        return *grads, None, None, None, None


def _run_attention(
    kernels: Kernels,
    name: str,
    scores: tuple[int | None, float | None, float | None],
    q: Tensor,
    k: Tensor,
    *others: Tensor,
) -> None:
    """A kernel over all B * K problems. Raises MemoryError."""
    B, T, H, d = q.shape
    K, (window, scale, softcap) = k.shape[2], scores
    sizes = B * K, T, K, H // K, d, q.dtype == torch.bfloat16, window or T
    if kernels.run(name, *sizes, float(scale or d**-0.5), float(softcap or 0), q, k, *others):
        raise MemoryError(name)


def _sizes(x: Tensor) -> tuple[bool, int, int]:
    """Whether x is bfloat16, its rows and their length."""
    return x.dtype == torch.bfloat16, x.shape[:-1].numel(), x.shape[-1]
