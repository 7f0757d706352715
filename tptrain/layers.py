"""Sharded parameters and the layers made of them.

Each parameter carries one `ShardSpec`: initialisation, gradient reduction, the gradient norm, checkpoint views and
parameter counts all read it, and nothing else says how a parameter is sharded.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tptrain import fused
from tptrain.collectives import sum_partial, summand, whole
from tptrain.mesh import Mesh


@dataclass(frozen=True)
class ShardSpec:
    """How one global tensor lies over the tp axis: cut along `dim` into tp / replicas equal slices.

    Adjacent tp ranks in runs of `replicas` hold the same slice: 1 for a plain shard, tp for a tensor that every rank
    holds whole, tp / kv_heads for the KV projections when there are fewer KV heads than ranks.
    """

    shape: tuple[int, ...]  # global
    tp: int
    dim: int = 0
    replicas: int = 1
    partial_grad: bool = False  # each replica's gradient is one summand: the gradient is their sum over the replicas

    @property
    def slices(self) -> int:
        return self.tp // self.replicas

    @property
    def local_shape(self) -> tuple[int, ...]:
        assert self.shape[self.dim] % self.slices == 0, self
        return tuple(n // self.slices if i == self.dim else n for i, n in enumerate(self.shape))

    def start(self, tp_rank: int) -> int:
        """Index along `dim` at which a rank's slice begins."""
        return tp_rank // self.replicas * self.local_shape[self.dim]


class Parameter(nn.Parameter):
    """A rank's slice of a global parameter, in the compute precision. It gets its memory from `optim.Optimizer`, which
    also holds the float32 master and the gradient that backward passes add to.
    """

    spec: ShardSpec
    init_std: float
    init_constant: float | None
    main_grad: Tensor  # float32, of the slice's shape
    fresh: bool  # main_grad holds an earlier step's gradient: the next one replaces it
    uses: int  # in a forward pass, so gradients in a backward pass
    arrived: Callable[[], None]  # called after each of them

    def add_grad(self, grad: Tensor) -> None:
        """Add to the gradient, in float32."""
        self.main_grad.copy_(grad) if self.fresh else self.main_grad.add_(grad)
        self.fresh = False
        self.arrived()


def parameter(mesh: Mesh, spec: ShardSpec, std: float = 0.0, constant: float | None = None) -> Parameter:
    """A slice without memory, with the standard deviation (or constant) it starts from."""
    made = Parameter(torch.empty(0, device=mesh.device))
    made.spec, made.init_std, made.init_constant, made.uses, made.fresh = spec, std, constant, 1, True
    return made


def parameters(module: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Names and slices, a tied parameter once."""
    for name, found in module.named_parameters():
        assert isinstance(found, Parameter), name
        yield name, found


class _Use(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Parameter) -> Tensor:  # type: ignore[override]
        ctx.p = p
        return p.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
        ctx.p.add_grad(grad)


def use(p: Parameter) -> Tensor:
    """The slice in a computation: what flows back to it is added to its float32 gradient, whatever its precision."""
    return _Use.apply(p)  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------ initialisation

_TILE = 512  # a tile of 512 x 512 floats, 1 MiB, is the unit of drawing and the largest buffer


def _tile_seed(seed: int, name: str, row: int, column: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{row}/{column}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@torch.no_grad()
def initial_values(name: str, p: Parameter, seed: int, tp_rank: int) -> Tensor:
    """The slice that a rank starts with, float32 on the cpu: the same numbers at every TP degree.

    Values are drawn in tiles, each from its own generator seeded by (seed, name, tile). A rank draws only the tiles
    that its slice touches.
    """
    spec = p.spec
    if p.init_constant is not None:
        return torch.full(spec.local_shape, p.init_constant)
    assert len(spec.shape) == 2, name
    values, generator = torch.empty(spec.local_shape), torch.Generator()
    first = [spec.start(tp_rank) if dim == spec.dim else 0 for dim in (0, 1)]
    last = [first[dim] + spec.local_shape[dim] for dim in (0, 1)]
    for row in range(first[0] // _TILE, math.ceil(last[0] / _TILE)):
        for column in range(first[1] // _TILE, math.ceil(last[1] / _TILE)):
            origin = (row * _TILE, column * _TILE)
            extent = [min(_TILE, spec.shape[dim] - origin[dim]) for dim in (0, 1)]
            tile = torch.randn(extent, generator=generator.manual_seed(_tile_seed(seed, name, row, column)))
            low = [max(first[dim], origin[dim]) for dim in (0, 1)]
            high = [min(last[dim], origin[dim] + extent[dim]) for dim in (0, 1)]
            part = tile[low[0] - origin[0] : high[0] - origin[0], low[1] - origin[1] : high[1] - origin[1]]
            target = values[low[0] - first[0] : high[0] - first[0], low[1] - first[1] : high[1] - first[1]]
            torch.mul(part, p.init_std, out=target)
    return values


# -------------------------------------------------------------------------------------------------------------- layers


class VocabEmbedding(nn.Module):
    """A table of V rows, sharded by rows; also the output head's weight where the two are tied."""

    def __init__(self, mesh: Mesh, vocab: int, d: int, *, std: float) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = parameter(mesh, ShardSpec((vocab, d), mesh.tp, 0), std)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N,) token ids -> (N, D), the same on every rank, or with sequence parallelism this rank's (N/tp, D)."""
        return _Embedding.apply(tokens, self.weight, self.mesh)  # type: ignore[return-value]


