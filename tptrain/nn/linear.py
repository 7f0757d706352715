"""The sharded linears. Read here where tensor parallelism communicates.

The pair that carries it is Megatron-LM's f and g (Shoeybi et al. 2019, arXiv:1909.08053, section 3): f, at the entrance
of a column-parallel linear, is the identity forward and an all-reduce backward; g, at the exit of a row-parallel one,
is an all-reduce forward and the identity backward. With sequence parallelism (Korthikanti et al. 2022,
arXiv:2205.05198, section 4.2.2) f is an all-gather forward and a reduce-scatter backward, g the reverse.

Shapes: N tokens, n = N/tp with sequence parallelism and N without; D hidden, F a layer's output features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tptrain.nn.parameter import Parameter, parameter, sharding, use
from tptrain.nn.store import adjacent
from tptrain.parallel.collectives import NOTHING, Work, all_tokens, buffer, sum_partial
from tptrain.parallel.mesh import Mesh

Recompute = Callable[[], Tensor] | None  # computes an input again in the backward pass, so that it need not be kept


class ColumnLinear(nn.Module):
    """A linear whose output features are cut on an axis: holds (F/tp, D) of the global (F, D).

    `copies`: the axis along which ranks hold the same slice and use it for queries of their own, so that its gradient
    is a sum over them.
    """

    def __init__(
        self, mesh: Mesh, d_in: int, d_out: int, *, std: float, bias: bool = False, axis: str = "tp", copies: str = ""
    ) -> None:
        super().__init__()
        self.mesh, summed = mesh, (copies,) if copies else ()
        self.weight = parameter(mesh, sharding(mesh, (d_out, d_in), {0: axis}, summed), std)
        self.bias = parameter(mesh, sharding(mesh, (d_out,), {0: axis}, summed), constant=0.0) if bias else None

    def forward(self, x: Tensor, recompute: Recompute = None) -> Tensor:
        """(n, D), the same on every rank or this rank's tokens -> (N, F/tp). One all-reduce, backward."""
        return Joined(self)(x, recompute)


class Joined:
    """Column-parallel linears of one input, which are one matrix product: q, k and v; gate and up.

    A module names its joined parameters in `joined`, so that a `Store` lays them one after another.
    """

    def __init__(self, *linears: ColumnLinear) -> None:
        self.mesh = linears[0].mesh
        self.weights = tuple(linear.weight for linear in linears)
        self.biases = tuple(linear.bias for linear in linears if linear.bias is not None)
        assert len(self.biases) in (0, len(linears)), "linears that share an input have a bias all or none"

    @property
    def runs(self) -> tuple[tuple[Parameter, ...], ...]:
        """What must be adjacent in memory."""
        return (self.weights, self.biases) if self.biases else (self.weights,)

    def __call__(self, x: Tensor, recompute: Recompute = None) -> Tensor:
        """(n, D) -> (N, sum of F/tp), the linears' outputs side by side. One all-reduce, backward, for all of them."""
        y: Any = _ColumnParallel.apply(x, recompute, self.mesh, *self.weights)
        return _AddBias.apply(y, *self.biases) if self.biases else y  # type: ignore[return-value]


class RowLinear(nn.Module):
    """A linear whose input features are cut on the tp axis: holds (D, F/tp) of the global (D, F)."""

    def __init__(self, mesh: Mesh, d_in: int, d_out: int, *, std: float, bias: bool = False) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = parameter(mesh, sharding(mesh, (d_out, d_in), {1: "tp"}), std)
        summed = ("tp",) if mesh.sequence_parallel else ()  # each rank adds the bias to its own tokens
        self.bias = parameter(mesh, sharding(mesh, (d_out,), summed=summed), constant=0.0) if bias else None

    def forward(self, x: Tensor, recompute: Recompute = None) -> "PendingSum":
        """(N, F/tp), this rank's features -> (n, D), alike on every rank or its own tokens. One all-reduce, forward."""
        y, work = _RowParallel.apply(x, recompute, self.mesh, self.weight)  # type: ignore[misc]
        return PendingSum(y, work, self.bias)


