"""A rank's device; on a CPU also its threads, its cores and a malloc that keeps what it has."""

import ctypes
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import torch

from tptrain.config import Config, UserError
from tptrain.config.schema import CPUS_OF_GPU

# Slurm's variables that tell of GPUs, the plainest first.
SLURM_GPUS = ("SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_PER_SOCKET")
SLURM_GPUS += ("SLURM_JOB_GPUS", "SLURM_STEP_GPUS")


def pick_device(config: Config, local_rank: int, local_world: int) -> torch.device:
    """This rank's device, made ready. Raises UserError for a device that cannot be had."""
    kind, request = config.train.device, gpu_request(config, os.environ)
    if kind == "auto":
        if request is not None and not torch.cuda.is_available():
            raise UserError(
                f"train.device=auto: {request} asks for GPUs, and torch sees none on {socket.gethostname()}. "
                f"{_why_no_gpu()} To train on the CPU all the same: train.device=cpu."
            )
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        if request is not None and local_rank == 0:
            print(f"training on the CPU, as train.device=cpu says, though {request} asks for GPUs", flush=True)
        _keep_freed_memory()
        _take_cores(local_rank, local_world)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"train.device=cuda: torch sees no GPU on {socket.gethostname()}. {_why_no_gpu()} Or use train.device=cpu."
        )
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
    cores = os.sched_getaffinity(0)
    check_cores(config, len(cores))
    gpu = torch.cuda.get_device_properties(device)
    os.sched_setaffinity(
        0, near_cores(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0", cores)
    )
    return device


def gpu_request(config: Config, environment: Mapping[str, str]) -> str | None:
    """What asks for GPUs, a setting or one of Slurm's variables; None where nothing does."""
    if config.cluster.gpus_per_node:
        return f"cluster.gpus_per_node={config.cluster.gpus_per_node}"
    return next(
        (f"{name}={environment[name]}" for name in SLURM_GPUS if environment.get(name, "") not in ("", "0")), None
    )


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"This torch ({torch.__version__}) is built without CUDA: install one that is."
    return (
        f"Most likely its driver is older than torch {torch.__version__} needs, which is built for CUDA "
        f"{torch.version.cuda} (`nvidia-smi` there shows the newest CUDA that the driver knows): have it updated, or "
        "install a torch for an older CUDA."
    )


def check_cores(config: Config, cores: int) -> None:
    """Raises UserError where a rank with a GPU may use fewer cores than it needs, or than were asked for."""
    needed = config.cluster.cpus_per_task or CPUS_OF_GPU
    if cores < needed:
        raise UserError(
            f"cluster.cpus_per_task: a rank on {socket.gethostname()} may use {cores} cores, and needs {needed} for "
            f"trainer, autograd, NCCL, data and saver. Set cluster.cpus_per_task={needed}, under your own srun "
            f"--cpus-per-task={needed}."
        )


def near_cores(address: str, allowed: set[int], devices: Path = Path("/sys/bus/pci/devices")) -> set[int]:
    """Those of the allowed cores that are near the device at a PCI address; all of them where none is, or nothing is
    known.
    """
    try:
        ranges = (devices / address / "local_cpulist").read_text().strip().split(",")
        ends = [[int(end) for end in each.split("-")] for each in ranges]
    except (OSError, ValueError):
        return allowed
    near = {core for each in ends for core in range(each[0], each[-1] + 1)}
    return allowed & near or allowed


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
