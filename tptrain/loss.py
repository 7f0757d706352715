"""Cross entropy over a vocabulary that is sharded: the logits are never gathered."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.collectives import all_reduce_
from tptrain.mesh import Group, Mesh


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, start: int, valid: int, group: Group | None) -> Tensor:  # type: ignore[override]
        scores = logits.float()  # (N, V/tp)
        if valid < scores.shape[-1]:  # rows that only pad the vocabulary take no probability
            scores = scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) >= valid, -torch.inf)
        highest = scores.amax(-1)  # (N,)
        all_reduce_(highest, group, dist.ReduceOp.MAX)
        shifted = scores - highest.unsqueeze(-1)  # (N, V/tp)
        local = targets - start  # (N,)
        outside = (local < 0) | (local >= scores.shape[-1])
        local = local.masked_fill(outside, 0)
        at_target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(outside, 0.0)  # (N,)
        exponentials = shifted.exp_()  # (N, V/tp)
        sums = torch.stack([exponentials.sum(-1), at_target])  # (2, N)
        all_reduce_(sums, group)
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), local, outside)
        ctx.dtype = logits.dtype
        return sums[0].log() - sums[1]  # (N,)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        probabilities, local, outside = ctx.saved_tensors  # (N, V/tp), (N,), (N,)
        grad_logits = probabilities * grad.unsqueeze(-1)  # (N, V/tp)
        at_target = grad.masked_fill(outside, 0.0)  # (N,)
        grad_logits.scatter_add_(-1, local.unsqueeze(-1), -at_target.unsqueeze(-1))
        return grad_logits.to(ctx.dtype), None, None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int, mesh: Mesh) -> Tensor:
    """-log softmax(logits)[target] of each token, in nats: (N,) float32, the same on every rank of the tp axis.

    logits (N, V/tp), this rank's columns of the padded vocabulary; targets (N,) global ids; columns from
    `vocab_size` on are padding. Two all-reduces, of N and 2N numbers, and none backward (Megatron-LM, arXiv:1909.08053,
    section 3).
    """
    start = mesh.tp_rank * logits.shape[-1]
    valid = min(max(vocab_size - start, 0), logits.shape[-1])
    return _VocabParallelCrossEntropy.apply(logits, targets, start, valid, mesh.tp_group)  # type: ignore[return-value]
