"""RMSNorm and LayerNorm, and the residual addition before a norm, which one kernel does together with it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tptrain.models.spec import NormSpec
from tptrain.nn.parameter import Parameter, parameter, sharding, use
from tptrain.ops.table import Operations
from tptrain.parallel.collectives import all_reduce_
from tptrain.parallel.mesh import Mesh


class Norm(nn.Module):
    """A norm over the last dim, with a weight that every rank of the tp axis holds.

    `own_heads`: a rank applies it to its own heads only, so that the gradient is a sum over tp. So it is with sequence
    parallelism, where a rank has its own tokens.
    """

    def __init__(self, mesh: Mesh, ops: Operations, d: int, spec: NormSpec, own_heads: bool = False) -> None:
        super().__init__()
        layout = sharding(mesh, (d,), summed=("tp",) if own_heads or mesh.sequence_parallel else ())
        self.ops, self.spec = ops, spec
        self.weight = parameter(mesh, layout, constant=0.0 if spec.zero_centred else 1.0)
        self.bias = parameter(mesh, layout, constant=0.0) if spec.kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return _RMSNorm.apply(x, self.weight, self.spec, self.ops)  # type: ignore[return-value]
        return F.layer_norm(x, self.weight.shape, use(self.weight), use(self.bias), self.spec.eps)

    def add(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, which is the residual stream, and its norm."""
        if self.bias is None:
            return _AddRMSNorm.apply(x, y, self.weight, self.spec, self.ops)  # type: ignore[return-value]
        x = x + y
        return x, self(x)

    def again(self, x: Tensor) -> Callable[[], Tensor]:
        """What computes the norm of x once more, for a backward pass that has not kept it."""
        x = x.detach()
        return torch.no_grad()(lambda: self(x))


def _factors(weight: Parameter, spec: NormSpec) -> Tensor:
    """What a norm multiplies by: the weight, or 1 + weight in float32."""
    return weight.detach().float() + 1.0 if spec.zero_centred else weight.detach()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Parameter, spec: NormSpec, ops: Operations) -> Tensor:  # type: ignore[override]
        y, squares = ops.rms_norm(x, _factors(weight, spec), spec.eps)
        ctx.save_for_backward(x, squares)
        ctx.weight, ctx.spec, ctx.ops = weight, spec, ops
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (x, squares), weight, spec = ctx.saved_tensors, ctx.weight, ctx.spec
        grad_x, grad_weight = ctx.ops.rms_norm_backward(grad, x, _factors(weight, spec), squares, spec.eps)
        if weight.requires_grad:
            weight.add_grad(grad_weight)
        return grad_x, None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Parameter, spec: NormSpec, ops: Operations
    ) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total, normed, squares = ops.add_rms_norm(x, y, _factors(weight, spec), spec.eps)
        ctx.save_for_backward(total, squares)
        ctx.weight, ctx.spec, ctx.ops = weight, spec, ops
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        (total, squares), weight, spec = ctx.saved_tensors, ctx.weight, ctx.spec
        grad_x, grad_weight = ctx.ops.add_rms_norm_backward(
            grad_total, grad, total, _factors(weight, spec), squares, spec.eps
        )
        if weight.requires_grad:
            weight.add_grad(grad_weight)
        return grad_x, grad_x, None, None, None


class JointNorm(nn.Module):
    """RMSNorm over features that lie on all ranks of the tp axis: a rank has F/tp of F, and so much of the weight.

    `axis`: on which they are cut; `copies`: the axis along which ranks have the same ones.
    """

    def __init__(self, mesh: Mesh, features: int, spec: NormSpec, axis: str = "tp", copies: str = "") -> None:
        super().__init__()
        self.mesh, self.features, self.spec = mesh, features, spec
        self.copies = mesh.size("tp") // mesh.size(axis)
        self.weight = parameter(mesh, sharding(mesh, (features,), {0: axis}, (copies,) if copies else ()), constant=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, heads/tp, d) -> the same. One all-reduce of (N, 1) forward and one backward."""
        y: Any = _JointNorm.apply(x.flatten(0, 1).flatten(1), self.weight, self)  # (N, F/tp)
        return y.view(x.shape)


class _JointNorm(torch.autograd.Function):
    """y = x s w with s = 1 / sqrt(mean(x^2) + eps), so dx = s w dy - x s^3 mean(w dy x), the means over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Parameter, norm: JointNorm) -> Tensor:  # type: ignore[override]
        wide = x.float()
        squares = _mean(wide.square().sum(-1, keepdim=True), norm)  # (N, 1)
        scale = (squares + norm.spec.eps).rsqrt()  # (N, 1)
        ctx.save_for_backward(x, scale)
        ctx.weight, ctx.norm = weight, norm
        return (wide * scale * weight.detach().float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x, scale), weight = ctx.saved_tensors, ctx.weight
        unit, wide = x.float() * scale, grad.float()  # (N, F/tp) each
        weighted = wide * weight.detach().float()
        along = _mean((weighted * unit).sum(-1, keepdim=True), ctx.norm)  # (N, 1)
        if weight.requires_grad:
            weight.add_grad((wide * unit).sum(0))
        return ((weighted - unit * along) * scale).to(x.dtype), None, None


def _mean(sums: Tensor, norm: JointNorm) -> Tensor:
    """This rank's sums (N, 1) -> the mean over all features. Ranks with the same features count each once.

    Backward, the gradients of such ranks are summands of one: their sum over the ranks is the whole, of which each
    takes an equal part.
    """
    all_reduce_(sums, norm.mesh.group("tp")).wait()
    return sums / (norm.features * norm.copies)
