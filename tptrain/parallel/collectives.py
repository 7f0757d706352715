"""Every collective of tensors, with an explicit group, noted in the black box and able to travel in the background.

A group of None is a group of one rank: nothing is sent. The collectives of a training step stand where they happen: in
`nn/linear.py`, `nn/embedding.py`, `nn/cross_entropy.py` and `optim/reduce.py`.
"""

from collections.abc import Callable

from torch import Tensor

from tptrain.parallel.communicators import Finish, Op
from tptrain.parallel.group import Group


class Work:
    """A collective under way: `wait` before reading its result or changing its operand."""

    def __init__(self, finish: Finish, group: Group | None = None, number: int = 0) -> None:
        """`number`: by which the black box knows the collective, which now runs in the background."""
        self.finish, self.group, self.number = finish, group, number
        if group is not None:
            group.run_on(number)

    def wait(self) -> None:
        if self.group is None:
            return
        self.group.wait(self.number)
        self.finish()
        self.group.leave(self.number)


NOTHING = Work(lambda: None)  # where there is nobody to wait for


def _work(group: Group, op: str, x: Tensor, begin: Callable[[], Finish]) -> Work:
    """Note a collective in the black box and begin it."""
    number = group.enter(op, x)
    return Work(begin(), group, number)


def all_reduce_(x: Tensor, group: Group | None, op: Op = "sum") -> Work:
    """Begin to reduce `x`, which is contiguous, over the group, in place."""
    if group is None:
        return NOTHING
    return _work(group, "all_reduce", x, lambda: group.communicator.all_reduce_(x, op))


def buffer(shape: tuple[int, ...], like: Tensor, group: Group | None) -> Tensor:
    """Memory for this rank's summand of the sum that comes next over the group: `all_reduce` or `reduce_scatter`.

    It may lie where the other ranks read it, so that it need not be copied there.
    """
    return like.new_empty(shape) if group is None else group.communicator.buffer(shape, like)


def all_reduce(x: Tensor, group: Group | None) -> tuple[Tensor, Work]:
    """Begin to sum a `buffer` over the group. The sum arrives in the tensor that is returned, after the work."""
    if group is None:
        return x, NOTHING
    number = group.enter("all_reduce", x)
    total, finish = group.communicator.sum(x)
    return total, Work(finish, group, number)


def all_gather(x: Tensor, group: Group | None, out: Tensor | None = None) -> tuple[Tensor, Work]:
    """(n, ...) of each rank -> (size * n, ...), in rank order. `x` may be this rank's part of `out`."""
    if group is None:
        return x, NOTHING
    x = x.contiguous()
    result = x.new_empty(group.size * x.shape[0], *x.shape[1:]) if out is None else out
    return result, _work(group, "all_gather", x, lambda: group.communicator.all_gather(result, x))


def reduce_scatter(x: Tensor, group: Group | None, out: Tensor | None = None) -> tuple[Tensor, Work]:
    """(size * n, ...) of each rank, summed -> this rank's (n, ...). `out` may be this rank's part of `x`."""
    if group is None:
        return x, NOTHING
    x = x.contiguous()
    result = x.new_empty(x.shape[0] // group.size, *x.shape[1:]) if out is None else out
    return result, _work(group, "reduce_scatter", x, lambda: group.communicator.reduce_scatter(result, x))


def sum_partial(x: Tensor, group: Group | None, sequence_parallel: bool) -> tuple[Tensor, Work]:
    """Partial results (N, ...), a `buffer` -> their sum over the ranks, of all tokens or each rank's own N/tp."""
    return reduce_scatter(x, group) if sequence_parallel else all_reduce(x, group)


def all_tokens(x: Tensor, group: Group | None, sequence_parallel: bool) -> tuple[Tensor, Work]:
    """All tokens (N, ...), where with sequence parallelism each rank has N/tp of them."""
    return all_gather(x, group) if sequence_parallel else (x, NOTHING)
