"""The feed-forward network: the channel mixer of most models.

Shapes: see decoder.py.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tptrain.models.spec import DecoderSpec, FFNSpec
from tptrain.nn.linear import ColumnLinear, Joined, PendingSum, Recompute, RowLinear
from tptrain.ops.reference import activation
from tptrain.ops.table import Operations
from tptrain.parallel.mesh import Mesh


class FFN(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where the FFN is not gated."""

    def __init__(self, spec: FFNSpec, decoder: DecoderSpec, mesh: Mesh, ops: Operations) -> None:
        super().__init__()
        self.act, self.ops = spec.act, ops
        hidden, std, bias = decoder.hidden_size, decoder.std, spec.bias
        self.gate_proj = ColumnLinear(mesh, hidden, spec.width, std=std, bias=bias) if spec.gated else None
        self.up_proj = ColumnLinear(mesh, hidden, spec.width, std=std, bias=bias)
        self.down_proj = RowLinear(mesh, spec.width, hidden, std=decoder.residual_std, bias=bias)
        self.gate_up = Joined(self.up_proj) if self.gate_proj is None else Joined(self.gate_proj, self.up_proj)
        self.joined = self.gate_up.runs

    def forward(self, x: Tensor, recompute: Recompute = None) -> PendingSum:
        """(n, D) -> (n, D)."""
        inner = self.gate_up(x, recompute)  # (N, 2 F/tp), or (N, F/tp) where not gated
        if self.gate_proj is None:
            h, again = activation(inner, self.act), partial(activation, inner.detach(), self.act)  # (N, F/tp)
        else:
            h = _Gated.apply(inner, self.act, self.ops)  # (N, F/tp)
            again = partial(self.ops.gate_product, inner.detach(), self.act)
        return self.down_proj(h, None if recompute is None else again)


class _Gated(torch.autograd.Function):
    """gate and up side by side, (N, 2 F) -> act(gate) * up, (N, F). Only the input is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: str, ops: Operations) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.act, ctx.ops = act, ops
        return ops.gate_product(x, act)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.ops.gate_product_backward(grad, ctx.saved_tensors[0], ctx.act), None, None
