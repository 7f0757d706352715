"""A training step on torch's meta device: the real model and optimizer of one rank at full size, without memory,
processes or numbers. Every tensor that is made is counted, and every collective is noted instead of done.
"""

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tptrain.checkpoint.layout import flat
from tptrain.config import Config
from tptrain.config.schema import micro_batch_size
from tptrain.models.sizes import sizes
from tptrain.nn.cross_entropy import CrossEntropy
from tptrain.ops.meta import meta_table
from tptrain.ops.table import Operations
from tptrain.optim.adamw import Optimizer
from tptrain.parallel.communicators import Finish, Nobody, Op
from tptrain.parallel.group import Group
from tptrain.parallel.mesh import Grid, Mesh, tp_grid
from tptrain.train.runner import Runner
from tptrain.train.schedule import Reduce
from tptrain.train.trainer import build_model, cross_entropy, micro_batches, parameter_counts
from tptrain.watch.black_box import BlackBox

Calls = Counter[tuple[str, str, int]]  # (operation, axis, bytes of the whole tensor) -> how often


@dataclass(frozen=True)
class DryRun:
    """What one optimizer step asks of the rank that has the most to hold. Sizes in bytes."""

    parameters: int  # of the whole model
    weights: int
    gradients: int
    optimizer: int  # moments, and masters where weights are rounded
    activations: int  # kept for the backward pass when the loss of the last micro-batch begins
    peak: int  # of the forward and backward pass, state included
    host_copy: int  # on the host, of what a save writes
    calls: Calls  # collectives of a step, gradient accumulation included

    @property
    def parts(self) -> dict[str, int]:
        """The peak by what it consists of: the rest is what the loss and the backward pass hold for a while."""
        state = self.weights + self.gradients + self.optimizer
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "loss, backward": self.peak - state - self.activations,
        }


def dry_run(config: Config, tp: int, dp: int, table: Operations) -> DryRun:
    """A step of `config` on a grid of dp x tp ranks that compute with `table`."""
    train, calls = config.train, Counter()
    mesh = meta_mesh(tp_grid(tp * dp, tp, sizes(config.model).kv_heads), calls, config.parallel.sequence_parallel)
    ops = meta_table(table)
    with LiveBytes() as live:
        model, store = build_model(config, mesh, ops)
        weights = live.now
        optimizer = Optimizer(store, config.optim, mesh, config.parallel.zero == 1)
        state, gradients = live.now, sum(block.grads.nbytes for block in optimizer.state.blocks)
        loss = cross_entropy(model, ops, _Loss)
        assert isinstance(loss, _Loss)
        loss.live = live
        runner = Runner(model, loss, optimizer.reducer, train.recompute)
        parts, schedule = micro_batches(config, mesh)
        size = micro_batch_size(config, dp)
        ids = torch.zeros(size // parts, train.seq_len + 1, dtype=torch.long, device="meta")
        actions = [action for action in schedule(parts, runner.units) if not isinstance(action, Reduce)]
        runner.run(actions, lambda _: (ids[:, :-1], ids[:, 1:].flatten()), 1.0)  # one micro-batch
        for call in calls:
            calls[call] *= train.global_batch_size // dp // size
        peak = live.peak
        optimizer.reducer.finish()
        optimizer.reducer.norm_and_flags()
        optimizer.publish()
    return DryRun(
        parameters=parameter_counts(model)[0],
        weights=weights,
        gradients=gradients,
        optimizer=state - weights - gradients,
        activations=loss.kept - state,
        peak=peak,
        host_copy=sum(tensor.nbytes for block in flat(optimizer.state) for tensor in block.values()),
        calls=calls,
    )


def meta_mesh(grid: Grid, calls: Calls, sequence_parallel: bool = False) -> Mesh:
    """The last rank of a grid, which has the padding of the vocabulary; its collectives are counted in `calls`."""
    box, groups = _NoBox(), {}
    for axis in grid.communicating:
        if grid.size(axis) > 1:
            same = next((group for group in groups.values() if group.size == grid.size(axis)), None)
            ranks = tuple(next(ranks for ranks in grid.partition(axis) if grid.world - 1 in ranks))
            name = same.axis if same is not None and same.ranks == ranks else axis
            groups[axis] = Group(name, ranks, _Counting(name, calls), box)
    sequence_parallel = sequence_parallel and grid.size("tp") > 1
    return Mesh(grid, grid.world - 1, torch.device("meta"), groups, sequence_parallel=sequence_parallel, box=box)


class _NoBox(BlackBox):
    """Nobody supervises a dry run."""

    def enter(
        self, op: str, shape: tuple[int, ...], dtype: Any, axis: str, ranks: Sequence[int], state: int = 0
    ) -> int:
        return 0

    def leave(self, number: int) -> None:
        pass


class _Loss(CrossEntropy):
    """Notes what is alive when the forward pass has ended."""

    live: "LiveBytes"
    kept = 0

    def backward(self, x: Tensor, targets: Tensor, scale: float, input_gradient: bool = True) -> tuple[Tensor, Tensor]:
        self.kept = self.live.now
        return super().backward(x, targets, scale, input_gradient)


class _Counting(Nobody):
    """Counts collectives by operation, axis and bytes of the whole tensor."""

    def __init__(self, axis: str, calls: Calls) -> None:
        self.axis, self.calls = axis, calls

    def all_reduce_(self, x: Tensor, op: Op) -> Finish:
        self.calls["all_reduce", self.axis, x.nbytes] += 1
        return super().all_reduce_(x, op)

    def sum(self, x: Tensor) -> tuple[Tensor, Finish]:
        return x, self.all_reduce_(x, "sum")

    def all_gather(self, out: Tensor, x: Tensor) -> Finish:
        self.calls["all_gather", self.axis, out.nbytes] += 1
        return super().all_gather(out, x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Finish:
        self.calls["reduce_scatter", self.axis, x.nbytes] += 1
        return super().reduce_scatter(out, x)


def _grouped_product(x: Tensor, y: Tensor, offs: Tensor | None = None, **others: Any) -> Tensor:
    """The result of `torch.nn.functional.grouped_mm` on the meta device, where torch 2.13 has it for bf16 only: rows
    (N, K) with their experts' weights (E, K, M) -> (N, M), or (K, N) and (N, M) -> (E, K, M), these weights' gradient.
    """
    if x.dim() == y.dim() == 2:
        assert offs is not None
        return x.new_empty(len(offs), x.shape[0], y.shape[1])
    return x.new_empty(*x.shape[:-1], y.shape[-1])


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made under it and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # by storage
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True  # Transformers asks whether each row of a batch is one sequence
        if func is torch.ops.aten._grouped_mm.default and args[0].is_meta:
            result = _grouped_product(*args[:2], *args[2:3], **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)):
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)
