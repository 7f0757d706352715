"""Cross entropy over a vocabulary that is sharded, straight from the hidden states: logits exist for some tokens at a
time, on each rank for its own columns, and are never gathered.

Shapes: N tokens, c of a chunk; D hidden; v a rank's columns of the vocabulary, without padding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.nn.linear import add_product
from tptrain.nn.parameter import Parameter
from tptrain.ops.table import Operations
from tptrain.parallel.collectives import NOTHING, all_gather, all_reduce_, all_tokens, reduce_scatter
from tptrain.parallel.group import Group
from tptrain.parallel.mesh import Mesh

LOGITS_BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}  # of a chunk in float32


@dataclass(frozen=True)
class OutputHead:
    """What makes logits of hidden states: `softcap` turns logits z into cap * tanh(z / cap)."""

    weight: Parameter  # (V/tp, D)
    vocab_size: int  # rows without padding
    softcap: float | None = None
    bias: Parameter | None = None  # (V/tp,)


class CrossEntropy:
    """The loss of an output head, whose weight (V/tp, D) is this rank's rows of the padded vocabulary: those from
    `vocab_size` on are padding.
    """

    def __init__(
        self,
        head: Parameter,
        vocab_size: int,
        mesh: Mesh,
        ops: Operations,
        softcap: float | None = None,
        bias: Parameter | None = None,
    ) -> None:
        """`softcap`: logits z are cap * tanh(z / cap); `bias`: (V/tp,), of the head."""
        self.head, self.mesh, self.ops, self.softcap, self.bias = head, mesh, ops, softcap, bias
        self.first = head.sharding.offsets[0]  # id of this rank's first row
        self.columns = max(0, min(vocab_size - self.first, head.sharding.local_shape[0]))  # v

    @torch.no_grad()
    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """-log softmax(x head')[target] of each token, in nats: (N,) float32, the same on every rank of the tp axis.

        x (N/tp, D) with sequence parallelism, else (N, D); targets (N,) global ids.
        """
        losses = []
        for logits, local in self._chunks_of_logits(x, targets):
            lse, at_target = self._statistics(logits, local)
            losses.append(lse - at_target)
        return torch.cat(losses)

    @torch.no_grad()
    def scores(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`losses`, and whether each target is the likeliest token, the first of equals: (N,) each."""
        losses, greedy, group = [], [], self.mesh.group("tp")
        for logits, local in self._chunks_of_logits(x, targets):
            greedy.append(largest(logits, self.first, group) == local + self.first)
            lse, at_target = self._statistics(logits, local)
            losses.append(lse - at_target)
        return torch.cat(losses), torch.cat(greedy)

    @torch.no_grad()
    def backward(self, x: Tensor, targets: Tensor, scale: float, input_gradient: bool = True) -> tuple[Tensor, Tensor]:
        """`scale` times the summed cross entropy, a scalar, and its gradient to x, of x's shape; see `losses`.

        The loss is where the forward pass ends and the backward pass begins, so this does both: the gradient of the
        head is added to its `main_grad`. For each chunk of tokens there is one all-gather of 2 numbers a token, and for
        all of them one all-reduce (or reduce-scatter) of the gradient to x, left out without `input_gradient`.
        """
        head, group, sequence_parallel = self.head, self.mesh.group("tp"), self.mesh.sequence_parallel
        x, gathering = all_tokens(x, group, sequence_parallel)  # (N, D)
        gathering.wait()
        rows = head.detach()[: self.columns]  # (v, D)
        grad_x, loss, summing = torch.empty_like(x), torch.zeros((), device=x.device), NOTHING
        for chunk in self._chunks(x):
            logits, local = self._logits(x[chunk], rows), targets[chunk] - self.first  # (c, v), (c,)
            slope = None if self.softcap is None else 1.0 - (logits.float() / self.softcap).square()  # (c, v)
            lse, at_target = self._statistics(logits, local)
            loss += (lse - at_target).sum()
            grad = self.ops.logit_gradient_(logits, lse, local, at_target, scale)  # (c, v)
            grad = grad if slope is None else grad.mul_(slope)
            if input_gradient:
                torch.mm(grad, rows, out=grad_x[chunk])  # this rank's part of the sum over tp
            if input_gradient and chunk.stop == len(x):
                if sequence_parallel:
                    grad_x, summing = reduce_scatter(grad_x, group)  # (n, D)
                else:
                    summing = all_reduce_(grad_x, group)
            if head.main_grad is not None:  # while the gradient to x travels
                add_product(head.main_grad[: self.columns], grad, x[chunk], head.overwrite)
                if head.overwrite:
                    head.main_grad[self.columns :].zero_()  # of padding
                    head.overwrite = False
            if self.bias is not None and self.bias.main_grad is not None:
                self.bias.add_grad(F.pad(grad.sum(0, dtype=torch.float32), (0, len(self.bias) - self.columns)))
        summing.wait()
        return loss * scale, grad_x

    def _chunks_of_logits(self, x: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's logits (c, v) of some tokens at a time, and their targets (c,), counted from its first column."""
        x, gathering = all_tokens(x, self.mesh.group("tp"), self.mesh.sequence_parallel)  # (N, D)
        gathering.wait()
        rows = self.head.detach()[: self.columns]  # (v, D)
        for chunk in self._chunks(x):
            yield self._logits(x[chunk], rows), targets[chunk] - self.first

    def _logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """(c, D), the head's rows (v, D) -> (c, v)."""
        bias = None if self.bias is None else self.bias.detach()[: self.columns]
        return capped(F.linear(x, rows, bias), self.softcap)

    def _chunks(self, x: Tensor) -> Iterator[slice]:
        length = chunk_length(len(x), self.head.sharding.local_shape[0], self.ops.device)  # the same on every rank
        for start in range(0, len(x), length):
            yield slice(start, min(start + length, len(x)))

    def _statistics(self, logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """log sum exp of each token's logits over the whole vocabulary, and its target's logit: (c,) each, float32.

        logits (c, v), this rank's; local (c,), the target counted from this rank's first column.
        """
        own = self.ops.statistics(logits, local)  # (1, 2, c)
        everyone, gathering = all_gather(own, self.mesh.group("tp"))  # (tp, 2, c)
        gathering.wait()
        lse, at_target = everyone.unbind(1)  # (tp, c) each
        return lse.logsumexp(0), at_target.sum(0)


def capped(z: Tensor, softcap: float | None) -> Tensor:
    """cap * tanh(z / cap), of z's shape; z where there is no cap."""
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def largest(scores: Tensor, first: int, group: Group | None) -> Tensor:
    """The id of each row's largest score over the ranks of a group, the first of equals: (N, v) of a rank whose first
    column is the id `first` -> (N,), the same on every rank.
    """
    if scores.shape[1] == 0:
        value, place = scores.new_full((len(scores),), -torch.inf), scores.new_zeros(len(scores), dtype=torch.int64)
    else:
        value, place = scores.max(dim=-1)
    own = torch.stack([value.double(), (place + first).double()]).unsqueeze(0)  # (1, 2, N); ids are exact
    everyone, gathering = all_gather(own, group)  # (ranks, 2, N)
    gathering.wait()
    values, ids = everyone.unbind(1)  # (ranks, N) each
    return ids.gather(0, values.argmax(dim=0, keepdim=True)).squeeze(0).long()


def chunk_length(tokens: int, columns: int, device: str) -> int:
    """Tokens whose logits exist at once, on a rank with so many columns of the vocabulary: equal but for the last."""
    most = max(1, LOGITS_BYTES[device] // (4 * max(1, columns)))
    return math.ceil(tokens / math.ceil(tokens / most))
