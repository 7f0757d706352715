"""Where a sharded Transformers model communicates. Between an entrance and an exit each rank has its own features.

    enter    identity forward, all-reduce backward    before column-parallel linears, experts, ...
    leave    all-reduce forward, identity backward    after row-parallel linears, experts, ...
    gather   all features out of each rank's forward, its own part of the gradient backward
    split    this rank's features forward, the gradient to all of them backward

Linears that get the same tensor (q, k and v; gate and up) share one entrance, so that a layer has one all-reduce there,
not three. Weight gradients behind an entrance wait for its all-reduce, and are computed while that travels.

Shapes: n tokens in any number of dims, D and F features.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.nn.linear import add_weight_gradient
from tptrain.nn.parameter import Parameter, use
from tptrain.parallel.collectives import Work, all_gather, all_reduce, buffer
from tptrain.parallel.group import Group
from tptrain.parallel.mesh import Mesh

Waiting = list[Callable[[], None]]  # weight gradients that are to be computed while an all-reduce travels


@dataclass(frozen=True)
class _Entrance:
    x: Tensor
    version: int  # of x, which a module may have changed in place
    entered: Tensor
    waiting: Waiting


class Region:
    """The ranks of a tp axis, and the entrances that were built last: they serve every module with the same input."""

    def __init__(self, mesh: Mesh) -> None:
        self.group, self.index = mesh.group("tp"), mesh.index("tp")
        self.entrances: deque[_Entrance] = deque(maxlen=3)  # of experts: tokens and their weights

    def enter(self, x: Tensor) -> tuple[Tensor, Waiting | None]:
        """(..., D) -> (..., D), and where weight gradients may wait; None where nothing is summed."""
        if self.group is None or not (torch.is_grad_enabled() and x.requires_grad):
            return x, None
        for each in self.entrances:
            if each.x is x and each.version == x._version:
                return each.entered, each.waiting
        waiting: Waiting = []
        entered: Any = _Enter.apply(x, self.group, waiting)
        self.entrances.append(_Entrance(x, x._version, entered, waiting))
        return entered, waiting

    def forget(self) -> None:
        """At the end of a forward pass: what was entered is not kept alive."""
        self.entrances.clear()

    def enter_last(self, x: Tensor, features: int) -> Tensor:
        """(..., D) -> (..., D): the last features go to cut modules as they are, the others through linears."""
        return x if self.group is None else _EnterLast.apply(x, self.group, features)  # type: ignore[return-value]

    def leave(self, x: Tensor) -> Tensor:
        """(..., D), this rank's summand -> (..., D), the sum over the ranks."""
        return x if self.group is None else _Leave.apply(x, self.group)  # type: ignore[return-value]

    def gather(self, x: Tensor) -> Tensor:
        """(..., F/tp) -> (..., F)."""
        return x if self.group is None else _Gather.apply(x, self.group, self.index)  # type: ignore[return-value]

    def split(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., F/tp)."""
        return x if self.group is None else _Split.apply(x, self.group, self.index)  # type: ignore[return-value]

    def column(self, x: Tensor, weight: Parameter, bias: Parameter | None) -> Tensor:
        """(..., D) -> (..., F/tp) by a column-parallel linear. One all-reduce, backward."""
        return linear(*self.enter(x), weight, bias)

    def row(self, x: Tensor, weight: Parameter, bias: Parameter | None) -> Tensor:
        """(..., F/tp) -> (..., D) by a row-parallel linear. One all-reduce, forward; the bias is added once."""
        y: Any = _Row.apply(x, weight, self.group)
        return y if bias is None else y + use(bias)


def linear(x: Tensor, waiting: Waiting | None, weight: Parameter, bias: Parameter | None) -> Tensor:
    """(..., D) -> (..., F), whatever part of the weight this rank has. Its gradient may wait in `waiting`."""
    return _Linear.apply(x, weight, bias, waiting)  # type: ignore[return-value]


def _sum(x: Tensor, group: Group) -> tuple[Tensor, Work]:
    """Begin to sum over the ranks; x itself stays as it is, for it may be somebody else's as well."""
    summand = buffer(tuple(x.shape), x, group)
    summand.copy_(x)
    return all_reduce(summand, group)


def _own(x: Tensor, group: Group, index: int) -> Tensor:
    """(..., F) -> (..., F/tp), this rank's."""
    return x.chunk(group.size, -1)[index].contiguous()


def _gathered(x: Tensor, group: Group) -> Tensor:
    """(..., F/tp) of each rank -> (..., F)."""
    parts, gathering = all_gather(x.reshape(1, *x.shape), group)  # (tp, ..., F/tp)
    gathering.wait()
    return parts.movedim(0, -2).reshape(*x.shape[:-1], -1)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, waiting: Waiting) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.waiting = group, waiting
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        total, work = _sum(grad, ctx.group)
        for weight_gradient in ctx.waiting:
            weight_gradient()
        ctx.waiting.clear()
        work.wait()
        return total, None, None


class _EnterLast(torch.autograd.Function):
    """The gradient of the last features is summed; that of the others has been."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, features: int) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.features = group, features
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        others, last = grad.split([grad.shape[-1] - ctx.features, ctx.features], -1)
        total, work = _sum(last, ctx.group)
        work.wait()
        return torch.cat([others, total], -1), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:  # type: ignore[override]
        total, work = _sum(x, group)
        work.wait()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, index: int) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.index = group, index
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _own(grad, ctx.group, ctx.index), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, index: int) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _own(x, group, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _gathered(grad, ctx.group), None, None


class _Linear(torch.autograd.Function):
    """A linear whose weight gradient goes into float32 memory, at once or while the input's gradient is summed."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Parameter, bias: Parameter | None, waiting: Waiting | None
    ) -> Tensor:
        ctx.weight, ctx.bias, ctx.waiting = weight, bias, waiting
        ctx.save_for_backward(x)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        rows = grad.reshape(-1, grad.shape[-1])  # (N, F)

        def weight_gradient() -> None:
            if weight.requires_grad:
                add_weight_gradient(rows, x.reshape(-1, x.shape[-1]), (weight,))
            if bias is not None and bias.requires_grad:
                bias.add_grad(rows.sum(0, dtype=torch.float32))

        if ctx.waiting is not None and ctx.needs_input_grad[0]:
            ctx.waiting.append(weight_gradient)
        else:
            weight_gradient()
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Parameter, group: Group | None) -> Tensor:  # type: ignore[override]
        ctx.weight = weight
        ctx.save_for_backward(x)
        summand = buffer((*x.shape[:-1], len(weight)), x, group)
        torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=summand.view(-1, len(weight)))
        total, work = all_reduce(summand, group)  # (..., D)
        work.wait()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,), weight = ctx.saved_tensors, ctx.weight
        if weight.requires_grad:
            add_weight_gradient(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), (weight,))
        return grad @ weight if ctx.needs_input_grad[0] else None, None, None
