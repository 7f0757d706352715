"""Gradient buckets (reduction and norm), AdamW and the learning-rate schedule."""

import math
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor, nn

from tptrain.collectives import all_reduce_
from tptrain.config.schema import OptimConfig
from tptrain.config.sizes import BUCKET_ELEMENTS, BUCKET_ROW
from tptrain.layers import Parameter, ShardSpec, parameters
from tptrain.mesh import Mesh


class Bucket:
    """One flat float32 buffer of which the gradients of some parameters are views: reduced and scaled as one tensor."""

    def __init__(self, members: list[Parameter]) -> None:
        self.spec: ShardSpec = members[0].spec  # alike in `replicas` and `partial_grad` for all members
        rows = math.ceil(sum(p.numel() for p in members) / BUCKET_ROW)
        self.flat = torch.zeros(rows * BUCKET_ROW + 1, device=members[0].device)  # the last one: see Gradients.reduce
        offset = 0
        for p in members:
            p.grad = self.flat[offset : offset + p.numel()].view_as(p)  # autograd accumulates into it in place
            offset += p.numel()

    def square_sum(self) -> Tensor:
        """Sum of squares, a scalar. By rows: one float32 sum over 16 M elements is 0.5 % short on a cpu."""
        return torch.linalg.vector_norm(self.flat[:-1].view(-1, BUCKET_ROW), dim=1).square().sum()


class Gradients:
    """All gradients of a model on this rank. The loss is divided by the global token count, so sums are averages."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.mesh = mesh
        kinds = sorted((p for _, p in parameters(model)), key=lambda p: (p.spec.replicas, p.spec.partial_grad))
        self.buckets = [
            Bucket(members)
            for _, alike in groupby(kinds, key=lambda p: (p.spec.replicas, p.spec.partial_grad))
            for members in _split(alike)
        ]

    def zero(self) -> None:
        for bucket in self.buckets:
            bucket.flat.zero_()

    def reduce(self, flag: bool = False) -> None:
        """Sum over the ranks that each computed a part: the dp axis, and the replicas of a `partial_grad`.

        The flag rides along in an element of its own, here over dp and in `norm` over tp: so all ranks learn whether
        one of them raised it, and no collective is added.
        """
        self.buckets[0].flat[-1] = float(flag)
        for bucket in self.buckets:
            if bucket.spec.partial_grad:
                whole_axis = bucket.spec.replicas == self.mesh.tp
                all_reduce_(bucket.flat, self.mesh.tp_group if whole_axis else self.mesh.kv_group)
        pending = [all_reduce_(bucket.flat, self.mesh.dp_group, async_op=True) for bucket in self.buckets]
        for work in pending:
            if work is not None:
                work.wait()

    def norm(self) -> Tensor:
        """The 2-norm of the global gradient and the number of flags raised: (2,), the same on every rank.

        The sum over tp meets each element `replicas` times: once for a plain shard, tp times for a replicated tensor.
        """
        total = torch.stack([bucket.square_sum() / bucket.spec.replicas for bucket in self.buckets]).sum()
        both = torch.stack([total, self.buckets[0].flat[-1]])
        all_reduce_(both, self.mesh.tp_group)
        return torch.stack([both[0].sqrt(), both[1]])

    def clip(self, norm: Tensor, largest: float) -> None:
        """Scale all gradients so that the global norm is at most `largest`; 0 leaves them."""
        if largest > 0:
            scale = (largest / (norm + 1e-6)).clamp(max=1.0)  # stays on the device: no wait for the gpu
            for bucket in self.buckets:
                bucket.flat.mul_(scale)


def _split(members: Iterable[Parameter]) -> list[list[Parameter]]:
    """Cut a run of parameters into buckets of about BUCKET_ELEMENTS."""
    buckets: list[list[Parameter]] = []
    filled = 0
    for p in members:
        if not buckets or filled + p.numel() > BUCKET_ELEMENTS:
            buckets.append([])
            filled = 0
        buckets[-1].append(p)
        filled += p.numel()
    return buckets


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over local slices; matrices decay, vectors do not.

    Its moments exist from the start, as float32 like the parameters, so that a checkpoint always has the same entries.
    """
    matrices = [p for _, p in parameters(model) if len(p.spec.shape) > 1]
    vectors = [p for _, p in parameters(model) if len(p.spec.shape) == 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for _, p in parameters(model):
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        }
    return optimizer


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step `step` (the first is 1) of `steps`: linear warm-up, then cosine, linear or constant."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)  # 0 to 1 at the last step
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)
