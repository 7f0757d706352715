"""Where a model's weights lie: one block of memory for each unit of the model (a layer, the embedding, the head).

    block   [ q | k | v | o | gate | up | down | biases, norms  padding ][ frozen ]

Linears that run as one matrix product lie one after another. Matrices come before vectors, and what is trained before
what is frozen: gradients and optimizer state, which belong to training, are kept for the first part only. Within that
part lie the ranges that are reduced or decayed alike.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from tptrain.nn.parameter import Parameter, parameters

ALIGNMENT = 64  # elements: each dp rank's part of a block begins where cache lines and vectors do


@dataclass(frozen=True)
class Member:
    """A parameter and its place in its block."""

    name: str
    p: Parameter
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.p.sharding.size


@dataclass(frozen=True)
class Range:
    """A run of elements that are reduced, counted and decayed alike."""

    start: int
    stop: int
    summed: tuple[str, ...]  # axes over whose ranks the gradients are sums
    copies: int  # ranks that hold the same elements, dp not counted
    decay: bool  # matrices; vectors are not decayed


class Block:
    """The weights of one unit."""

    def __init__(self, unit: str, members: list[tuple[str, Parameter]], dtype: torch.dtype, parts: int) -> None:
        """`members`: in the order in which they are to lie, trained ones first; `parts`: into how many equal ones the
        trained part must be cut, for dp.
        """
        self.unit = unit
        self.members: list[Member] = []
        self.trained = 0  # elements of the trained part, without its padding
        end = 0
        step = ALIGNMENT * parts
        for trained, run in groupby(members, key=lambda named: named[1].requires_grad):
            for name, p in run:
                self.members.append(Member(name, p, end))
                end += p.sharding.size
            if trained:
                self.trained = end
                end = -(-end // step) * step
        self.length = -(-self.trained // step) * step  # of the trained part, with its padding
        self.weights = torch.empty(end, dtype=dtype, device=members[0][1].device)  # zeros would cost a walk more
        self.weights[self.trained : self.length].zero_()
        self.weights[self.members[-1].stop :].zero_()
        for member in self.members:
            member.p.data = self.weights[member.start : member.stop].view(member.p.shape_in_module)

    def ranges(self) -> list[Range]:
        """The trained part, without its padding."""

        def alike(member: Member) -> tuple[tuple[str, ...], int, bool]:
            layout = member.p.sharding
            return layout.summed, layout.copies, len(layout.shape) > 1

        trained = [member for member in self.members if member.p.requires_grad]
        runs = [(key, list(run)) for key, run in groupby(trained, key=alike)]
        return [Range(run[0].start, run[-1].stop, *key) for key, run in runs]


class Store:
    """The memory of a model's weights on this rank. Making one gives the parameters their memory, without values.

    Freeze parameters (`requires_grad_(False)`) before that. Raises ValueError where linears that are one matrix product
    are frozen in part.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, dp: int = 1) -> None:
        self.model = model
        unit_of: Callable[[str], str] = getattr(model, "unit_of", lambda name: "")
        units: dict[tuple[str, torch.dtype], list[tuple[str, Parameter]]] = {}
        for name, p in parameters(model):
            unit = (f"{unit_of(name)}, float32", torch.float32) if p.keeps_float32 else (unit_of(name), dtype)
            units.setdefault(unit, []).append((name, p))
        joined = [run for module in model.modules() for run in getattr(module, "joined", ())]
        self.blocks = [Block(unit, list(_order(members, joined)), kind, dp) for (unit, kind), members in units.items()]

    def initialise(self, values: Callable[[str, Parameter], Tensor]) -> None:
        """Set every weight: `values` gives a parameter's slice, float32 on the cpu."""
        for block in self.blocks:
            for member in block.members:
                self.fill(member.name, member.p, 0, values(member.name, member.p))

    @torch.no_grad()
    def fill(self, name: str, p: Parameter, start: int, values: Tensor) -> None:
        """Set a run of a parameter's elements, from the `start`-th of this rank's slice on, in row-major order; the
        values may be of another type.
        """
        p.view(-1)[start : start + values.numel()].copy_(values.flatten())


def _order(
    members: Iterable[tuple[str, Parameter]], joined: list[tuple[Parameter, ...]]
) -> Iterable[tuple[str, Parameter]]:
    """Trained before frozen, matrices before vectors, joined parameters together, else the model's order."""
    members = list(members)
    run_of = {id(p): run for run in joined for p in run}
    name_of = {id(p): name for name, p in members}
    for trained in (True, False):
        for vectors in (False, True):
            placed: set[int] = set()
            for _, p in members:
                for each in run_of.get(id(p), (p,)):
                    kind = each.requires_grad, len(each.sharding.shape) == 1
                    if kind[0] != p.requires_grad:
                        pair = f"{name_of[id(p)]} and {name_of[id(each)]}"
                        raise ValueError(f"{pair} are one matrix product: freeze both or none")
                    if kind == (trained, vectors) and id(each) not in placed:
                        placed.add(id(each))
                        yield name_of[id(each)], each


def adjacent(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors (F_i, ...) that lie one after another in memory as one (sum of F_i, ...), without a copy."""
    parts = list(tensors)
    first, rows = parts[0], 0
    for part in parts:
        assert part.storage_offset() == first.storage_offset() + rows * first.stride(0), "not adjacent"
        assert part.untyped_storage()._cdata == first.untyped_storage()._cdata, "not adjacent"
        rows += len(part)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
