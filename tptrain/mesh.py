"""The rank grid: which process groups a rank belongs to, and its device. Built once, passed as an argument.

Ranks form a (dp, tp) grid with tp innermost, so that the ranks of one TP group are neighbours on one node:

    tp=2, dp=2      tp group  tp group
                    [ 0, 1 ]  [ 2, 3 ]       dp groups: [0, 2] and [1, 3]
"""

import os
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from tptrain.config import Config, UserError, check_topology
from tptrain.config.schema import kv_heads

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the grid. A group is None where it would hold one rank: there is nothing to reduce."""

    rank: int
    world: int
    tp: int  # size of the tp axis
    device: torch.device
    tp_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    kv_group: dist.ProcessGroup | None  # tp neighbours that hold the same KV heads, when kv_heads < tp
    kv_replicas: int  # size of kv_group
    control: dist.ProcessGroup | None  # all ranks, gloo on the cpu: flags, plans, checksums

    @property
    def dp(self) -> int:
        return self.world // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is raised on any rank; every rank gets the same answer."""
        if self.control is None:
            return flag
        raised = torch.tensor([int(flag)])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.control)
        return bool(raised.item())

    def gather(self, value: Any) -> list[Any]:
        """The small object of every rank, in rank order, on every rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, for all: the others wait as long as it takes; its failure fails every rank."""
        if self.control is None:
            return work()
        value = None
        store = dist.distributed_c10d._get_default_store()
        if self.is_main:
            try:
                value = work()
            except BaseException as error:
                store.set("main_first", f"{type(error).__name__}: {error}")
                raise
            store.set("main_first", "done")
        else:
            while True:  # short waits, so that a signal's handler gets its turn
                try:
                    store.wait(["main_first"], timedelta(seconds=2))
                    break
                except dist.DistStoreError:
                    continue
            if (answer := store.get("main_first").decode()) != "done":
                raise UserError(f"rank 0 failed: {answer}")
        value = self.gather(value)[0]
        if self.is_main:
            store.delete_key("main_first")
        self.barrier()
        return cast(T, value)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Place:
    """Where this process stands on its node."""

    local_rank: int
    local_world: int


def find_place() -> Place:
    """Read how this process was started: by torchrun (or `launch`), by a bare srun, or alone.

    Leaves torchrun's variables in the environment in any case, for torch's `env://` rendezvous.
    """
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        env.update(_slurm_variables() if "SLURM_STEP_NODELIST" in env else _lone_variables())
    local_world = int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    return Place(int(env.get("LOCAL_RANK", int(env["RANK"]) % local_world)), local_world)


def _slurm_variables() -> dict[str, str]:
    env = os.environ
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    )
    # A restarted job keeps its id, and its old port may still be held: the restart count moves it.
    job, restart, step = (int(env.get(f"SLURM_{name}", 0)) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    tasks = env["SLURM_STEP_TASKS_PER_NODE"].replace("(", ",").split(",")  # "4(x2)" or "2,1"
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[0],
        "MASTER_ADDR": nodes.stdout.split()[0],
        "MASTER_PORT": str(20000 + (job * 131 + restart * 17 + step * 7) % 12000),
    }


def _lone_variables() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def build_mesh(config: Config) -> Mesh:
    """Join the process group and build the axes. Raises UserError for a topology or device that cannot be had."""
    place = find_place()
    check_topology(config, int(os.environ["WORLD_SIZE"]))
    device = _pick_device(config, place)
    backend = config.parallel.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type == "cpu":
        raise UserError("parallel.backend=nccl: this machine shows no CUDA device to torch. Use parallel.backend=gloo.")
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    return make_mesh(config.parallel.tp, kv_heads(config.model), device)


def make_mesh(tp: int, kv_heads: int, device: torch.device) -> Mesh:
    """The axes over the process group that is already there (or over none: a single rank)."""
    if not dist.is_initialized():
        return Mesh(0, 1, 1, device, None, None, None, 1, None)
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world % tp == 0, (world, tp)
    kv_replicas = max(1, tp // kv_heads)

    def group_of(partition: list[list[int]]) -> dist.ProcessGroup | None:
        mine = None
        for ranks in partition:  # every rank creates every group, in the same order
            group = _new_group(ranks) if len(ranks) > 1 else None
            mine = group if rank in ranks else mine
        return mine

    def runs(length: int) -> list[list[int]]:
        return [list(range(start, start + length)) for start in range(0, world, length)]

    return Mesh(
        rank=rank,
        world=world,
        tp=tp,
        device=device,
        tp_group=group_of(runs(tp)),
        dp_group=group_of([list(range(offset, world, tp)) for offset in range(tp)]),
        kv_group=group_of(runs(kv_replicas)),
        kv_replicas=kv_replicas,
        control=_new_group(None, "gloo"),
    )


def _new_group(ranks: list[int] | None, backend: str | None = None) -> dist.ProcessGroup:
    group = dist.new_group(ranks, backend=backend)
    assert isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER
    return cast(dist.ProcessGroup, group)


def _pick_device(config: Config, place: Place) -> torch.device:
    kind = config.train.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:  # else every rank would start a thread for every core
            cores = len(os.sched_getaffinity(0)) // place.local_world
            torch.set_num_threads(max(1, int(os.environ.get("SLURM_CPUS_PER_TASK", cores))))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device=cuda: this machine shows no CUDA device to torch. Use train.device=cpu.")
    visible = torch.cuda.device_count()
    bound = visible == 1 and "SLURM_PROCID" in os.environ  # Slurm can show each task a GPU of its own
    shared = config.parallel.backend == "gloo"  # NCCL refuses two ranks on one GPU, gloo does not
    if place.local_rank >= visible and not bound and not shared:
        raise UserError(
            f"cluster.tasks_per_node: {place.local_world} ranks on this node, which shows "
            f"{visible} GPUs to torch. Use one rank for each GPU."
        )
    device = torch.device("cuda", place.local_rank % visible)
    torch.cuda.set_device(device)
    return device
