"""Where a rank's weights, gradients and optimizer state lie: a few flat buffers, the buckets.

A bucket holds the slices of parameters that are reduced and decayed alike, one after another, in the model's order. Its
gradients are summed over dp as one tensor; the optimizer sees it as one tensor; with ZeRO-1 (Rajbhandari et al.
2020, arXiv:1910.02054) each dp rank updates 1/dp of it, and only it holds the float32 master and the moments of that.

    weights   [ q | k | v | o | gate | up | down | ...  padding ]   compute precision, whole
    gradients [ ...                                             ]   float32, whole until they are reduced
    master      [ this dp rank's part ]                             float32; in float32 it is a view of the weights
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from tptrain.config.sizes import BUCKET_ELEMENTS, BUCKET_ROW
from tptrain.layers import Parameter, parameters


@dataclass(frozen=True)
class Piece:
    """A part of a parameter's slice that one dp rank updates: a run of its elements, in row-major order."""

    name: str
    p: Parameter
    start: int  # within the slice
    place: slice  # within the bucket's master and moments


class Bucket:
    """Some parameters' weights and gradients, and this rank's part of their optimizer state."""

    def __init__(
        self, members: list[tuple[str, Parameter]], dtype: torch.dtype, dp: int, part: int, parts: int
    ) -> None:
        """`part` of `parts` is what this rank updates: its dp rank of dp with ZeRO-1, else 0 of 1."""
        self.members, first = members, members[0][1]
        self.replicas, self.partial_grad = first.spec.replicas, first.spec.partial_grad
        self.decay = len(first.spec.shape) > 1  # matrices; vectors are not decayed
        sizes = [math.prod(p.spec.local_shape) for _, p in members]
        length = math.ceil(sum(sizes) / (BUCKET_ROW * dp)) * BUCKET_ROW * dp
        self.weights = torch.zeros(length, dtype=dtype, device=first.device)
        self.grads = torch.zeros(length, dtype=torch.float32, device=first.device)
        self.own = self.part(part, parts)
        mine = self.weights[self.own]
        self.master = nn.Parameter(mine if dtype == torch.float32 else mine.float())
        self.padding = self.grads[sum(sizes) :]
        self.pieces: list[Piece] = []
        offset = 0
        for (name, p), size in zip(members, sizes, strict=True):
            p.data = self.weights[offset : offset + size].view(p.spec.local_shape)
            p.main_grad = self.grads[offset : offset + size].view(p.spec.local_shape)
            low, high = max(offset, self.own.start), min(offset + size, self.own.stop)
            if low < high:
                place = slice(low - self.own.start, high - self.own.start)
                self.pieces.append(Piece(name, p, low - offset, place))
            offset += size

    def part(self, index: int, count: int) -> slice:
        """One of `count` equal parts."""
        length = len(self.grads)
        return slice(index * length // count, (index + 1) * length // count)

    def square_sums(self, part: slice) -> Tensor:
        """Sum of the squares of some gradients, a scalar, each global element counted once when summed over tp.

        By rows: one float32 sum over 16 M elements is 0.5 % short on a cpu.
        """
        rows = self.grads[part].view(-1, BUCKET_ROW)
        return torch.linalg.vector_norm(rows, dim=1).square().sum() / self.replicas


def make_buckets(model: nn.Module, dtype: torch.dtype, dp: int, part: int, parts: int) -> list[Bucket]:
    """Give every parameter of the model its memory."""
    kinds = sorted(parameters(model), key=_kind)
    return [
        Bucket(members, dtype, dp, part, parts) for _, alike in groupby(kinds, key=_kind) for members in _split(alike)
    ]


def _kind(named: tuple[str, Parameter]) -> tuple[int, bool, int]:
    spec = named[1].spec
    return spec.replicas, spec.partial_grad, len(spec.shape)


def _split(members: Iterable[tuple[str, Parameter]]) -> Iterator[list[tuple[str, Parameter]]]:
    """Cut a run of parameters into buckets of about BUCKET_ELEMENTS."""
    bucket: list[tuple[str, Parameter]] = []
    filled = 0
    for name, p in members:
        size = math.prod(p.spec.local_shape)
        if bucket and filled + size > BUCKET_ELEMENTS:
            yield bucket
            bucket, filled = [], 0
        bucket.append((name, p))
        filled += size
    yield bucket
