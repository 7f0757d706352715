"""What training keeps beside the weights: for each block of a `Store` gradients, float32 masters and moments.

    weights   [ trained, whole               padding ][ frozen ]    compute precision
    gradients [ trained, whole until they are reduced ]             float32
    master    [ this dp rank's part          ]                      float32; of float32 weights it is a view
    moments   [ this dp rank's part          ] x 2                  float32

With ZeRO-1 (Rajbhandari et al. 2020, arXiv:1910.02054) each dp rank updates 1/dp of a block, and only it holds the
master and the moments of that part. What is frozen has none of this.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tptrain.nn.parameter import Parameter, parameters
from tptrain.nn.store import Block, Range, Store

ROW = 4096  # elements whose squares are summed at once
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A part of a parameter's slice that one dp rank updates: a run of its elements, in row-major order."""

    name: str
    p: Parameter
    start: int  # within the slice
    place: slice  # within the block's master and moments


class BlockState:
    """Gradients and optimizer state of one block."""

    def __init__(self, block: Block, part: int, parts: int) -> None:
        """`part` of `parts` is what this rank updates: its dp rank of dp with ZeRO-1, else 0 of 1."""
        self.block = block
        self.weights = block.weights[: block.length]
        self.grads = torch.zeros(block.length, dtype=torch.float32, device=block.weights.device)
        self.own = self.part(part, parts)
        own = self.weights[self.own]
        self.master = own if own.dtype == torch.float32 else own.float()
        self.moments = {moment: torch.zeros_like(self.master, dtype=torch.float32) for moment in MOMENTS}
        self.ranges = block.ranges()
        self.padding = self.grads[block.trained :]
        self.pieces: list[Piece] = []
        for member in block.members:
            if not member.p.requires_grad:
                continue
            member.p.main_grad = self.grads[member.start : member.stop].view(member.p.sharding.local_shape)
            low, high = max(member.start, self.own.start), min(member.stop, self.own.stop)
            if low < high:
                place = slice(low - self.own.start, high - self.own.start)
                self.pieces.append(Piece(member.name, member.p, low - member.start, place))

    def forget_absent(self) -> None:
        """What got no gradient in this step, such as an expert that saw no token, still has an earlier step's."""
        for member in self.block.members:
            if member.p.main_grad is not None and member.p.overwrite:
                member.p.main_grad.zero_()

    def part(self, index: int, count: int) -> slice:
        """One of `count` equal parts."""
        length = len(self.grads)
        return slice(index * length // count, (index + 1) * length // count)

    def runs(self, part: slice, kind: Callable[[Range], Any]) -> Iterator[tuple[Any, slice]]:
        """Runs of neighbouring ranges of one kind within a part, with that kind, counted from the block's beginning."""
        for value, group in groupby(self.ranges, kind):
            ranges = list(group)
            low, high = max(ranges[0].start, part.start), min(ranges[-1].stop, part.stop)
            if low < high:
                yield value, slice(low, high)

    def square_sum(self, part: slice) -> Tensor:
        """Sum of the squares of a part's gradients, a scalar: over all ranks, each global element is counted once."""
        total = torch.zeros((), device=self.grads.device)
        for each, run in self.runs(part, lambda each: each):
            total += _square_sum(self.grads[run]) / each.copies
        return total


def _square_sum(x: Tensor) -> Tensor:
    """By rows: one float32 sum over 16 M elements is 0.5 % short on a cpu."""
    rows = len(x) // ROW * ROW
    total = torch.linalg.vector_norm(x[:rows].view(-1, ROW), dim=1).square().sum()
    return total + torch.linalg.vector_norm(x[rows:]).square()


class TrainingState:
    """Gradients and optimizer state of a store's trained parameters, on this rank."""

    def __init__(self, store: Store, part: int = 0, parts: int = 1) -> None:
        self.store = store
        self.blocks = [BlockState(block, part, parts) for block in store.blocks if block.trained]

        self.piece_of = {piece.name: (piece, state) for state in self.blocks for piece in state.pieces}

    def initialise(self, values: Callable[[str, Parameter], Tensor]) -> None:
        """Set every weight and master: `values` gives a parameter's slice, float32 on the cpu."""
        for name, p in parameters(self.store.model):
            self.fill(name, p, 0, values(name, p))

    @torch.no_grad()
    def fill(self, name: str, p: Parameter, start: int, values: Tensor) -> None:
        """Set a run of a parameter's elements and, as far as this rank has it, the master's; see `Store.fill`."""
        self.store.fill(name, p, start, values)
        if name not in self.piece_of:
            return
        piece, state = self.piece_of[name]
        master = state.master[piece.place]
        low, high = max(start, piece.start), min(start + values.numel(), piece.start + len(master))
        if low < high:
            master[low - piece.start : high - piece.start] = values.flatten()[low - start : high - start].to(p.device)

    def zero_grad(self) -> None:
        """Forget the gradients: the next ones replace them."""
        for state in self.blocks:
            state.padding.zero_()  # a step whose norm was no number has spoilt it
            for member in state.block.members:
                member.p.overwrite = True
