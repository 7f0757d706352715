"""Every collective the model uses, with an explicit group, noted in the black box and able to travel in the background.

A group of None is a group of one rank: nothing is sent. The collectives stand in `linear.py`, `layers.py`, `loss.py`
and `optim.py`, each where it happens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain import fused
from tptrain.mesh import Group
from tptrain.watch.black_box import BlackBox

# torch 2.13 has new names for them and warns of the old ones
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


class Pending:
    """A collective under way: `wait` before reading its result or changing its input."""

    def __init__(self, finish: Any, box: BlackBox, number: int) -> None:
        self.finish, self.box, self.number = finish, box, number

    def wait(self) -> Any:
        result = self.finish()
        self.box.leave(self.number)
        return result


class _Nothing:
    """Where there is nobody to wait for."""

    def wait(self) -> None:
        pass


NOTHING = _Nothing()
Work = Pending | _Nothing


class Sum:
    """Of a tensor over a group, under way."""

    def __init__(self, x: Tensor, work: Work) -> None:
        self.x, self.work = x, work

    def terms(self) -> tuple[Tensor, ...]:
        """`x`, once it has arrived, and in shared memory another that is still to be added to it: read them before the
        next collective. The same sum, to the bit, on every rank.
        """
        other = self.work.wait()
        return (self.x,) if other is None else (self.x, other)

    def value(self) -> Tensor:
        """The sum, of no other tensor's memory but perhaps `x`'s."""
        x, *others = self.terms()
        return fused.add(x, *others) if others else x


def all_reduce_(x: Tensor, group: Group | None, op: Any = dist.ReduceOp.SUM, async_op: bool = False) -> Work:
    """Reduce `x`, which is contiguous, over the group, in place. With `async_op`, wait on what is returned."""
    if group is None:
        return NOTHING
    memory, process_group = group.shared, group.process_group
    shared = partial(memory.all_reduce_, x, op) if memory else None
    sent = partial(_send, dist.all_reduce, x, op=op, group=process_group, async_op=async_op)
    return _do("all_reduce", x, group, async_op, shared or sent)


def summand(shape: tuple[int, ...], like: Tensor, group: Group | None) -> Tensor:
    """Memory for this rank's part of a sum that comes next, `all_reduce` or `reduce_scatter`: of the type of `like`."""
    shared = group.shared.summand(shape, like.dtype) if group is not None and group.shared is not None else None
    return like.new_empty(shape) if shared is None else shared


def all_reduce(x: Tensor, group: Group | None) -> Sum:
    """Begin to sum a `summand`, `x`, over the group."""
    if group is None or group.shared is None or not group.shared.holds(x):
        return Sum(x, all_reduce_(x, group, async_op=True))
    if group.shared.size == 2:
        return Sum(x, _do("all_reduce", x, group, True, partial(group.shared.exchange, x)))
    out = torch.empty_like(x)
    return Sum(out, _do("all_reduce", x, group, True, partial(group.shared.all_reduce, out, x)))


def all_gather(
    x: Tensor, group: Group | None, async_op: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Work]:
    """(n, ...) of each rank -> (size * n, ...), in rank order. `x` may be this rank's part of `out`."""
    if group is None:
        return x, NOTHING
    x = x.contiguous()
    if out is None:
        out = x.new_empty(len(group.ranks) * x.shape[0], *x.shape[1:])
    memory, process_group = group.shared, group.process_group
    shared = partial(memory.all_gather, out, x) if memory and x.nbytes <= memory.largest else None
    sent = partial(_send, getattr(dist, GATHER), out, x, group=process_group, async_op=async_op)
    return out, _do("all_gather", x, group, async_op, shared or sent)


def reduce_scatter(
    x: Tensor, group: Group | None, async_op: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Work]:
    """(size * n, ...) of each rank, summed -> this rank's (n, ...). `out` may be this rank's part of `x`."""
    if group is None:
        return x, NOTHING
    x = x.contiguous()
    if out is None:
        out = x.new_empty(x.shape[0] // len(group.ranks), *x.shape[1:])
    memory, process_group = group.shared, group.process_group
    shared = partial(memory.reduce_scatter, out, x) if memory and x.nbytes <= memory.largest else None
    sent = partial(_send, getattr(dist, SCATTER), out, x, group=process_group, async_op=async_op)
    return out, _do("reduce_scatter", x, group, async_op, shared or sent)


def _send(collective: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
    """Begin one of torch's; returns what finishes it."""
    work = collective(*arguments, **options) or NOTHING  # torch has no work where it is done

    def finish() -> None:
        work.wait()

    return finish


def _do(op: str, x: Tensor, group: Group, async_op: bool, begin: Callable[[], Callable[[], Any]]) -> Work:
    """Note a collective and do it: `begin` returns what finishes it."""
    number = group.enter(op, x)
    pending = Pending(begin(), group.box, number)
    if async_op:
        return pending
    pending.wait()
    return NOTHING


def sum_partial(x: Tensor, group: Group | None, sequence_parallel: bool) -> Sum:
    """Partial results (N, ...), a `summand` -> their sum over the ranks, of all tokens or each rank's own N/tp."""
    return Sum(*reduce_scatter(x, group, async_op=True)) if sequence_parallel else all_reduce(x, group)


def whole(x: Tensor, group: Group | None, sequence_parallel: bool, async_op: bool = False) -> tuple[Tensor, Work]:
    """All tokens (N, ...) where each rank may have N/tp of them."""
    return all_gather(x, group, async_op) if sequence_parallel else (x, NOTHING)
