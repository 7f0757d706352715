"""Sharded parameters. Each says how it lies over the mesh, and nothing else says it.

Initialisation, gradient reduction, the gradient norm, checkpoints, import and export read `Sharding`.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tptrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class Sharding:
    """How one global tensor lies over the mesh, and where this rank's slice of it is.

    The dp axis holds copies of everything and is not mentioned.
    """

    shape: tuple[int, ...]  # global
    cuts: tuple[tuple[int, str], ...]  # (dim, axis): the dim is cut into equal slices, one for each place on the axis
    summed: tuple[str, ...]  # axes over whose ranks the gradient is a sum
    local_shape: tuple[int, ...]
    offsets: tuple[int, ...]  # of the slice in the global tensor, by dim
    copies: int  # ranks that hold this same slice, dp not counted

    @property
    def size(self) -> int:
        """Elements of the slice."""
        return math.prod(self.local_shape)


def sharding(
    mesh: Mesh, shape: tuple[int, ...], cuts: Mapping[int, str] | None = None, summed: tuple[str, ...] = ()
) -> Sharding:
    """A tensor whose dims are `cuts` on these axes, and whole on every rank of the others."""
    cuts = cuts or {}
    local, offsets = list(shape), [0] * len(shape)
    for dim, axis in cuts.items():
        slices = mesh.size(axis)
        assert shape[dim] % slices == 0, (shape, dim, axis, slices)
        local[dim] = shape[dim] // slices
        offsets[dim] = mesh.index(axis) * local[dim]
    slices = math.prod(mesh.size(axis) for axis in cuts.values())
    copies = mesh.world // mesh.size("dp") // slices
    summed = tuple(axis for axis in summed if mesh.size(axis) > 1)
    return Sharding(tuple(shape), tuple(cuts.items()), summed, tuple(local), tuple(offsets), copies)


class Parameter(nn.Parameter):
    """A rank's slice of a global parameter, in the compute precision. It gets its memory from a `Store`.

    Where it is trained (`requires_grad`), the backward pass adds to `main_grad`.
    """

    sharding: Sharding
    init_std: float
    init_constant: float | None
    main_grad: Tensor | None  # float32, of the slice's shape
    overwrite: bool  # main_grad holds an earlier step's gradient: the next one replaces it
    keeps_float32: bool  # whatever the precision of the others
    shape_in_module: tuple[int, ...]  # of the slice; packed matrices are one there, and of one more dim in `sharding`

    def add_grad(self, grad: Tensor) -> None:
        """Add to the gradient, in float32."""
        assert self.main_grad is not None
        grad = grad.view(self.main_grad.shape)
        self.main_grad.copy_(grad) if self.overwrite else self.main_grad.add_(grad)
        self.overwrite = False


def parameter(mesh: Mesh, sharding: Sharding, std: float = 0.0, constant: float | None = None) -> Parameter:
    """A slice without memory, with the standard deviation (or constant) it starts from."""
    p = Parameter(torch.empty(0, device=mesh.device))
    p.sharding, p.init_std, p.init_constant, p.main_grad, p.overwrite = sharding, std, constant, None, True
    p.keeps_float32, p.shape_in_module = False, sharding.local_shape
    return p


def parameters(module: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Names and slices, a tied parameter once."""
    for name, p in module.named_parameters():
        assert isinstance(p, Parameter), name
        yield name, p


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


def _tile_seed(seed: int, name: str, tile: tuple[int, ...]) -> int:
    text = "/".join([f"{seed}/{name}", *map(str, tile)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@torch.no_grad()
def initial_values(name: str, p: Parameter, seed: int, threads: int = 1) -> Tensor:
    """The slice that a rank starts with, float32 on the cpu: the same numbers on every mesh.

    Values are drawn in tiles over the last two dims, each from its own generator seeded by (seed, name, tile). A rank
    draws only the tiles that its slice touches, so many at a time.
    """
    layout = p.sharding
    if p.init_constant is not None:
        return torch.full(layout.local_shape, p.init_constant)
    values = torch.empty(layout.local_shape)
    sides = [_TILE if dim >= len(layout.shape) - 2 else 1 for dim in range(len(layout.shape))]
    slices = [(first, first + length) for first, length in zip(layout.offsets, layout.local_shape, strict=True)]
    touched = [range(low // side, -(-high // side)) for (low, high), side in zip(slices, sides, strict=True)]

    def draw(tile: tuple[int, ...]) -> None:
        generator = torch.Generator().manual_seed(_tile_seed(seed, name, tile))
        origin = [place * side for place, side in zip(tile, sides, strict=True)]
        extent = [min(side, n - start) for side, n, start in zip(sides, layout.shape, origin, strict=True)]
        numbers = torch.randn(extent, generator=generator)
        # The part of the tile that is the slice's, counted from the tile's origin and from the slice's.
        bounds = [
            (max(low, start), min(high, start + length))
            for (low, high), start, length in zip(slices, origin, extent, strict=True)
        ]
        in_tile = tuple(slice(a - start, b - start) for (a, b), start in zip(bounds, origin, strict=True))
        in_slice = tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(bounds, slices, strict=True))
        torch.mul(numbers[in_tile], p.init_std, out=values[in_slice])

    with ThreadPoolExecutor(threads) as pool:  # torch's functions leave Python's lock to others
        for _ in pool.map(draw, itertools.product(*touched)):
            pass
    return values
