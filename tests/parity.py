"""One step of our model on some ranks, and its distance from a reference. Runs inside `distributed.run_ranks`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from tests import reference as ref
from tests.distributed import gather_global, mesh
from tptrain import collectives, layers, optim
from tptrain.config.schema import OptimConfig, kv_heads
from tptrain.layers import ShardSpec, parameters
from tptrain.loss import vocab_parallel_cross_entropy
from tptrain.model import Decoder

Distances = dict[str, float]


def distances(
    name: str, reference: ref.Reference, tp: int, mutation: str | None = None, device: str = "cpu"
) -> Distances:
    """Relative distance of the loss, the logits, the norm, each gradient and each stepped parameter, on every rank.

    The batch is split over dp; the mean over it is what the reference computed.
    """
    case = ref.CASES[name]
    grid = mesh(tp, kv_heads(case.ours), device)
    with MUTATIONS[mutation]() if mutation else nullcontext():
        model = Decoder(case.ours, grid)
        with torch.no_grad():
            for key, p in parameters(model):
                whole, start = reference.weights[key], p.spec.start(grid.tp_rank)
                assert whole.shape == p.spec.shape, key
                p.copy_(whole.narrow(p.spec.dim, start, p.shape[p.spec.dim]))
        gradients = optim.Gradients(model, grid)
        settings = OptimConfig(lr=ref.LR, beta1=ref.BETAS[0], beta2=ref.BETAS[1], eps=ref.EPS, weight_decay=ref.DECAY)
        optimizer = optim.build_optimizer(model, settings)
        share = ref.BATCH // grid.dp
        rows = reference.tokens[grid.dp_rank * share : (grid.dp_rank + 1) * share].to(grid.device)
        logits = model(rows[:, :-1])  # (b, T, V/tp)
        losses = vocab_parallel_cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ref.VOCAB, grid)
        loss = losses.sum() / (ref.BATCH * ref.SEQ_LEN)
        loss.backward()
        gradients.reduce()
        grads = {key: p.grad.clone() for key, p in parameters(model) if p.grad is not None}
        norm, _ = gradients.norm()
        gradients.clip(norm, ref.CLIP)
        optimizer.step()
    found: Distances = {"norm": abs(norm.item() / reference.norm - 1)}
    total = loss.detach().clone()
    if grid.dp_group is not None:
        dist.all_reduce(total, group=grid.dp_group.process_group)
    found["loss"] = abs(total.item() / reference.loss - 1)
    columns = gather_global(logits.detach().cpu(), ShardSpec((*rows[:, 1:].shape, 256), tp, 2), grid)
    theirs = reference.logits[grid.dp_rank * share : (grid.dp_rank + 1) * share]
    found["logits"] = _distance(columns[..., : ref.VOCAB], theirs)
    for key, p in parameters(model):
        # A slice against the slice of the reference, on each rank: a wrong replica cannot hide.
        start, length = p.spec.start(grid.tp_rank), p.shape[p.spec.dim]
        grad, stepped = (each[key].narrow(p.spec.dim, start, length) for each in (reference.grads, reference.stepped))
        # Some gradients are zero in exact arithmetic (a key's bias without rotary positions) and rounding in ours.
        found[f"grad {key}"] = _distance(grads[key].cpu(), grad, floor=1e-4 * reference.norm)
        found[f"step {key}"] = _distance(p.detach().cpu(), stepped)
    return found


def _distance(mine: Tensor, theirs: Tensor, floor: float = 1e-8) -> float:
    return ((mine.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=floor)).item()


def worst(everywhere: list[Distances]) -> tuple[float, str]:
    """The largest distance over all ranks, and of what. A NaN counts as infinite."""
    pairs = [(value if value == value else float("inf"), what) for each in everywhere for what, value in each.items()]
    return max(pairs)


# ------------------------------------------------------------------------------------------------------------ mutations


def _drop_row_parallel_all_reduce() -> AbstractContextManager:
    return patch.object(layers, "all_reduce_forward", lambda x, group: x)


def _average_instead_of_sum() -> AbstractContextManager:
    right = collectives.all_reduce_forward
    return patch.object(layers, "all_reduce_forward", lambda x, group: right(x, group) / len(group.ranks))


def _drop_input_gradient_all_reduce() -> AbstractContextManager:
    right = collectives.all_reduce_
    return patch.object(
        collectives, "all_reduce_", lambda *a, async_op=False: None if async_op else right(*a, async_op=async_op)
    )


def _reduce_twice_backward() -> AbstractContextManager:
    """torch.distributed.nn.functional.all_reduce: its backward is another all-reduce."""
    from torch.distributed.nn.functional import all_reduce

    return patch.object(layers, "all_reduce_forward", lambda x, group: all_reduce(x, group=group.process_group))


def _wrong_kv_slice() -> AbstractContextManager:
    def start(self: ShardSpec, tp_rank: int) -> int:
        return tp_rank % self.slices * self.local_shape[self.dim]

    return patch.object(layers.ShardSpec, "start", start)


def _count_replicated_norms_twice() -> AbstractContextManager:
    def norm(self: optim.Gradients) -> Tensor:
        total = torch.stack([bucket.flat.square().sum() for bucket in self.buckets]).sum()
        collectives.all_reduce_(total, self.mesh.tp_group)
        return torch.stack([total.sqrt(), total])

    return patch.object(optim.Gradients, "norm", norm)


def _forget_partial_gradients() -> AbstractContextManager:
    def reduce(self: optim.Gradients, flag: bool = False) -> None:
        for bucket in self.buckets:
            collectives.all_reduce_(bucket.flat, self.mesh.dp_group)

    return patch.object(optim.Gradients, "reduce", reduce)


def _bias_on_every_rank() -> AbstractContextManager:
    def row_parallel(x: Tensor, grid: layers.Mesh, linear: layers.RowLinear) -> Tensor:
        return layers.all_reduce_forward(torch.nn.functional.linear(x, linear.weight, linear.bias), grid.tp_group)

    from tptrain import model

    return patch.object(model, "row_parallel", row_parallel)


MUTATIONS: dict[str, Callable[[], AbstractContextManager]] = {
    "drop the forward all-reduce": _drop_row_parallel_all_reduce,
    "average instead of sum": _average_instead_of_sum,
    "drop the backward all-reduce": _drop_input_gradient_all_reduce,
    "all-reduce the row-parallel gradient again": _reduce_twice_backward,
    "wrong KV slice": _wrong_kv_slice,
    "count replicated norms on every rank": _count_replicated_norms_twice,
    "keep partial gradients partial": _forget_partial_gradients,
    "add the row-parallel bias on every rank": _bias_on_every_rank,
}
