"""One step of our model on some ranks, and its distance from a reference. Runs inside `distributed.run_ranks`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from tests import reference as ref
from tests.distributed import gather_global, mesh
from tptrain import buckets, collectives, layers, linear
from tptrain.config.schema import OptimConfig, kv_heads
from tptrain.layers import Parameter, ShardSpec, parameters, use
from tptrain.loss import cross_entropy, cross_entropy_backward
from tptrain.model import Decoder
from tptrain.optim import Optimizer

Distances = dict[str, float]


@dataclass(frozen=True)
class Topology:
    tp: int
    sequence_parallel: bool = False
    zero: bool = False
    shared: bool = False  # reduce through shared memory
    recompute: str = "none"
    overlap: bool = False


def distances(
    name: str, reference: ref.Reference, where: Topology, mutation: str | None = None, device: str = "cpu"
) -> Distances:
    """Relative distance of the loss, the logits, the norm, each gradient and each stepped parameter, on every rank.

    The batch is split over dp; the mean over it is what the reference computed. With ZeRO-1 a rank has the sum of only
    a part of the gradients, so these are compared without it.
    """
    case = ref.CASES[name]
    grid = mesh(where.tp, kv_heads(case.ours), device, where.shared, where.sequence_parallel)
    with MUTATIONS[mutation]() if mutation else nullcontext():
        model = Decoder(case.ours, grid, where.recompute, where.overlap)
        settings = OptimConfig(
            beta1=ref.BETAS[0], beta2=ref.BETAS[1], eps=ref.EPS, weight_decay=ref.DECAY, grad_clip=ref.CLIP
        )
        optimizer = Optimizer(model, settings, grid, torch.float32, where.zero)
        optimizer.initialise(lambda key, p: _slice(reference.weights[key], p, grid.tp_rank))
        share = ref.BATCH // grid.dp
        rows = reference.tokens[grid.dp_rank * share : (grid.dp_rank + 1) * share].to(grid.device)
        optimizer.expect_last()
        x, targets, head = model(rows[:, :-1]), rows[:, 1:].flatten(), model.lm_head.weight
        with torch.no_grad():
            logits = model.logits(x).view(share, ref.SEQ_LEN, -1)  # (b, T, V/tp)
            losses = cross_entropy(x, head, targets, ref.VOCAB, grid)  # (b*T,)
        tokens = ref.BATCH * ref.SEQ_LEN
        loss, grad = cross_entropy_backward(x.detach(), head, targets, ref.VOCAB, grid, 1 / tokens)
        x.backward(grad)
        optimizer.reduce()
        grads = {key: p.main_grad.clone() for key, p in parameters(model)}
        norm, _ = optimizer.norm()
        optimizer.clip(norm)
        optimizer.step(ref.LR)
    found: Distances = {"norm": abs(norm.item() / reference.norm - 1)}
    found["one loss"] = abs(losses.sum().item() / tokens / loss.item() - 1)
    if grid.dp_group is not None:
        dist.all_reduce(loss, group=grid.dp_group.process_group)
    found["loss"] = abs(loss.item() / reference.loss - 1)
    columns = gather_global(logits.cpu(), ShardSpec((share, ref.SEQ_LEN, 256), where.tp, 2), grid)
    theirs = reference.logits[grid.dp_rank * share : (grid.dp_rank + 1) * share]
    found["logits"] = _distance(columns[..., : ref.VOCAB], theirs)
    for key, p in parameters(model):
        # A slice against the slice of the reference, on each rank: a wrong replica cannot hide.
        if not where.zero:
            # Some gradients are zero in exact arithmetic (a key's bias without rotary positions) and rounding in ours.
            expected = _slice(reference.grads[key], p, grid.tp_rank)
            found[f"grad {key}"] = _distance(grads[key].cpu(), expected, floor=1e-4 * reference.norm)
        found[f"step {key}"] = _distance(p.detach().cpu(), _slice(reference.stepped[key], p, grid.tp_rank))
    return found


def _slice(whole: Tensor, p: Parameter, tp_rank: int) -> Tensor:
    assert whole.shape == p.spec.shape
    return whole.narrow(p.spec.dim, p.spec.start(tp_rank), p.spec.local_shape[p.spec.dim])


def _distance(mine: Tensor, theirs: Tensor, floor: float = 1e-8) -> float:
    return ((mine.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=floor)).item()


def worst(everywhere: list[Distances]) -> tuple[float, str]:
    """The largest distance over all ranks, and of what. A NaN counts as infinite."""
    pairs = [(value if value == value else float("inf"), what) for each in everywhere for what, value in each.items()]
    return max(pairs)


# ------------------------------------------------------------------------------------------------------------ mutations


def _part(x: Tensor, group: Any, sequence_parallel: bool) -> Tensor:
    """This rank's tokens of `x`, or all of them."""
    return x.chunk(len(group.ranks))[group.ranks.index(dist.get_rank())] if sequence_parallel else x


def _drop_row_parallel_sum() -> AbstractContextManager:
    """Of the row-parallel linears: backward there is another."""
    right = linear._RowParallel.forward

    def forward(*arguments: Any) -> Any:
        with _unsummed():
            return right(*arguments)

    return patch.object(linear._RowParallel, "forward", staticmethod(forward))


def _unsummed() -> AbstractContextManager:
    def sum_partial(x: Tensor, group: Any, some: bool) -> collectives.Sum:
        return collectives.Sum(_part(x, group, some).clone(), collectives.NOTHING)

    return patch.object(linear, "sum_partial", sum_partial)


def _average_instead_of_sum() -> AbstractContextManager:
    right = collectives.sum_partial

    def average(x: Tensor, group: Any, some: bool) -> collectives.Sum:
        return collectives.Sum(right(x, group, some).value() / len(group.ranks), collectives.NOTHING)

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
        collectives.all_reduce_(grad, ctx.mesh.tp_group)
        return right(ctx, grad, None)

    return patch.object(linear._RowParallel, "backward", staticmethod(backward))


def _wrong_kv_slice() -> AbstractContextManager:
    def start(self: ShardSpec, tp_rank: int) -> int:
        return tp_rank % self.slices * self.local_shape[self.dim]

    return patch.object(layers.ShardSpec, "start", start)


def _count_replicated_norms_twice() -> AbstractContextManager:
    def square_sums(self: buckets.Bucket, part: slice) -> Tensor:
        return self.grads[part].square().sum()

    return patch.object(buckets.Bucket, "square_sums", square_sums)


def _forget_partial_gradients() -> AbstractContextManager:
    right = Optimizer._begin

    def begin(self: Optimizer, bucket: buckets.Bucket) -> None:
        bucket.partial_grad = False
        right(self, bucket)

    return patch.object(Optimizer, "_begin", begin)


def _bias_on_every_rank() -> AbstractContextManager:
    right = linear.Summing.terms

    def terms(self: linear.Summing) -> tuple[Tensor, ...]:
        y, *others = right(self)
        return (y if self.bias is None else y + use(self.bias) * (dist.get_world_size() - 1), *others)

    return patch.object(linear.Summing, "terms", terms)


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
