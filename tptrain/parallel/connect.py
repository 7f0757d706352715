"""From a grid and the process group of all ranks to a mesh: the groups of every axis, and what carries each."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from tptrain.parallel import shared_memory
from tptrain.parallel.communicators import ProcessGroup
from tptrain.parallel.control import Control
from tptrain.parallel.device_clock import device_clock
from tptrain.parallel.group import Group
from tptrain.parallel.mesh import Grid, Mesh
from tptrain.parallel.process_groups import own_group
from tptrain.watch.black_box import BlackBox


def connect(
    grid: Grid,
    device: torch.device,
    *,
    box: BlackBox | None = None,
    store: object = None,
    nodes: Sequence[str] | None = None,
    shared: bool = False,
    sequence_parallel: bool = False,
    tp_first: bool = False,
    timeout: timedelta | None = None,
) -> Mesh:
    """This rank's mesh over the process group that is there (or over none: a single rank).

    `shared`: ranks on one node (all of them, where no nodes are given) communicate through its memory where they can;
    `tp_first`: the kernels of the tp group go before others (NCCL only); `timeout`: of every group's collectives.
    """
    box = box or BlackBox()
    if not dist.is_initialized():
        assert grid.world == 1, grid
        return Mesh(grid, 0, device, control=Control(None, 0), saving=Control(None, 0), box=box)
    rank = dist.get_rank()
    assert grid.world == dist.get_world_size(), grid
    everyone, clock = list(range(grid.world)), device_clock(device, box)

    def group(axis: str, partition: list[list[int]]) -> Group | None:
        """This rank's group, whose ranks meet in shared memory where they can."""
        process_group = own_group(partition, device, timeout, urgent=tp_first and axis == "tp")
        if process_group is None:
            return None
        (ranks,) = (ranks for ranks in partition if rank in ranks)
        own = Group(axis, tuple(ranks), ProcessGroup(process_group), box, clock)
        if not shared or len({nodes[member] for member in ranks} if nodes else ()) > 1:
            return own
        memory = shared_memory.connect(own.ranks.index(rank), Control(own, rank).gather, own.communicator)
        return own if memory is None else replace(own, communicator=memory)

    groups: dict[str, Group] = {}
    by_ranks: dict[str, Group | None] = {}  # axes that have the same ranks share a group
    for axis in grid.communicating:
        partition = grid.partition(axis)
        if str(partition) not in by_ranks:
            by_ranks[str(partition)] = group(axis, partition)
        if (own := by_ranks[str(partition)]) is not None:
            groups[axis] = own
    # The thread that writes checkpoints talks over a group and a black box of its own.
    control, saving = (
        Control(
            Group(
                axis,
                tuple(everyone),
                ProcessGroup(cast(dist.ProcessGroup, dist.new_group(everyone, timeout=timeout, backend="gloo"))),
                note,
            ),
            rank,
            store,
        )
        for axis, note in (("control", box), ("saving", BlackBox()))
    )
    return Mesh(grid, rank, device, groups, control, saving, sequence_parallel and grid.size("tp") > 1, box)
