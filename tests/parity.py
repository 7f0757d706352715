"""One step of our model on some ranks, and its distance from a reference. Runs inside `distributed.run_ranks`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from tests import reference as ref
from tests.distributed import gather_global, mesh
from tests.models import training
from tptrain.config.schema import OptimConfig
from tptrain.models.settings import decoder_spec
from tptrain.nn import linear
from tptrain.nn.parameter import Parameter, parameters, sharding, use
from tptrain.ops.choose import choose
from tptrain.ops.table import REFERENCE
from tptrain.optim import reduce, state
from tptrain.parallel import collectives
from tptrain.parallel.mesh import Mesh
from tptrain.train.schedule import overlapped, plain

Distances = dict[str, float]


@dataclass(frozen=True)
class Topology:
    tp: int
    sequence_parallel: bool = False
    zero: bool = False
    shared: bool = False  # reduce through shared memory
    recompute: str = "none"
    overlap: bool = False
    kernels: Path | None = None  # compute with the kernels in C that lie or are compiled here, where the CPU has some


def distances(
    case: ref.Case, reference: ref.Reference, where: Topology, mutation: str | None = None, device: str = "cpu"
) -> Distances:
    """Relative distance of the loss, the logits, the norm, each gradient and each stepped parameter, on every rank.

    The batch is split over dp; the mean over it is what the reference computed. With ZeRO-1 a rank has the sum of only
    a part of the gradients, so these are compared without it.
    """
    grid = mesh(where.tp, decoder_spec(case.ours).kv_heads, device, where.shared, where.sequence_parallel)
    with MUTATIONS[mutation]() if mutation else nullcontext():
        settings = OptimConfig(beta1=ref.BETAS[0], beta2=ref.BETAS[1], eps=ref.EPS, weight_decay=ref.DECAY)
        ops = choose(device, "auto", where.kernels) if where.kernels else REFERENCE
        tiny = training(case.ours, grid, zero=where.zero, recompute=where.recompute, optim=settings, ops=ops)
        model, optimizer = tiny.model, tiny.optimizer
        optimizer.state.initialise(lambda key, p: _slice(reference.weights[key], p))
        share = ref.BATCH // grid.size("dp")
        first = grid.index("dp") * share
        rows = reference.tokens[first : first + share].to(grid.device)
        with torch.no_grad():
            x = model(rows[:, :-1])
            logits = model.logits(x).view(share, ref.SEQ_LEN, -1)  # (b, T, V/tp)
            losses = tiny.loss.losses(x, rows[:, 1:].flatten())  # (b*T,)
        tokens, schedule, parts = ref.BATCH * ref.SEQ_LEN, *((overlapped, 2) if where.overlap else (plain, 1))
        loss = tiny.backward(rows, 1 / tokens, schedule, parts)
        optimizer.reducer.finish()
        grads = {key: p.main_grad.clone() for key, p in parameters(model) if p.main_grad is not None}
        norm, _ = optimizer.reducer.norm_and_flags()
        optimizer.reducer.clip(norm, ref.CLIP)
        optimizer.step(ref.LR)
    values: Distances = {"norm": abs(norm.item() / reference.norm - 1)}
    values["one loss"] = abs(losses.sum().item() / tokens / loss.item() - 1)
    collectives.all_reduce_(loss, grid.group("dp")).wait()
    values["loss"] = abs(loss.item() / reference.loss - 1)
    columns = gather_global(logits.cpu(), sharding(grid, (share, ref.SEQ_LEN, 256), {2: "tp"}), grid)
    values["logits"] = _distance(columns[..., : ref.VOCAB], reference.logits[first : first + share])
    for key, p in parameters(model):
        # A slice against the slice of the reference, on each rank: a wrong replica cannot hide.
        if not where.zero:
            # Some gradients are zero in exact arithmetic (a key's bias without rotary positions) and rounding in ours.
            values[f"grad {key}"] = _distance(grads[key].cpu(), _slice(reference.grads[key], p), 1e-4 * reference.norm)
        values[f"step {key}"] = _distance(p.detach().cpu(), _slice(reference.stepped[key], p))
    return values


def _slice(whole: Tensor, p: Parameter) -> Tensor:
    layout = p.sharding
    assert whole.shape == layout.shape
    place = zip(layout.offsets, layout.local_shape, strict=True)
    return whole[tuple(slice(start, start + length) for start, length in place)]


def _distance(ours: Tensor, theirs: Tensor, floor: float = 1e-8) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=floor)).item()


def worst(everywhere: list[Distances]) -> tuple[float, str]:
    """The largest distance over all ranks, and of what. A NaN counts as infinite."""
    pairs = [(value if value == value else float("inf"), what) for each in everywhere for what, value in each.items()]
    return max(pairs)


# ------------------------------------------------------------------------------------------------------------ mutations


def _part(x: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
    """This rank's tokens of `x`, or all of them."""
    return x.chunk(group.size)[group.ranks.index(dist.get_rank())] if sequence_parallel else x


