# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false
"""What a peer hands to the loop in `rank.py`, and the pieces most peers share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .cells import ADAM


@dataclass
class Contestant:
    """One rank's model, ready to train."""

    loss: Callable[[Tensor, Tensor], Tensor]  # inputs, targets, each (B, T) -> mean cross entropy, a scalar
    backward: Callable[[Tensor], Any]  # of that scalar
    clip: Callable[[], Any]  # gradients to a global norm of at most ADAM.clip
    optimizer: Any  # with zero_grad() and step()

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One optimizer step; the mean loss in nats."""
        self.optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        self.backward(loss)
        self.clip()
        self.optimizer.step()
        return loss.item()


def adamw(parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """Fused AdamW, which is what tptrain, torchtitan and Transformers' Trainer use.

    Sharded (DTensor) and plain parameters go into different groups: the fused kernel takes no mixture.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for p in parameters:
        groups.setdefault((isinstance(p, DTensor), p.dim() > 1), []).append(p)
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": ADAM.decay if matrix else 0.0} for (_, matrix), members in groups.items()],
        lr=ADAM.lr,
        betas=(ADAM.beta1, ADAM.beta2),
        eps=ADAM.eps,
        fused=True,
    )


def clip(parameters: Iterable[Tensor]) -> None:
    """PyTorch's clipping, for sharded (DTensor) and plain, replicated parameters: it takes one kind at a time."""
    kinds: dict[bool, list[Tensor]] = {}
    for p in parameters:
        kinds.setdefault(isinstance(p, DTensor), []).append(p)
    norms = []
    for members in kinds.values():
        norm = nn.utils.get_total_norm([p.grad for p in members if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).norm()
    for members in kinds.values():
        nn.utils.clip_grads_with_norm_(members, ADAM.clip, total)


def clip_shards(parameters: Sequence[Tensor]) -> None:
    """Clipping where all are plain tensors: matrices are this rank's shards, vectors are whole on every rank."""
    square = torch.zeros(2, device=parameters[0].device)  # of the vectors' gradients, of the matrices'
    for p, norm in zip(parameters, torch._foreach_norm([p.grad for p in parameters]), strict=True):
        square[int(p.dim() > 1)] += norm.square()
    dist.all_reduce(square[1:])
    nn.utils.clip_grads_with_norm_(parameters, ADAM.clip, square.sum().sqrt())
