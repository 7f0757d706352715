"""Every collective the model uses, as autograd functions with an explicit group.

Shapes: B batch, T sequence, D hidden, F a layer's output features, V vocabulary, N = B*T tokens, `/tp` divided over the
tp axis. A group of None is a group of one rank: nothing is sent.

The pair that carries tensor parallelism is Megatron-LM's f and g (Shoeybi et al. 2019, arXiv:1909.08053, section 3):
f is the identity forward and an all-reduce backward (here inside `column_parallel_linears`, where it can overlap with
the weight gradients), g is an all-reduce forward and the identity backward (`all_reduce_forward`).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tptrain.blackbox import BlackBox
from tptrain.mesh import Group


class Pending:
    """An all-reduce under way: `wait` before reading the tensor."""

    def __init__(self, work: Any, box: BlackBox, number: int) -> None:
        self.work, self.box, self.number = work, box, number

    def wait(self) -> None:
        self.work.wait()
        self.box.leave(self.number)


def all_reduce_(x: Tensor, group: Group | None, op: Any = dist.ReduceOp.SUM, async_op: bool = False) -> Pending | None:
    """Reduce `x` over the group, in place. With `async_op`, wait on what is returned before reading `x`."""
    if group is None:
        return None
    number = group.enter("all_reduce", x)
    work = dist.all_reduce(x, op=op, group=group.process_group, async_op=async_op)
    if async_op:
        return Pending(work, group.box, number)
    group.box.leave(number)
    return None


class _AllReduceForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group | None) -> Tensor:  # type: ignore[override]
        ctx.mark_dirty(x)
        all_reduce_(x, group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None  # the sum's gradient reaches every summand as it is


def all_reduce_forward(x: Tensor, group: Group | None) -> Tensor:
    """Sum partial results over the group; the gradient passes through. `x` (any shape) is overwritten."""
    return x if group is None else _AllReduceForward.apply(x, group)  # type: ignore[return-value]


class _ColumnParallelLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group | None, biases: bool, *parameters: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        weights = parameters[0::2] if biases else parameters
        ctx.save_for_backward(x, *weights)
        ctx.group, ctx.biases = group, biases
        return tuple(
            F.linear(x, weight, parameters[2 * i + 1] if biases else None)  # (B, T, F/tp)
            for i, weight in enumerate(weights)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # each (N, F/tp)
        grad_x = rows[0] @ weights[0]  # (N, D), this rank's part of the sum over tp
        for row, weight in zip(rows[1:], weights[1:], strict=True):
            grad_x.addmm_(row, weight)
        reduction = all_reduce_(grad_x, ctx.group, async_op=True)  # travels while the weight gradients are computed
        inputs = x.reshape(-1, x.shape[-1])  # (N, D)
        parameter_grads: list[Tensor] = []
        for row in rows:
            parameter_grads.append(row.t() @ inputs)  # (F/tp, D)
            if ctx.biases:
                parameter_grads.append(row.sum(0))  # (F/tp,)
        if reduction is not None:
            reduction.wait()
        return grad_x.view_as(x), None, None, *parameter_grads


def column_parallel_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, group: Group | None
) -> tuple[Tensor, ...]:
    """Several linears of one input, their output features sharded: no communication forward, one all-reduce backward.

    x (B, T, D), the same on every rank; weights (F/tp, D) and biases (F/tp,), this rank's slices; returns (B, T, F/tp)
    for each weight. The backward sums the input gradients of all the linears first, so q, k and v share one all-reduce.
    """
    if biases is None:
        return _ColumnParallelLinears.apply(x, group, False, *weights)  # type: ignore[return-value]
    pairs = [tensor for pair in zip(weights, biases, strict=True) for tensor in pair]
    return _ColumnParallelLinears.apply(x, group, True, *pairs)  # type: ignore[return-value]
