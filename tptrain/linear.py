"""The sharded linears. Read here where tensor parallelism communicates.

The pair that carries it is Megatron-LM's f and g (Shoeybi et al. 2019, arXiv:1909.08053, section 3): f, at the entrance
of a column-parallel linear, is the identity forward and an all-reduce backward; g, at the exit of a row-parallel one,
is an all-reduce forward and the identity backward. With sequence parallelism (Korthikanti et al. 2022,
arXiv:2205.05198, section 4.2.2) f is an all-gather forward and a reduce-scatter backward, g the reverse.

Shapes: N tokens, n = N/tp with sequence parallelism and N without; D hidden, F a layer's output features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tptrain.collectives import Sum, sum_partial, summand, whole
from tptrain.layers import Parameter, ShardSpec, parameter, use
from tptrain.mesh import Mesh


class ColumnLinear(nn.Module):
    """A linear whose output features are sharded: holds (F/tp, D) of the global (F, D). Run by `column_parallel`."""

    def __init__(self, mesh: Mesh, d_in: int, d_out: int, *, std: float, bias: bool = False, replicas: int = 1) -> None:
        super().__init__()
        partial = replicas > 1
        self.weight = parameter(mesh, ShardSpec((d_out, d_in), mesh.tp, 0, replicas, partial), std)
        self.bias = parameter(mesh, ShardSpec((d_out,), mesh.tp, 0, replicas, partial), constant=0.0) if bias else None


class RowLinear(nn.Module):
    """A linear whose input features are sharded: holds (D, F/tp) of the global (D, F). Run by `row_parallel`."""

    def __init__(self, mesh: Mesh, d_in: int, d_out: int, *, std: float, bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(mesh, ShardSpec((d_out, d_in), mesh.tp, 1), std)
        replicated = ShardSpec((d_out,), mesh.tp, 0, mesh.tp, mesh.sequence_parallel)
        self.bias = parameter(mesh, replicated, constant=0.0) if bias else None


Again = Callable[[], Tensor] | None  # makes an input once more in the backward pass, so that it need not be kept


def column_parallel(x: Tensor, mesh: Mesh, *linears: ColumnLinear, again: Again = None) -> Tensor:
    """(n, D), the same on every rank or this rank's tokens -> (N, sum of F/tp), the linears' outputs side by side.

    One all-reduce, backward, for all of them.
    """
    y: Any = _ColumnParallel.apply(x, again, mesh, *(linear.weight for linear in linears))
    biases = [use(linear.bias) for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears)), "linears that share an input have a bias all or none"
    return y + torch.cat(biases) if biases else y


def row_parallel(x: Tensor, mesh: Mesh, linear: RowLinear, again: Again = None) -> "Summing":
    """(N, F/tp), this rank's features -> (n, D), the same on every rank or its own tokens. One all-reduce, forward."""
    y, total = _RowParallel.apply(x, again, mesh, linear.weight)  # type: ignore[misc]
    return Summing(y, total, linear.bias)


