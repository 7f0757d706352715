"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

import math
from typing import Any

import torch
from torch import Tensor

from tptrain.models.spec import RotarySpec
from tptrain.ops.table import Operations


class Context:
    """What the layers need to know of a batch: sequences of T tokens, at positions 0 to T - 1."""

    def __init__(self, T: int, device: torch.device, tables: dict[tuple[RotarySpec, int, int], Tensor]) -> None:
        """`tables`: of the decoder, so that layers and batches share them."""
        self.T, self.device, self.tables = T, device, tables

    def rotation(self, rotary: RotarySpec, d: int) -> Tensor:
        """(2, T, 1, d/2): cosines and sines of position x frequency, float32."""
        key = rotary, d, self.T
        if key not in self.tables:
            for other in [other for other in self.tables if other[:2] == key[:2]]:
                del self.tables[other]  # one length at a time
            self.tables[key] = rotary_table(rotary, d, self.T).to(self.device)
        return self.tables[key]


def rotary_table(rotary: RotarySpec, d: int, T: int) -> Tensor:
    """(2, T, 1, d/2), see `Context.rotation`.

    Hugging Face's layout: dims i and i + d/2 turn together, so its weights are used unpermuted.
    """
    frequencies = 1.0 / rotary.theta ** (torch.arange(0, d, 2).float() / d)  # (d/2,)
    if rotary.scaling is not None:
        frequencies = _stretched(frequencies, *rotary.scaling)
    angles = torch.outer(torch.arange(T).float(), frequencies)  # (T, d/2)
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(2)


def _stretched(frequencies: Tensor, factor: float, low: float, high: float, context: int) -> Tensor:
    """Llama 3.1's scaling: long wavelengths slowed by `factor`, short ones kept, a smooth ramp between them."""
    turns = context * frequencies / (2 * math.pi)  # (d/2,) in the trained context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / factor * (1 - keep)


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
    """(B, T, heads, d) turned by position; rotation (2, T, 1, d/2), cosines and sines, float32."""
    return _Rotate.apply(x, rotation, ops)  # type: ignore[return-value]


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
