"""What carries the collectives of a group: a process group of torch.distributed, or memory that CPU ranks share.

Every operation begins at once and returns what finishes it. Until then its operands are neither read nor written, and
what it has returned stays valid for as long as the tensor lives.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Finish = Callable[[], None]
Op = Literal["sum", "max"]

# torch 2.13 has new names for them and warns of the old ones
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


class Communicator(Protocol):
    """One rank's end of a group."""

    def buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory for the operand of the next `sum` or `reduce_scatter`, which may use it up: of the type of `like`."""
        ...

    def all_reduce_(self, x: Tensor, op: Op) -> Finish:
        """Reduce `x`, which is contiguous, in place."""
        ...

    def sum(self, x: Tensor) -> tuple[Tensor, Finish]:
        """The sum of a `buffer` over the ranks, in the buffer itself or in a tensor of its own."""
        ...

    def all_gather(self, out: Tensor, x: Tensor) -> Finish:
        """Fill `out` (size * n, ...) with every rank's `x` (n, ...), in rank order; `x` may be a part of `out`."""
        ...

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Finish:
        """Sum `x` (size * n, ...) over the ranks into `out` (n, ...), this rank's part; `out` may lie in `x`."""
        ...


class ProcessGroup:
    """NCCL or gloo."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def all_reduce_(self, x: Tensor, op: Op) -> Finish:
        kind: Any = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        return _finish(dist.all_reduce(x, op=kind, group=self.group, async_op=True))

    def sum(self, x: Tensor) -> tuple[Tensor, Finish]:
        return x, self.all_reduce_(x, "sum")

    def all_gather(self, out: Tensor, x: Tensor) -> Finish:
        return _finish(getattr(dist, GATHER)(out, x, group=self.group, async_op=True))

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Finish:
        return _finish(getattr(dist, SCATTER)(out, x, group=self.group, async_op=True))


def _finish(work: Any) -> Finish:
    def finish() -> None:
        if work is not None:  # torch has no work where it is done
            with torch.no_grad():  # gloo copies a reduce-scatter's result only now, which autograd must not record
                work.wait()

    return finish


class Nobody:
    """A group of one rank, or ranks that are counted and not run: nothing is sent."""

    def buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return like.new_empty(shape)

    def all_reduce_(self, x: Tensor, op: Op) -> Finish:
        return nothing

    def sum(self, x: Tensor) -> tuple[Tensor, Finish]:
        return x, nothing

    def all_gather(self, out: Tensor, x: Tensor) -> Finish:
        return nothing

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Finish:
        return nothing


def nothing() -> None:
    """Finishes what is finished already."""
