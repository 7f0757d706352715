"""The mesh: ranks on named axes. Built once for a run and passed as an argument.

Ranks are numbered row by row over the axes of a grid, the last axis innermost, so that the ranks of one TP group are
neighbours on one node:

    dp=2, tp=2      tp group  tp group
                    [ 0, 1 ]  [ 2, 3 ]       dp groups: [0, 2] and [1, 3]

Where a model has fewer KV heads than ranks, neighbours share one: the tp axis is then itself a grid, `kv_shard` (which
KV heads) times `kv` (which copy of them).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from tptrain.parallel.control import Control
from tptrain.parallel.group import Group
from tptrain.watch.black_box import BlackBox


@dataclass(frozen=True)
class Grid:
    """The axes of a run and their sizes, outermost first; `merged` names several of them together, `world` all of them.

    Along a `silent` axis parameters are cut, but no collective runs.
    """

    sizes: Mapping[str, int]
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    silent: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def communicating(self) -> list[str]:
        """The axes that need a group. An axis that has the ranks of an earlier one shares its group."""
        return [axis for axis in (*self.merged, *self.sizes, "world") if axis not in self.silent]

    def size(self, axis: str) -> int:
        """Ranks along an axis. Raises KeyError where the grid has no such axis."""
        return math.prod(self.sizes[part] for part in self._parts(axis))

    def index(self, axis: str, rank: int) -> int:
        """Where a rank stands along an axis."""
        group = next(ranks for ranks in self.partition(axis) if rank in ranks)
        return group.index(rank)

    def partition(self, axis: str) -> list[list[int]]:
        """All ranks, in the groups that differ along this axis only."""
        parts, names = self._parts(axis), list(self.sizes)
        ranks = np.arange(self.world).reshape(tuple(self.sizes.values()))
        inner = [names.index(part) for part in parts]
        outer = [dim for dim in range(len(names)) if dim not in inner]
        return ranks.transpose(*outer, *inner).reshape(-1, self.size(axis)).tolist()

    def _parts(self, axis: str) -> tuple[str, ...]:
        return tuple(self.sizes) if axis == "world" else self.merged.get(axis, (axis,))


def tp_grid(world: int, tp: int, kv_heads: int) -> Grid:
    """The grid of a run: `tp` ranks for a copy of the model, which has `kv_heads` KV heads, and the rest for dp."""
    assert world % tp == 0, (world, tp)
    copies = max(1, tp // kv_heads)  # of each KV head
    sizes = {"dp": world // tp, "kv_shard": tp // copies, "kv": copies}
    return Grid(sizes, {"tp": ("kv_shard", "kv")}, silent=("kv_shard",))


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the grid."""

    grid: Grid
    rank: int
    device: torch.device
    groups: Mapping[str, Group] = field(default_factory=dict)  # by axis; none where an axis has one rank
    control: Control = field(default_factory=lambda: Control(None, 0))  # all ranks, for agreements
    saving: Control = field(default_factory=lambda: Control(None, 0))  # the same for the thread that saves
    sequence_parallel: bool = False  # between the linears the tokens are cut on the tp axis
    box: BlackBox = field(default_factory=BlackBox)  # what this rank is doing, for its supervisor

    def size(self, axis: str) -> int:
        return self.grid.size(axis)

    def index(self, axis: str) -> int:
        """This rank's place along an axis."""
        return self.grid.index(axis, self.rank)

    def group(self, axis: str) -> Group | None:
        """The ranks to communicate with along an axis; None where there are no others."""
        self.grid.size(axis)  # raises KeyError for an axis that does not exist
        return self.groups.get(axis)

    @property
    def world(self) -> int:
        return self.grid.world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def disable_bar(self) -> bool | None:
        """What tqdm takes for `disable`: rank 0 shows a progress bar, on a terminal."""
        return None if self.is_main else True
