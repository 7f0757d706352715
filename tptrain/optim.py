"""The optimizer step: gradients summed over dp, their norm, clipping, AdamW on float32 masters, and the new weights."""

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tptrain.buckets import Bucket, make_buckets
from tptrain.collectives import NOTHING, Work, all_gather, all_reduce_, reduce_scatter
from tptrain.config.schema import OptimConfig
from tptrain.layers import Parameter
from tptrain.mesh import Mesh

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """A model's weights, gradients and moments on this rank. Making one gives the model its memory.

    The loss is divided by the global token count, so sums of gradients are averages.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, mesh: Mesh, dtype: torch.dtype, zero: bool) -> None:
        self.config, self.mesh = config, mesh
        self.zero = zero and mesh.dp > 1
        part, parts = (mesh.dp_rank, mesh.dp) if self.zero else (0, 1)
        self.buckets = make_buckets(model, dtype, mesh.dp, part, parts)
        self.adamw = _adamw(self.buckets, config)
        self.reducing: list[Work] = []
        self.waiting: dict[int, int] = {}  # bucket -> gradients still to come in the last backward pass of a step
        self.copied = threading.Event()  # not set while a checkpoint copies the state: `step` waits for it
        self.copied.set()
        for index, bucket in enumerate(self.buckets):
            for _, p in bucket.members:
                p.arrived = lambda index=index: self._arrived(index)

    @torch.no_grad()
    def initialise(self, values: Callable[[str, Parameter], Tensor]) -> None:
        """Set every weight: `values` gives a parameter's slice, float32 on the cpu."""
        for bucket in self.buckets:
            parts = {piece.name: piece for piece in bucket.pieces}
            for name, p in bucket.members:
                value = values(name, p)
                p.copy_(value)
                if (piece := parts.get(name)) is not None:
                    length = piece.place.stop - piece.place.start
                    bucket.master[piece.place] = value.flatten()[piece.start : piece.start + length].to(p.device)

    # ----------------------------------------------------------------------------------------------------- gradients

    def zero_grad(self) -> None:
        """Forget the gradients: the next ones replace them."""
        for bucket in self.buckets:
            bucket.padding.zero_()  # a step whose norm was no number has spoilt it
            for _, p in bucket.members:
                p.fresh = True

    def expect_last(self) -> None:
        """The next backward pass is the step's last: each bucket is reduced as soon as it is complete."""
        if self.mesh.dp_group is not None:
            self.waiting = {i: sum(p.uses for _, p in b.members) for i, b in enumerate(self.buckets)}

    def _arrived(self, index: int) -> None:
        if index in self.waiting:
            self.waiting[index] -= 1
            if self.waiting[index] == 0:  # at the same place in the backward pass on every rank
                del self.waiting[index]
                self._begin(self.buckets[index])

    def _begin(self, bucket: Bucket) -> None:
        """Start to sum a bucket over the ranks that each computed a part: replicas of a partial gradient, and dp."""
        if bucket.partial_grad:
            whole_axis = bucket.replicas == self.mesh.tp
            all_reduce_(bucket.grads, self.mesh.tp_group if whole_axis else self.mesh.kv_group)
        if self.zero:
            mine = bucket.grads[bucket.own]
            self.reducing.append(reduce_scatter(bucket.grads, self.mesh.dp_group, True, out=mine)[1])
        else:
            self.reducing.append(all_reduce_(bucket.grads, self.mesh.dp_group, async_op=True))

    def reduce(self) -> None:
        """Sum what `expect_last` has not summed yet, and wait for all of it."""
        assert not self.waiting, "a gradient did not arrive"
        if not self.reducing:
            for bucket in reversed(self.buckets):
                self._begin(bucket)
        for work in self.reducing:
            work.wait()
        self.reducing = []

    def norm(self, flag: bool = False) -> Tensor:
        """The 2-norm of the global gradient and the number of flags raised: (2,), the same on every rank.

        Each dp rank sums the squares of a part. The flag is a rank's wish to stop, which so costs no collective. All
        ranks' summands are gathered and added in the order of the ranks, so no backend decides on the rounding.
        """
        total = torch.zeros(1, 2, device=self.mesh.device)
        for bucket in self.buckets:
            total[0, 0] += bucket.square_sums(bucket.part(self.mesh.dp_rank, self.mesh.dp))
        total[0, 1] = float(flag)
        total = all_gather(total, self.mesh.world_group)[0].sum(0)  # (world, 2) -> (2,)
        total[0].sqrt_()
        return total

    def clip(self, norm: Tensor) -> None:
        """Scale the gradients so that the global norm is at most `optim.grad_clip`; 0 leaves them."""
        if self.config.grad_clip > 0:
            scale = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)  # stays on the device: no wait for the gpu
            for bucket in self.buckets:
                bucket.grads[bucket.own].mul_(scale)

    # ------------------------------------------------------------------------------------------------------- weights

    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """Update the masters and publish them. Where `skip` is 1 the masters stay as they are."""
        self.copied.wait()
        if skip is not None:
            self.adamw.found_inf = skip  # type: ignore[attr-defined]
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for bucket in self.buckets:
            bucket.master.grad = bucket.grads[bucket.own]
        self.adamw.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Masters to weights: rounded to the compute precision, and gathered over dp."""
        gathering = [NOTHING]
        for bucket in self.buckets:
            mine = bucket.weights[bucket.own]
            if mine.dtype != torch.float32:
                mine.copy_(bucket.master)
            if self.zero:
                gathering.append(all_gather(mine, self.mesh.dp_group, True, out=bucket.weights)[1])  # type: ignore[arg-type]
        for work in gathering:
            work.wait()

    @property
    def updates(self) -> int:
        """Updates of the weights so far: fewer than steps where some were skipped."""
        return int(self.adamw.state[self.buckets[0].master]["step"].item())

    @updates.setter
    def updates(self, value: int) -> None:
        for bucket in self.buckets:
            self.adamw.state[bucket.master]["step"].fill_(value)


def _adamw(buckets: list[Bucket], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over whole buckets.

    Its moments exist from the start, as float32 like the masters, so that a checkpoint always has the same entries.
    """
    groups = [
        {"params": [b.master for b in buckets if b.decay], "weight_decay": config.weight_decay},
        {"params": [b.master for b in buckets if not b.decay], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for bucket in buckets:
        zeros = {moment: torch.zeros_like(bucket.master, requires_grad=False) for moment in MOMENTS}
        adamw.state[bucket.master] = {"step": torch.zeros((), device=bucket.master.device)} | zeros
    return adamw


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step `step` (the first is 1) of `steps`: linear warm-up, then cosine, linear or constant."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)  # 0 to 1 at the last step
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
