"""The process groups of torch.distributed that the axes of a grid run over."""

from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist


def own_group(
    partition: list[list[int]], device: torch.device, timeout: timedelta | None, urgent: bool = False
) -> dist.ProcessGroup | None:
    """This rank's group out of a partition of all ranks; None where it is alone in it. Every rank calls it.

    `timeout`: `new_group` does not take over the default group's. `urgent`: its kernels go before others (NCCL only).
    All ranks in one group are the default group. Other groups are split off its communicator, all in one call, where it
    is NCCL's with a bound device: torch's split_group knows no other backend.
    """
    partition = [ranks for ranks in partition if len(ranks) > 1]
    if partition == [list(range(dist.get_world_size()))] and not urgent:
        return dist.group.WORLD
    if not partition:
        return None
    further: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if urgent:
        options = dist.ProcessGroupNCCL.Options()  # pyright: ignore[reportPrivateImportUsage]
        options.is_high_priority_stream = True
        further["pg_options"] = options
    if can_split(device):
        return dist.split_group(split_ranks=partition, **further)
    own = None
    for ranks in partition:  # every rank makes every group, in the same order
        made = dist.new_group(ranks, **further)
        own = cast(dist.ProcessGroup, made) if dist.get_rank() in ranks else own
    return own


def can_split(device: torch.device) -> bool:
    """Whether the default group's communicator can be split: NCCL's, with a bound device."""
    default = dist.group.WORLD
    if device.type != "cuda" or default is None or default.bound_device_id is None:
        return False
    return default._get_backend(device).supports_splitting
