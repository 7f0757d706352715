"""RMSNorm and LayerNorm, and the residual addition before a norm, which one kernel does together with it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tptrain.models.spec import NormSpec
from tptrain.nn.parameter import Parameter, parameter, sharding, use
from tptrain.ops.table import Operations
from tptrain.parallel.mesh import Mesh


class Norm(nn.Module):
    """A norm over the last dim, with a weight that every rank of the tp axis holds.

    `own_heads`: a rank applies it to its own heads only, so that the gradient is a sum over tp. So it is with sequence
    parallelism, where a rank has its own tokens.
    """

    def __init__(self, mesh: Mesh, ops: Operations, d: int, spec: NormSpec, own_heads: bool = False) -> None:
        super().__init__()
        layout = sharding(mesh, (d,), summed=("tp",) if own_heads or mesh.sequence_parallel else ())
        self.ops, self.eps = ops, spec.eps
        self.weight = parameter(mesh, layout, constant=1.0)
        self.bias = parameter(mesh, layout, constant=0.0) if spec.kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return _RMSNorm.apply(x, self.weight, self.eps, self.ops)  # type: ignore[return-value]
        return F.layer_norm(x, self.weight.shape, use(self.weight), use(self.bias), self.eps)

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, which is the residual stream, and its norm."""
        if self.bias is None:
            return _AddRMSNorm.apply(x, y, self.weight, self.eps, self.ops)  # type: ignore[return-value]
        x = x + y
        return x, self(x)

    def again(self, x: Tensor) -> Callable[[], Tensor]:
        """What computes the norm of x once more, for a backward pass that has not kept it."""
        x = x.detach()
        return torch.no_grad()(lambda: self(x))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Parameter, eps: float, ops: Operations) -> Tensor:  # type: ignore[override]
        y, squares = ops.rms_norm(x, weight.detach(), eps)
        ctx.save_for_backward(x, squares)
        ctx.weight, ctx.eps, ctx.ops = weight, eps, ops
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (x, squares), weight = ctx.saved_tensors, ctx.weight
        grad_x, grad_weight = ctx.ops.rms_norm_backward(grad, x, weight.detach(), squares, ctx.eps)
        if weight.requires_grad:
            weight.add_grad(grad_weight)
        return grad_x, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Parameter, eps: float, ops: Operations
    ) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total, normed, squares = ops.add_rms_norm(x, y, weight.detach(), eps)
        ctx.save_for_backward(total, squares)
        ctx.weight, ctx.eps, ctx.ops = weight, eps, ops
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        (total, squares), weight = ctx.saved_tensors, ctx.weight
        grad_x, grad_weight = ctx.ops.add_rms_norm_backward(grad_total, grad, total, weight.detach(), squares, ctx.eps)
        if weight.requires_grad:
            weight.add_grad(grad_weight)
        return grad_x, grad_x, None, None, None