def _drop_row_parallel_sum() -> AbstractContextManager:
    """Of the row-parallel linears: backward there is another."""
    right = linear._RowParallel.forward

    def forward(*arguments: Any) -> Any:
        with _unsummed():
            return right(*arguments)

    return patch.object(linear._RowParallel, "forward", staticmethod(forward))


def _unsummed() -> AbstractContextManager:
    def sum_partial(x: Tensor, group: Any, sequence_parallel: bool) -> Any:
        return _part(x, group, sequence_parallel).clone(), collectives.NOTHING

    return patch.object(linear, "sum_partial", sum_partial)


def _average_instead_of_sum() -> AbstractContextManager:
    right = collectives.sum_partial

    def average(x: Tensor, group: Any, sequence_parallel: bool) -> Any:
        total, work = right(x, group, sequence_parallel)
        work.wait()
        return total / group.size, collectives.NOTHING

    return patch.object(linear, "sum_partial", average)


def _drop_input_gradient_all_reduce() -> AbstractContextManager:
    right = linear._ColumnParallel.backward

    def backward(ctx: Any, grad: Tensor) -> Any:
        with _unsummed():
            return right(ctx, grad)

    return patch.object(linear._ColumnParallel, "backward", staticmethod(backward))


def _reduce_twice_backward() -> AbstractContextManager:
    """torch.distributed.nn.functional.all_reduce: its backward is another all-reduce."""
    right = linear._RowParallel.backward

    def backward(ctx: Any, grad: Tensor, _: None) -> Any:
        grad = grad.clone()
        collectives.all_reduce_(grad, ctx.mesh.group("tp")).wait()
        return right(ctx, grad, None)

    return patch.object(linear._RowParallel, "backward", staticmethod(backward))


def _wrong_kv_slice() -> AbstractContextManager:
    """Ranks take the KV heads in turn, where neighbours share one."""
    right = Mesh.index

    def index(self: Mesh, axis: str) -> int:
        return self.rank % self.size(axis) if axis == "kv_shard" else right(self, axis)

    return patch.object(Mesh, "index", index)


def _count_replicated_norms_twice() -> AbstractContextManager:
    def square_sum(self: state.BlockState, part: slice) -> Tensor:
        return self.grads[part].square().sum()

    return patch.object(state.BlockState, "square_sum", square_sum)


def _forget_partial_gradients() -> AbstractContextManager:
    right = reduce.all_reduce_

    def all_reduce_(x: Tensor, group: Any) -> Any:
        return right(x, group) if group is None or group.axis == "dp" else collectives.NOTHING

    return patch.object(reduce, "all_reduce_", all_reduce_)


def _bias_on_every_rank() -> AbstractContextManager:
    right = linear.PendingSum.wait

    def wait(self: linear.PendingSum) -> Tensor:
        y = right(self)
        return y if self.bias is None else y + use(self.bias) * (dist.get_world_size() - 1)

    return patch.object(linear.PendingSum, "wait", wait)


MUTATIONS: dict[str, Callable[[], AbstractContextManager]] = {
    "drop the forward sum": _drop_row_parallel_sum,
    "average instead of sum": _average_instead_of_sum,
    "drop the backward all-reduce": _drop_input_gradient_all_reduce,
    "all-reduce the row-parallel gradient again": _reduce_twice_backward,
    "wrong KV slice": _wrong_kv_slice,
    "count replicated norms on every rank": _count_replicated_norms_twice,
    "keep partial gradients partial": _forget_partial_gradients,
    "add the row-parallel bias on every rank": _bias_on_every_rank,
}