OUTSIDE = -1  # a token that is another rank's; torch passes over it


class _Embedding(torch.autograd.Function):
    """A rank looks up the rows it has, zero for the others; one all-reduce (or reduce-scatter) joins them."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Parameter, mesh: Mesh) -> Tensor:  # type: ignore[override]
        local = tokens - weight.spec.start(mesh.tp_rank)  # (N,), ids within this rank's rows
        ctx.weight, ctx.mesh = weight, mesh
        if mesh.tp == 1:
            ctx.save_for_backward(local)
            return F.embedding(local, weight)  # (N, D)
        outside = (local < 0) | (local >= len(weight))
        ctx.save_for_backward(local.masked_fill(outside, OUTSIDE))
        x = summand((len(local), weight.shape[1]), weight, mesh.tp_group)
        torch.index_select(weight, 0, local.masked_fill_(outside, 0), out=x)  # (N, D)
        x.masked_fill_(outside.unsqueeze(-1), 0.0)
        return sum_partial(x, mesh.tp_group, mesh.sequence_parallel).value()  # (n, D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        (local,), weight = ctx.saved_tensors, ctx.weight
        grad, _ = whole(grad, ctx.mesh.tp_group, ctx.mesh.sequence_parallel)  # (N, D)
        grad = grad.float()  # rows that come often are sums of many
        weight.add_grad(torch.ops.aten.embedding_dense_backward(grad, local, len(weight), OUTSIDE, False))
        return None, None, None


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim, with a weight that every rank of the tp axis holds.

    `partial_grad` where a rank applies it to its own heads or tokens only: the gradient is then a sum over tp.
    """

    def __init__(self, mesh: Mesh, d: int, *, kind: str, eps: float, partial_grad: bool = False) -> None:
        super().__init__()
        spec = ShardSpec((d,), mesh.tp, 0, mesh.tp, partial_grad or mesh.sequence_parallel)
        self.eps = eps
        self.weight = parameter(mesh, spec, constant=1.0)
        self.bias = parameter(mesh, spec, constant=0.0) if kind == "layernorm" else None

    def add(self, x: Tensor, y: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + (y + other), which is the residual stream, and its norm. `other` gets no gradient."""
        if self.bias is None:
            return _AddRMSNorm.apply(x, y, other, self.weight, self.eps)  # type: ignore[return-value]
        x = x + (y if other is None else y + other)
        return x, self(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[return-value]
        return F.layer_norm(x, self.weight.shape, use(self.weight), use(self.bias), self.eps)

    def recipe(self, x: Tensor) -> Callable[[], Tensor]:
        """What makes the norm of x once more, for a backward pass that has not kept it."""
        x = x.detach()
        return torch.no_grad()(lambda: self(x))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Parameter, eps: float) -> Tensor:  # type: ignore[override]
        y, squares = fused.rms_norm(x, weight.detach(), eps)
        ctx.save_for_backward(x, squares)
        ctx.weight, ctx.eps = weight, eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x, squares), weight = ctx.saved_tensors, ctx.weight
        grad_x, grad_weight = fused.rms_norm_backward(grad, x, weight.detach(), squares, ctx.eps)
        weight.add_grad(grad_weight)
        return grad_x, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, other: Tensor | None, weight: Parameter, eps: float
    ) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total, normed, squares = fused.add_rms_norm(x, y, other, weight.detach(), eps)
        ctx.save_for_backward(total, squares)
        ctx.weight, ctx.eps = weight, eps
        return total, normed

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        (total, squares), weight = ctx.saved_tensors, ctx.weight
        grad_x, grad_weight = fused.add_rms_norm_backward(grad_total, grad, total, weight.detach(), squares, ctx.eps)
        weight.add_grad(grad_weight)
        return grad_x, grad_x, None, None, None