@dataclass(frozen=True)
class PendingSum:
    """A row-parallel linear's output (n, D), whose sum over the ranks is in flight."""

    y: Tensor
    work: Work
    bias: Parameter | None
    then: Callable[[Tensor], Tensor] | None = None  # (n, D) -> (n, D), of the sum: a norm at a branch's exit

    def wait(self) -> Tensor:
        """(n, D), once it has arrived. The bias comes after the sum: once, not tp times."""
        self.work.wait()
        y = self.y if self.bias is None else self.y + use(self.bias)
        return y if self.then is None else self.then(y)


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, recompute: Recompute, mesh: Mesh, *weights: Parameter) -> Tensor:  # type: ignore[override]
        _keep(ctx, x, recompute, weights[0].requires_grad)
        ctx.mesh, ctx.weights = mesh, weights
        x, gathering = all_tokens(x, mesh.group("tp"), mesh.sequence_parallel)  # (N, D)
        gathering.wait()
        return x @ _joined(weights).t()  # (N, F/tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mesh, weights, group = ctx.mesh, ctx.weights, ctx.mesh.group("tp")
        x = partial = grad_x = None
        gathering = summing = NOTHING
        if weights[0].requires_grad:  # gathered again: to keep all tokens would cost what sequence parallelism saves
            x, gathering = all_tokens(_kept(ctx), group, mesh.sequence_parallel)  # (N, D)
        if ctx.needs_input_grad[0]:
            partial = buffer((len(grad), weights[0].shape[1]), grad, group)
            torch.mm(grad, _joined(weights), out=partial)  # (N, D), this rank's part of the sum over tp
        gathering.wait()
        if partial is not None:
            grad_x, summing = sum_partial(partial, group, mesh.sequence_parallel)  # (n, D)
        if x is not None:
            add_weight_gradient(grad, x, weights)  # while the input gradient travels
        summing.wait()
        return grad_x, None, None, *(None for _ in weights)


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, recompute: Recompute, mesh: Mesh, weight: Parameter) -> tuple[Tensor, Work]:  # type: ignore[override]
        _keep(ctx, x, recompute, weight.requires_grad)
        ctx.mesh, ctx.weight = mesh, weight
        partial = buffer((len(x), len(weight)), x, mesh.group("tp"))
        torch.mm(x, weight.t(), out=partial)  # (N, D), one summand of tp
        return sum_partial(partial, mesh.group("tp"), mesh.sequence_parallel)  # (n, D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, no_grad: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mesh, weight = ctx.mesh, ctx.weight
        grad, gathering = all_tokens(grad, mesh.group("tp"), mesh.sequence_parallel)  # (N, D)
        gathering.wait()  # a sum's gradient reaches every summand
        if weight.requires_grad:
            add_weight_gradient(grad, _kept(ctx), (weight,))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *biases: Parameter) -> Tensor:  # type: ignore[override]
        ctx.biases = biases
        return y + _joined(biases)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.biases[0].requires_grad:
            for bias, part in zip(
                ctx.biases, grad.sum(0, dtype=torch.float32).split([len(bias) for bias in ctx.biases]), strict=True
            ):
                bias.add_grad(part)
        return grad, *(None for _ in ctx.biases)


def _joined(parameters: tuple[Parameter, ...]) -> Tensor:
    """(F_i, ...) each -> (sum of F_i, ...), without a copy."""
    return adjacent(p.detach() for p in parameters)


def _keep(ctx: Any, x: Tensor, recompute: Recompute, trained: bool) -> None:
    """The input for the weight gradient, or what computes it again; nothing where the weight is frozen."""
    ctx.recompute = recompute
    if trained and recompute is None:
        ctx.save_for_backward(x)


def _kept(ctx: Any) -> Tensor:
    return ctx.saved_tensors[0] if ctx.recompute is None else ctx.recompute()


# ----------------------------------------------------------------------------------------------------- weight gradients


def add_weight_gradient(grad: Tensor, x: Tensor, weights: tuple[Parameter, ...]) -> None:
    """Add grad' x, of (N, sum of F/tp) and (N, D), to the float32 gradients of weights that lie one after another."""
    total = adjacent(p.main_grad for p in weights if p.main_grad is not None)  # (sum of F/tp, D)
    add_product(total, grad, x, weights[0].overwrite)
    for p in weights:
        p.overwrite = False


def add_product(total: Tensor, grad: Tensor, x: Tensor, overwrite: bool) -> None:
    """Add grad' x to `total` (F, D), or write it there, in float32; grad (N, F), x (N, D)."""
    if grad.dtype != total.dtype:
        total.copy_(grad.t() @ x) if overwrite else total.add_(grad.t() @ x)
    elif overwrite:
        torch.mm(grad.t(), x, out=total)
    else:
        total.addmm_(grad.t(), x)
