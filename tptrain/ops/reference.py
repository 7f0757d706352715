"""The operations in plain PyTorch: what the others are held to, and what `compiled.py` compiles.

Each is a function of tensors without autograd; the modules of `nn/` pair forward and backward. What is kept for the
backward pass is the input, and statistics of its rows. Shapes: N tokens, D hidden, F FFN width of a rank, d head_dim;
c tokens of a chunk, v columns of the vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
APPROXIMATE = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}  # model.hidden_act -> F.gelu's


# -------------------------------------------------------------------------------------------------------------- RMSNorm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang & Sennrich 2019, arXiv:1910.07467): that, in x's
    precision, and the sum of squares (..., 1), float32, for the backward pass.
    """
    return _rms_norm(x.float(), weight, eps, x.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    squares = x.square().sum(-1, keepdim=True)
    return (x * _reciprocal_root(squares, x, eps) * weight.float()).to(dtype), squares


def _reciprocal_root(squares: Tensor, x: Tensor, eps: float) -> Tensor:
    """Not kept instead of the sum: what is made of a sum and kept costs a CPU one more walk over x."""
    return (squares / x.shape[-1] + eps).rsqrt()


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


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + y, and `rms_norm` of it, taken before it is rounded."""
    total = x.float() + y.float()
    return total.to(x.dtype), *_rms_norm(total, weight, eps, x.dtype)


def add_rms_norm_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, weight: Tensor, squares: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients to x and, the same, to y; and to the weight."""
    grad_x, grad_weight = rms_norm_backward(grad, total, weight, squares, eps)
    return grad_x + grad_total, grad_weight


# ---------------------------------------------------------------------------------------------------------- activations


def gate_product(x: Tensor, act: str) -> Tensor:
    """gate and up side by side, (N, 2 F) -> act(gate) * up, (N, F)."""
    gate, up = x.chunk(2, dim=-1)
    return activation(gate, act) * up


def activation(x: Tensor, act: str) -> Tensor:
    return F.silu(x) if act == "silu" else F.gelu(x, approximate=APPROXIMATE[act])


def gate_product_backward(grad: Tensor, x: Tensor, act: str) -> Tensor:
    """The gradient to gate and up side by side, (N, 2 F)."""
    gate, up = x.chunk(2, dim=-1)
    if act == "silu":
        grad_gate = aten.silu_backward(grad * up, gate)
    else:
        grad_gate = aten.gelu_backward(grad * up, gate, approximate=APPROXIMATE[act])
    return torch.cat((grad_gate, grad * activation(gate, act)), dim=-1)


# --------------------------------------------------------------------------------------------------------------- rotary


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, T, heads, d), its dims i and i + d/2 turned; cos and sin (T, 1, d/2), float32."""
    left, right = x.chunk(2, dim=-1)  # each (B, T, heads, d/2)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def rotate_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, heads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H + 2 K, d) -> q (B, T, H, d) and k (B, T, K, d) turned, and v (B, T, K, d); `heads` is [H, K, K]."""
    q, k, v = qkv.split(heads, dim=2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.clone()


def rotate_qkv_backward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient to qkv out of those to its parts."""
    return torch.cat((rotate(q, cos, -sin), rotate(k, cos, -sin), v), dim=2)


# ------------------------------------------------------------------------------------------------------------ attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v with the causal mask: q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d).

    The one operation that brings its own backward pass: PyTorch's fused kernels.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d), 2 x (B, K, T, d)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, softcap: float | None
) -> Tensor:
    """`attention`, each query over the last `window` keys only, its scores times `scale` instead of 1 / sqrt(d), and
    with a softcap c their c tanh(s / c) instead of s (Gemma 2, arXiv:2408.00118).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d), 2 x (B, K, T, d)
    T, mask = q.shape[2], None
    if window is not None or softcap is not None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril_()
        if window is not None:
            mask = mask.triu_(1 - window)
    if mask is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    else:
        y = attend(q, k, v, mask, scale, softcap)
    return y.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None) -> Tensor:
    """Attention to keys that lie in a cache: q (B, H, T, d), k and v (B, K, S, d) -> (B, H, T, d).

    `mask`: (..., T, S), which keys a query sees; None: all of them.
    """
    groups = q.shape[1] // k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups > 1)
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # (B, H, S, d)
    scores = q @ k.transpose(2, 3) * (scale or q.shape[3] ** -0.5)  # (B, H, T, S)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


# ----------------------------------------------------------------------------------------------------------------- loss


def statistics(
    logits: Tensor, local: Tensor, rows: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
) -> Tensor:
    """log sum exp of each row of (c, v), and its element at column `local`, zero where that is outside: (1, 2, c)."""
    if logits.shape[1] == 0:
        return torch.tensor([-torch.inf, 0.0], device=logits.device).view(1, 2, 1).repeat(1, 1, len(logits))
    top, total, at_target = (rows or row_statistics)(logits, local)
    return torch.stack([top + total.log(), at_target]).unsqueeze(0)  # compiled too, log costs a CPU a second walk


def row_statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row of (c, v): the largest logit, the sum of exp(logit - largest), the target's logit or 0; (c,) each."""
    columns = logits.shape[1]
    inside = (local >= 0) & (local < columns)
    at_target = logits.gather(1, local.clamp(0, columns - 1).unsqueeze(1)).squeeze(1).float()
    wide = logits.float()
    top = wide.amax(-1, keepdim=True)
    return top.squeeze(1), (wide - top).exp().sum(-1), torch.where(inside, at_target, 0.0)


def logit_gradient_(
    logits: Tensor,
    lse: Tensor,
    local: Tensor,
    at_target: Tensor,
    scale: float,
    softmax_: Callable[[Tensor, Tensor, float], None] | None = None,
) -> Tensor:
    """In place: scale * (exp(logits - lse) - 1 at column `local`), (c, v), in the logits' precision; returns `logits`.

    The targets' columns, whose logits are `at_target`, are written apart: to compare each column with the target takes
    a CPU as long as the rest.
    """
    (softmax_ or scaled_softmax_)(logits, lse, scale)
    if logits.numel() > 0:
        rows, column = torch.arange(len(local), device=local.device), local.clamp(0, logits.shape[1] - 1)  # (c,) each
        value = (((at_target - lse).exp() - 1.0) * scale).to(logits.dtype)
        logits[rows, column] = torch.where(column == local, value, logits[rows, column])
    return logits


def scaled_softmax_(logits: Tensor, lse: Tensor, scale: float) -> None:
    """In place: scale * exp(logits - lse)."""
    logits.copy_((logits.float() - lse.unsqueeze(1)).exp() * scale)
