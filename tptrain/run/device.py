"""A rank's device; on a CPU also its threads, its cores and a malloc that keeps what it has."""

import ctypes
import os

import torch

from tptrain.config import Config, UserError


def pick_device(config: Config, local_rank: int, local_world: int) -> torch.device:
    """This rank's device, made ready. Raises UserError for a device that cannot be had."""
    kind = config.train.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        _keep_freed_memory()
        _take_cores(local_rank, local_world)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device=cuda: this machine shows no CUDA device to torch. Use train.device=cpu.")
    visible = torch.cuda.device_count()
    bound = visible == 1 and "SLURM_PROCID" in os.environ  # Slurm can show each task a GPU of its own
    shared = config.parallel.backend == "gloo"  # NCCL refuses two ranks on one GPU, gloo does not
    if local_rank >= visible and not bound and not shared:
        raise UserError(
            f"cluster.tasks_per_node: {local_world} ranks on this node, which shows "
            f"{visible} GPUs to torch. Use one rank for each GPU."
        )
    device = torch.device("cuda", local_rank % visible)
    torch.cuda.set_device(device)
    return device


def _take_cores(local_rank: int, local_world: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // local_world
    if "OMP_NUM_THREADS" not in os.environ:  # else every rank would start a thread for every core
        torch.set_num_threads(max(1, int(os.environ.get("SLURM_CPUS_PER_TASK", each))))
    if each and "SLURM_PROCID" not in os.environ:  # Slurm binds its tasks itself
        # Otherwise two ranks share a core now and then, and each step waits for both.
        os.sched_setaffinity(0, cores[local_rank * each : (local_rank + 1) * each])


def _keep_freed_memory() -> None:
    """Have glibc reuse large blocks: it gives them back to the kernel, and fresh pages cost more than filling them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