class Summing:
    """A row-parallel linear's output, whose summands are on their way between the ranks."""

    def __init__(self, y: Tensor, total: Sum, bias: Parameter | None) -> None:
        self.y, self.total, self.bias = y, total, bias  # y has the memory of total.x, and autograd knows it

    def terms(self) -> tuple[Tensor, ...]:
        """The output, (n, D), once it has arrived, or two whose sum it is; to be read before the next collective."""
        with torch.no_grad():  # the sum is the end of a forward pass that autograd has noted
            others = self.total.terms()[1:]
        if self.bias is None:
            return self.y, *others
        return (sum((*others, use(self.bias)), self.y),)  # a bias after the sum: once, not tp times

    def value(self) -> Tensor:
        """(n, D), once it has arrived."""
        y, *others = self.terms()
        return y + others[0] if others else y


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, again: Again, mesh: Mesh, *weights: Parameter) -> Tensor:  # type: ignore[override]
        _keep(ctx, x, again)
        ctx.mesh, ctx.weights = mesh, weights
        x, _ = whole(x, mesh.tp_group, mesh.sequence_parallel)  # (N, D)
        parts = [x @ weight.t() for weight in _stacked(weights)]  # (N, F/tp) of each stack
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mesh, weights = _kept(ctx), ctx.mesh, ctx.weights
        # Gathered again: to keep all tokens would cost what sequence parallelism saves.
        x, gathering = whole(x, mesh.tp_group, mesh.sequence_parallel, async_op=True)  # (N, D)
        partial = summand((len(grad), x.shape[1]), grad, mesh.tp_group)
        input_gradient(grad, weights, partial)  # (N, D), this rank's part of the sum over tp
        gathering.wait()
        grad_x = sum_partial(partial, mesh.tp_group, mesh.sequence_parallel)
        add_weight_gradient(grad, x, weights)  # while the input gradient travels
        return grad_x.value(), None, None, *(None for _ in weights)  # (n, D)


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, again: Again, mesh: Mesh, weight: Parameter) -> tuple[Tensor, Sum]:  # type: ignore[override]
        _keep(ctx, x, again)
        ctx.mesh, ctx.weight = mesh, weight
        partial = summand((len(x), len(weight)), x, mesh.tp_group)
        torch.mm(x, weight.t(), out=partial)  # (N, D), one summand of tp
        total = sum_partial(partial, mesh.tp_group, mesh.sequence_parallel)
        return total.x, total  # (n, D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, no_grad: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mesh, weight = _kept(ctx), ctx.mesh, ctx.weight
        grad, _ = whole(grad, mesh.tp_group, mesh.sequence_parallel)  # (N, D); a sum's gradient reaches every summand
        add_weight_gradient(grad, x, (weight,))
        return grad @ weight, None, None, None


def _keep(ctx: Any, x: Tensor, again: Again) -> None:
    """The input for the backward pass, or what makes it again."""
    ctx.again = again
    if again is None:
        ctx.save_for_backward(x)


def _kept(ctx: Any) -> Tensor:
    return ctx.saved_tensors[0] if ctx.again is None else ctx.again()


# ------------------------------------------------------------------------------------------------------ matrix products


def input_gradient(grad: Tensor, weights: tuple[Parameter, ...], out: Tensor) -> None:
    """(N, sum of F/tp) -> out (N, D): what the linears of one input send back to it, summed."""
    stacks = _stacked(weights)
    parts = grad.split([len(stack) for stack in stacks], dim=-1)
    torch.mm(parts[0], stacks[0], out=out)
    for part, stack in zip(parts[1:], stacks[1:], strict=True):
        out.addmm_(part, stack)


def add_weight_gradient(grad: Tensor, x: Tensor, weights: tuple[Parameter, ...]) -> None:
    """Add grad' x, of (N, sum of F/tp) and (N, D), to the float32 gradients."""
    totals = _stacked([p.main_grad for p in weights])
    parts = grad.split([len(total) for total in totals], dim=-1)
    for total, part in zip(totals, parts, strict=True):
        add_product(total, part, x, weights[0].fresh)
    for p in weights:
        p.fresh = False
        p.arrived()


def add_product(total: Tensor, grad: Tensor, x: Tensor, fresh: bool) -> None:
    """Add grad' x to `total` (F, D), or write it there where that is fresh, in float32; grad (N, F), x (N, D)."""
    if grad.dtype != total.dtype:
        total.copy_(grad.t() @ x) if fresh else total.add_(grad.t() @ x)
    elif fresh:
        torch.mm(grad.t(), x, out=total)
    else:
        total.addmm_(grad.t(), x)


def _stacked(weights: Any) -> list[Tensor]:
    """Tensors (F, D), of which those that lie one after another in memory are joined without a copy.

    So do the slices of a bucket: q, k and v, or gate and up, are then one matrix product.
    """
    stacks: list[Tensor] = []
    for weight in weights:
        weight = weight.detach()
        if stacks and stacks[-1].data_ptr() + stacks[-1].nbytes == weight.data_ptr() != 0:
            rows = len(stacks[-1]) + len(weight)
            stacks[-1] = stacks[-1].as_strided((rows, weight.shape[1]), (weight.shape[1], 1))
        else:
            stacks.append(weight)
    return stacks
