"""The process groups of torch.distributed that the axes of a grid run over."""

from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist


def own_group(
    partition: list[list[int]], device: torch.device, timeout: timedelta | None, urgent: bool = False
) -> dist.ProcessGroup | None:
    """This rank's group out of a partition of all ranks; None where it is alone in it. Every rank calls it.

    A group of all ranks is the default group, with the options that it was made with. Others are split off the default
    group's communicator, all in one call, where that can be: see `can_split`. `timeout`: `new_group` does not take over
    the default group's. `urgent`: its kernels go before others (NCCL only).
    """
    partition = [ranks for ranks in partition if len(ranks) > 1]
    if partition == [list(range(dist.get_world_size()))]:
        return dist.group.WORLD
    if not partition:
        return None
    options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if urgent:
        options["pg_options"] = urgent_options(timeout)
    if can_split(device):
        return dist.split_group(split_ranks=partition, **options)
    own = None
    for ranks in partition:  # every rank creates every group, in the same order
        group = dist.new_group(ranks, **options)
        own = cast(dist.ProcessGroup, group) if dist.get_rank() in ranks else own
    return own


def urgent_options(timeout: timedelta | None) -> Any:
    """NCCL's options for a group whose kernels go before others."""
    options = dist.ProcessGroupNCCL.Options()  # pyright: ignore[reportPrivateImportUsage]
    options.is_high_priority_stream = True
    if timeout is not None:
        options._timeout = timeout  # torch warns of another one than the group's
    return options


def can_split(device: torch.device) -> bool:
    """Whether the default group's communicator can be split: NCCL's with a bound device (torch splits no other)."""
    default = dist.group.WORLD
    if device.type != "cuda" or default is None or default.bound_device_id is None:
        return False
    return default._get_backend(device).supports_splitting
