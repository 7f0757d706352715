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
    Unless it is urgent, a group of all ranks is the default group. Others are split off the default group's
    communicator, all in one call, where that can be: see `can_split`.
    """
    partition = [ranks for ranks in partition if len(ranks) > 1]
    if partition == [list(range(dist.get_world_size()))] and not urgent:
        return dist.group.WORLD
    if not partition:
        return None
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if urgent:
        nccl = dist.ProcessGroupNCCL.Options()  # pyright: ignore[reportPrivateImportUsage]
        nccl.is_high_priority_stream = True
        options["pg_options"] = nccl
    if can_split(device):
        return dist.split_group(split_ranks=partition, **options)
    own = None
    for ranks in partition:  # every rank creates every group, in the same order
        group = dist.new_group(ranks, **options)
        own = cast(dist.ProcessGroup, group) if dist.get_rank() in ranks else own
    return own


def can_split(device: torch.device) -> bool:
    """Whether the default group's communicator can be split: NCCL's with a bound device (torch splits no other)."""
    default = dist.group.WORLD
    if device.type != "cuda" or default is None or default.bound_device_id is None:
        return False
    return default._get_backend(device).supports_splitting
