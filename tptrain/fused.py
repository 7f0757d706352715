"""The element-wise parts of a model, forward and backward: each is one pass over memory where it is compiled, a few
where it is not, with the same results. What is kept for the backward pass is the input alone.

Shapes: N tokens, D hidden, F FFN width of a rank, d head_dim; c tokens of a chunk, v columns of the vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.native import elementwise

SHAPES = 64  # for which a function may be compiled: of layers and heads, of a last chunk, a last batch of a validation
aten = torch.ops.aten
_APPROXIMATE = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # model.hidden_act -> F.gelu's


class _Fusible:
    """A function that is compiled on its first call, if `compile_all` has been called by then; a `kernel`, which may
    decline by returning None, goes before it.
    """

    enabled = False

    def __init__(self, function: Callable[..., Any], kernel: Callable[..., Any] | None = None) -> None:
        self.function, self.kernel = function, kernel
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.kernel is not None and (result := self.kernel(*arguments)) is not None:
            return result
        if not _Fusible.enabled:
            return self.function(*arguments)
        if self.compiled is None:
            torch._dynamo.config.recompile_limit = SHAPES
            self.compiled = torch.compile(self.function, dynamic=False, fullgraph=True)
        # Detached: whether autograd looks on makes no other code.
        return self.compiled(*(each.detach() if isinstance(each, Tensor) else each for each in arguments))


def _fusible(kernel: Callable[..., Any]) -> Callable[[Callable[..., Any]], _Fusible]:
    return lambda function: _Fusible(function, kernel)


def compile_all(enabled: bool) -> None:
    """Whether this process compiles what is below. Compiling takes seconds once; torch caches it on disk."""
    _Fusible.enabled = enabled


# -------------------------------------------------------------------------------------------------------------- RMSNorm


@_fusible(elementwise.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang & Sennrich 2019, arXiv:1910.07467): that, in x's
    precision, and the sum of squares, float32, for the backward pass.
    """
    return _rms_norm(x.float(), weight, eps, x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    squares = x.square().sum(-1, keepdim=True)
    return (x * _reciprocal_root(squares, x, eps) * weight.float()).to(dtype), squares


def _reciprocal_root(squares: Tensor, x: Tensor, eps: float) -> Tensor:
    """Not kept instead of the sum: what is made of a sum and kept costs a CPU one more walk over x."""
    return (squares / x.shape[-1] + eps).rsqrt()


@_fusible(elementwise.rms_norm_backward)
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, squares: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients to x, in its precision, and to the weight, float32."""
    scale = _reciprocal_root(squares, x, eps)
    unit, wide = x.float() * scale, grad.float()
    weighted = wide * weight.float()
    grad_x = (weighted - unit * (weighted * unit).mean(-1, keepdim=True)) * scale
    return grad_x.to(x.dtype), _column_sums((wide * unit).flatten(0, -2))


def _column_sums(x: Tensor) -> Tensor:
    """(N, D) -> (D,), by two levels: one is compiled for a CPU to a walk down every column."""
    return x.view(math.gcd(len(x), 64), -1, x.shape[1]).sum(1).sum(0)


@_fusible(elementwise.add_rms_norm)
def add_rms_norm(
    x: Tensor, y: Tensor, other: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + (y + other), and `rms_norm` of it, taken before it is rounded."""
    total = x.float() + (y.float() if other is None else y.float() + other.float())
    return total.to(x.dtype), *_rms_norm(total, weight, eps, x.dtype)


@_fusible(elementwise.add_rms_norm_backward)
def add_rms_norm_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, weight: Tensor, squares: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients to x and, the same, to y; and to the weight."""
    grad_x, grad_weight = rms_norm_backward.function(grad, total, weight, squares, eps)
    return grad_x + grad_total, grad_weight


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, without autograd."""
    result = elementwise.add(x, y)
    return torch.add(x, y) if result is None else result


# ---------------------------------------------------------------------------------------------------------- activations


def activated(x: Tensor, act: str) -> Tensor:
    return F.silu(x) if act == "silu" else F.gelu(x, approximate=_APPROXIMATE[act])


@_fusible(elementwise.gate_product)
def gate_product(x: Tensor, act: str) -> Tensor:
    """gate and up side by side, (N, 2 F) -> act(gate) * up, (N, F); without autograd, for which there is `gated`."""
    gate, up = x.chunk(2, dim=-1)
    return activated(gate, act) * up


@_fusible(elementwise.gated_backward)
def _gated_backward(grad: Tensor, x: Tensor, act: str) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    if act == "silu":
        grad_gate = aten.silu_backward(grad * up, gate)
    else:
        grad_gate = aten.gelu_backward(grad * up, gate, approximate=_APPROXIMATE[act])
    return torch.cat((grad_gate, grad * activated(gate, act)), dim=-1)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, act: str) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.act = act
        return gate_product(x, act)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _gated_backward(grad, ctx.saved_tensors[0], ctx.act), None


