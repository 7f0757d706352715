"""Sharded parameters and the layers made of them.

Each parameter carries one `ShardSpec`: initialisation, gradient reduction, the gradient norm, checkpoint views and
parameter counts all read it, and nothing else says how a parameter is sharded.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tptrain.collectives import all_reduce_forward, column_parallel_linears
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
    """A rank's slice of a global parameter, with its spec and the standard deviation (or constant) it starts from."""

    spec: ShardSpec
    init_std: float
    init_constant: float | None


def parameter(mesh: Mesh, spec: ShardSpec, std: float = 0.0, constant: float | None = None) -> Parameter:
    """An uninitialised slice; `init_weights` fills it by name."""
    made = Parameter(torch.empty(spec.local_shape, device=mesh.device))
    made.spec, made.init_std, made.init_constant = spec, std, constant
    return made


def parameters(module: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Names and slices, a tied parameter once."""
    for name, found in module.named_parameters():
        assert isinstance(found, Parameter), name
        yield name, found


# ------------------------------------------------------------------------------------------------------ initialisation

_TILE = 512  # a tile of 512 x 512 floats, 1 MiB, is the unit of drawing and the largest buffer


def _tile_seed(seed: int, name: str, row: int, column: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{row}/{column}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@torch.no_grad()
def init_weights(module: nn.Module, seed: int, tp_rank: int) -> None:
    """Fill every parameter, the same numbers at every TP degree, and never more than a slice and a tile in memory.

    A parameter's values are drawn in tiles, each from its own generator seeded by (seed, name, tile). A rank draws only
    the tiles that its slice touches. Drawing is always on the cpu, so the device does not matter either.
    """
    generator = torch.Generator()
    for name, slice_ in parameters(module):
        if slice_.init_constant is not None:
            slice_.fill_(slice_.init_constant)
            continue
        spec = slice_.spec
        assert len(spec.shape) == 2, name
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
                target = slice_[low[0] - first[0] : high[0] - first[0], low[1] - first[1] : high[1] - first[1]]
                target.copy_(part * slice_.init_std)


# -------------------------------------------------------------------------------------------------------------- layers


class ColumnLinear(nn.Module):
    """A linear whose output features are sharded: holds (F/tp, D) of the global (F, D). Run by `column_parallel`."""

    def __init__(self, mesh: Mesh, d_in: int, d_out: int, *, std: float, bias: bool = False, replicas: int = 1) -> None:
        super().__init__()
        partial = replicas > 1
        self.weight = parameter(mesh, ShardSpec((d_out, d_in), mesh.tp, 0, replicas, partial), std)
        self.bias = parameter(mesh, ShardSpec((d_out,), mesh.tp, 0, replicas, partial), constant=0.0) if bias else None


class RowLinear(nn.Module):
    """A linear whose input features are sharded: holds (D, F/tp) of the global (D, F). Run by `row_parallel`."""

    def __init__(self, mesh: Mesh, d_in: int, d_out: int, *, std: float, bias: bool = False) -> None:
        super().__init__()
        self.weight = parameter(mesh, ShardSpec((d_out, d_in), mesh.tp, 1), std)
        self.bias = parameter(mesh, ShardSpec((d_out,), mesh.tp, 0, mesh.tp), constant=0.0) if bias else None


def column_parallel(x: Tensor, mesh: Mesh, *linears: ColumnLinear) -> tuple[Tensor, ...]:
    """(B, T, D), the same on every rank -> (B, T, F/tp) for each linear. One all-reduce, backward, for all of them."""
    weights = [linear.weight.to(x.dtype) for linear in linears]
    biases = [linear.bias.to(x.dtype) for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(weights)), "linears that share an input have a bias all or none"
    return column_parallel_linears(x, weights, biases or None, mesh.tp_group)


def row_parallel(x: Tensor, mesh: Mesh, linear: RowLinear) -> Tensor:
    """(B, T, F/tp), a slice on each rank -> (B, T, D), the same on every rank. One all-reduce, forward."""
    partial = F.linear(x, linear.weight.to(x.dtype))  # (B, T, D), one summand of tp
    y = all_reduce_forward(partial, mesh.tp_group)
    return y if linear.bias is None else y + linear.bias.to(x.dtype)  # after the sum: once, not tp times


class VocabEmbedding(nn.Module):
    """A table of V rows, sharded by rows; also the output head's weight where the two are tied."""

    def __init__(self, mesh: Mesh, vocab: int, d: int, *, std: float) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = parameter(mesh, ShardSpec((vocab, d), mesh.tp, 0), std)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T) token ids -> (B, T, D), the same on every rank: one all-reduce of rows that one rank has."""
        if self.mesh.tp == 1:
            return F.embedding(tokens, self.weight).to(dtype)
        local = tokens - self.weight.spec.start(self.mesh.tp_rank)  # (B, T), ids within this rank's rows
        outside = (local < 0) | (local >= self.weight.shape[0])
        x = F.embedding(local.masked_fill(outside, 0), self.weight)  # (B, T, D)
        x = x.masked_fill(outside.unsqueeze(-1), 0.0).to(dtype)
        return all_reduce_forward(x, self.mesh.tp_group)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim, the same on every rank of the tp axis.

    `partial_grad` for a norm that each rank applies to its own heads only: the gradient is then a sum over tp.
    """

    def __init__(self, mesh: Mesh, d: int, *, kind: str, eps: float, partial_grad: bool = False) -> None:
        super().__init__()
        spec = ShardSpec((d,), mesh.tp, 0, mesh.tp, partial_grad)
        self.eps = eps
        self.weight = parameter(mesh, spec, constant=1.0)
        self.bias = parameter(mesh, spec, constant=0.0) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)  # (D,)
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias.to(x.dtype), self.eps)
