"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

import math
from typing import Any

import torch
from torch import Tensor

from tptrain.models.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    RotarySpec,
    YarnScaling,
)
from tptrain.ops.table import Operations


def rotary_table(rotary: RotarySpec, d: int, positions: Tensor, T: int) -> Tensor:
    """(2, n, 1, d/2): cosines and sines of position x frequency, float32, for the first d dims of a head at n positions
    of sequences of T tokens.

    Hugging Face's layout: dims i and i + d/2 turn together, so its weights are used unpermuted.
    """
    frequencies, magnitude = _frequencies(rotary, d, T)  # (d/2,)
    angles = torch.outer(positions.float(), frequencies.to(positions.device))  # (n, d/2)
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(2) * magnitude


def _frequencies(rotary: RotarySpec, d: int, T: int) -> tuple[Tensor, float]:
    """Radians a position of each pair of dims, (d/2,), and the magnitude of cosines and sines."""
    theta, exponents = rotary.theta, torch.arange(0, d, 2).float() / d
    frequencies = 1.0 / theta**exponents  # (d/2,)
    match rotary.scaling:
        case None:
            return frequencies, 1.0
        case LinearScaling(factor):
            return frequencies / factor, 1.0
        case DynamicScaling(factor, context):
            theta *= (factor * max(T, context) / context - (factor - 1)) ** (d / (d - 2))
            return 1.0 / theta**exponents, 1.0
        case Llama3Scaling(factor, low, high, context):
            turns = context * frequencies / (2 * math.pi)  # (d/2,) in the trained context
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            return frequencies * keep + frequencies / factor * (1 - keep), 1.0
        case YarnScaling() as yarn:
            keep = _yarn_ramp(yarn, theta, d)
            return frequencies * keep + frequencies / yarn.factor * (1 - keep), yarn.magnitude
        case LongScaling(short, long, context, magnitude):
            return frequencies / torch.tensor(short if context >= T else long), magnitude


def _yarn_ramp(yarn: YarnScaling, theta: float, d: int) -> Tensor:
    """How much of each frequency is kept, (d/2,): 1 for the fastest, 0 for the slowest."""

    def dim(turns: float) -> float:  # at which a frequency makes so many turns within the context
        return d * math.log(yarn.context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim(yarn.beta_fast), dim(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = (torch.arange(d // 2).float() - low) / (high - low if high != low else 0.001)
    return 1 - ramp.clamp(0, 1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Tensor, ops: Operations) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rotation)
        ctx.ops = ops
        return ops.rotate(x, rotation[0], rotation[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors[0]
        return ctx.ops.rotate(grad, cos, -sin), None, None  # back by the same angle


def rotate(x: Tensor, rotation: Tensor, ops: Operations) -> Tensor:
    """(B, T, heads, d), its first r dims turned by position; rotation (2, T, 1, r/2), cosines and sines, float32."""
    turned = 2 * rotation.shape[-1]
    if turned == x.shape[-1]:
        return _Rotate.apply(x, rotation, ops)  # type: ignore[return-value]
    first: Any = _Rotate.apply(x[..., :turned], rotation, ops)
    return torch.cat([first, x[..., turned:]], dim=-1)


class _RotateQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotation: Tensor, heads: list[int], ops: Operations) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.save_for_backward(rotation)
        ctx.ops = ops
        return ops.rotate_qkv(qkv, rotation[0], rotation[1], heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.ops.rotate_qkv_backward(*grads, *ctx.saved_tensors[0]), None, None, None


def rotate_qkv(qkv: Tensor, rotation: Tensor, heads: list[int], ops: Operations) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, H + 2 K, d) -> q (B, T, H, d) and k (B, T, K, d) turned by position, and v (B, T, K, d), each of its own.

    As a part of qkv, v would keep all three for the backward pass. `heads` is [H, K, K].
    """
    return _RotateQKV.apply(qkv, rotation, heads, ops)  # type: ignore[return-value]