def gated(x: Tensor, act: str) -> Tensor:
    """gate and up side by side, (N, 2 F) -> act(gate) * up, (N, F)."""
    return _Gated.apply(x, act)  # type: ignore[return-value]


# --------------------------------------------------------------------------------------------------------------- rotary


@_fusible(elementwise.rotate)
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)  # each (B, T, heads, d/2)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rotation)
        return _rotate(x, rotation[0], rotation[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors[0]
        return _rotate(grad, cos, -sin), None  # back by the same angle


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """(B, T, heads, d) turned by position; rotation (2, T, 1, d/2), cosines and sines, float32."""
    return _Rotate.apply(x, rotation)  # type: ignore[return-value]


@_fusible(elementwise.rotate_qkv)
def _rotate_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, heads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split(heads, dim=2)
    return _rotate.function(q, cos, sin), _rotate.function(k, cos, sin), v.clone()


@_fusible(elementwise.rotate_qkv_backward)
def _rotate_qkv_backward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat((_rotate.function(q, cos, -sin), _rotate.function(k, cos, -sin), v), dim=2)


class _RotateQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotation: Tensor, heads: list[int]) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.save_for_backward(rotation)
        return _rotate_qkv(qkv, rotation[0], rotation[1], heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _rotate_qkv_backward(*grads, *ctx.saved_tensors[0]), None, None


def rotate_qkv(qkv: Tensor, rotation: Tensor, heads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H + 2 K, d) -> q (B, T, H, d) and k (B, T, K, d) turned by position, and v (B, T, K, d), each of its own.

    As a part of qkv, v would keep all three for the backward pass. `heads` is [H, K, K].
    """
    return _RotateQKV.apply(qkv, rotation, heads)  # type: ignore[return-value]


# ----------------------------------------------------------------------------------------------------------------- loss


@_Fusible
def _statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of (c, v): its greatest, the sum of exp(it - the greatest), and `statistics`' second; (c,) each."""
    columns = logits.shape[1]
    inside = (local >= 0) & (local < columns)
    at_target = logits.gather(1, local.clamp(0, columns - 1).unsqueeze(1)).squeeze(1).float()
    wide = logits.float()
    top = wide.amax(-1, keepdim=True)
    return top.squeeze(1), (wide - top).exp().sum(-1), torch.where(inside, at_target, 0.0)


def statistics(logits: Tensor, local: Tensor) -> Tensor:
    """log sum exp of each row of (c, v), and its element at column `local`, zero where that is outside: (1, 2, c)."""
    if (result := elementwise.statistics(logits, local)) is not None:
        return result
    if logits.shape[1] == 0:
        return torch.tensor([-torch.inf, 0.0], device=logits.device).view(1, 2, 1).repeat(1, 1, len(logits))
    top, total, at_target = _statistics(logits, local)
    return torch.stack([top + total.log(), at_target]).unsqueeze(0)  # compiled too, log costs a CPU a second walk


@_Fusible
def _scaled_softmax(logits: Tensor, lse: Tensor, scale: float) -> Tensor:
    return ((logits.float() - lse.unsqueeze(1)).exp() * scale).to(logits.dtype)


def logit_gradient(logits: Tensor, lse: Tensor, local: Tensor, at_target: Tensor, scale: float) -> Tensor:
    """scale * (exp(logits - lse) - 1 at column `local`): (c, v), in the logits' precision.

    The targets' columns, whose logits are `at_target`, are written apart: to compare each column with the target takes
    a CPU as long as the rest.
    """
    if (result := elementwise.logit_gradient(logits, lse, local, scale)) is not None:
        return result
    grad = _scaled_softmax(logits, lse, scale)  # (c, v)
    if grad.numel() > 0:
        rows, column = torch.arange(len(local), device=local.device), local.clamp(0, grad.shape[1] - 1)  # (c,) each
        value = (((at_target - lse).exp() - 1.0) * scale).to(grad.dtype)
        grad[rows, column] = torch.where(column == local, value, grad[rows, column])
    return grad
