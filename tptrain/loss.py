"""Cross entropy over a vocabulary that is sharded, straight from the hidden states: logits exist for some tokens at a
time, on each rank for its own columns, and are never gathered.

Shapes: N tokens, c of a chunk; D hidden; v a rank's columns of the vocabulary, without padding.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tptrain import fused
from tptrain.collectives import NOTHING, all_gather, all_reduce_, reduce_scatter, whole
from tptrain.config.sizes import loss_chunk
from tptrain.layers import Parameter
from tptrain.linear import add_product
from tptrain.mesh import Mesh


@torch.no_grad()
def cross_entropy(x: Tensor, head: Parameter, targets: Tensor, vocab_size: int, mesh: Mesh) -> Tensor:
    """-log softmax(x head')[target] of each token, in nats: (N,) float32, the same on every rank of the tp axis.

    x (N/tp, D) with sequence parallelism, else (N, D); head (V/tp, D), this rank's rows of the padded vocabulary, of
    which those from `vocab_size` on are padding; targets (N,) global ids.
    """
    x, _ = whole(x, mesh.tp_group, mesh.sequence_parallel)  # (N, D)
    first, rows = _rows(head, vocab_size, mesh)
    losses = [
        lse - at_target
        for some in _chunks(x, head)
        for lse, at_target in [_joined(x[some] @ rows.t(), targets[some] - first, mesh)]
    ]
    return torch.cat(losses)


@torch.no_grad()
def cross_entropy_backward(
    x: Tensor, head: Parameter, targets: Tensor, vocab_size: int, mesh: Mesh, scale: float
) -> tuple[Tensor, Tensor]:
    """`scale` times the summed cross entropy, a scalar, and its gradient to x, of x's shape; see `cross_entropy`.

    The loss is where the forward pass ends and the backward pass begins, so this does both: the gradient of the head
    is added to `head.main_grad`. For each chunk of tokens there is one all-gather of 2 numbers a token, and for all of
    them one all-reduce (or reduce-scatter) of the gradient to x.
    """
    x, _ = whole(x, mesh.tp_group, mesh.sequence_parallel)  # (N, D)
    first, rows = _rows(head, vocab_size, mesh)
    grad_x, loss, summing = torch.empty_like(x), torch.zeros((), device=x.device), NOTHING
    for some in _chunks(x, head):
        logits, local = x[some] @ rows.t(), targets[some] - first  # (c, v), (c,)
        lse, at_target = _joined(logits, local, mesh)
        loss += (lse - at_target).sum()
        grad = fused.logit_gradient(logits, lse, local, at_target, scale)  # (c, v)
        torch.mm(grad, rows, out=grad_x[some])  # this rank's part of the sum over tp
        if some.stop == len(x) and mesh.sequence_parallel:
            grad_x, summing = reduce_scatter(grad_x, mesh.tp_group, async_op=True)  # (n, D)
        elif some.stop == len(x):
            summing = all_reduce_(grad_x, mesh.tp_group, async_op=True)
        add_product(head.main_grad[: len(rows)], grad, x[some], head.fresh)  # while the gradient to x travels
        if head.fresh:
            head.main_grad[len(rows) :].zero_()  # of padding
            head.fresh = False
    head.arrived()
    summing.wait()
    return loss * scale, grad_x


def _rows(head: Parameter, vocab_size: int, mesh: Mesh) -> tuple[int, Tensor]:
    """The first id of this rank's rows, and the rows that are no padding: (v, D)."""
    first = mesh.tp_rank * len(head)
    return first, head.detach()[: max(0, min(vocab_size - first, len(head)))]


def _chunks(x: Tensor, head: Parameter) -> Iterator[slice]:
    length = loss_chunk(len(x), len(head), x.device.type)  # the same on every rank
    for start in range(0, len(x), length):
        yield slice(start, min(start + length, len(x)))


def _joined(logits: Tensor, local: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """log sum exp of each token's logits over the whole vocabulary, and the logit of its target: (c,) each, float32.

    logits (c, v), this rank's; local (c,), the target counted from this rank's first column.
    """
    mine = fused.statistics(logits, local)  # (1, 2, c)
    lse, at_target = all_gather(mine, mesh.tp_group)[0].unbind(1)  # (tp, c) each
    return lse.logsumexp(0), at_target.sum(0)
