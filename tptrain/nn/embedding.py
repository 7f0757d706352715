"""The vocabulary's embedding, cut by rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tptrain.nn.parameter import Parameter, parameter, sharding
from tptrain.parallel.collectives import all_tokens, buffer, sum_partial
from tptrain.parallel.mesh import Mesh

OUTSIDE = -1  # a token that is another rank's; torch passes over it


class VocabEmbedding(nn.Module):
    """A table of V rows, cut on the tp axis; also the output head's weight where the two are tied."""

    def __init__(self, mesh: Mesh, vocab: int, d: int, *, std: float) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = parameter(mesh, sharding(mesh, (vocab, d), {0: "tp"}), std)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N,) token ids -> (N, D), the same on every rank, or with sequence parallelism this rank's (N/tp, D)."""
        return lookup(tokens, self.weight, self.mesh)


def lookup(tokens: Tensor, table: Parameter, mesh: Mesh, padding: int | None = None) -> Tensor:
    """(N,) token ids -> (N, D), or with sequence parallelism (N/tp, D), out of a table that is cut by rows on the tp
    axis. `padding`: an id whose row gets no gradient.
    """
    return _Embedding.apply(tokens, table, mesh, padding)  # type: ignore[return-value]


class _Embedding(torch.autograd.Function):
    """A rank looks up the rows it has, zero for the others; one all-reduce (or reduce-scatter) joins them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Parameter, mesh: Mesh, padding: int | None) -> Tensor:  # type: ignore[override]
        local = tokens - weight.sharding.offsets[0]  # (N,), ids within this rank's rows
        ctx.weight, ctx.mesh = weight, mesh
        trained = local if padding is None else local.masked_fill(tokens == padding, OUTSIDE)
        if mesh.size("tp") == 1:
            ctx.save_for_backward(trained)
            return F.embedding(local, weight)  # (N, D)
        outside = (local < 0) | (local >= len(weight))
        ctx.save_for_backward(trained.masked_fill(outside, OUTSIDE))
        x = buffer((len(local), weight.shape[1]), weight, mesh.group("tp"))
        torch.index_select(weight, 0, local.masked_fill_(outside, 0), out=x)  # (N, D)
        x.masked_fill_(outside.unsqueeze(-1), 0.0)
        total, work = sum_partial(x, mesh.group("tp"), mesh.sequence_parallel)  # (n, D)
        work.wait()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        (local,), weight = ctx.saved_tensors, ctx.weight
        grad, gathering = all_tokens(grad, ctx.mesh.group("tp"), ctx.mesh.sequence_parallel)  # (N, D)
        gathering.wait()
        grad = grad.float()  # rows that come often are sums of many
        weight.add_grad(torch.ops.aten.embedding_dense_backward(grad, local, len(weight), OUTSIDE, False))
        return None, None, None, None
