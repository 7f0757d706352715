"""The rank grid: which process groups a rank belongs to, and its device. Built once, passed as an argument.

Ranks form a (dp, tp) grid with tp innermost, so that the ranks of one TP group are neighbours on one node:

    tp=2, dp=2      tp group  tp group
                    [ 0, 1 ]  [ 2, 3 ]       dp groups: [0, 2] and [1, 3]
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from tptrain import preflight
from tptrain.config import Config, UserError, check_topology
from tptrain.config.schema import kv_heads
from tptrain.shared_memory import SharedMemory, connect
from tptrain.watch.black_box import BlackBox

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Ranks that reduce together, and the black box in which each of their collectives is noted."""

    axis: str  # tp, dp, kv, world or control
    ranks: tuple[int, ...]
    process_group: dist.ProcessGroup
    box: BlackBox
    shared: SharedMemory | None = None  # of cpu ranks that share a machine: faster than the process group

    @contextmanager
    def noted(self, op: str, x: torch.Tensor | None = None) -> Iterator[None]:
        """Around a blocking collective: entered, and left unless it fails."""
        number = self.enter(op, x)
        yield
        self.box.leave(number)

    def enter(self, op: str, x: torch.Tensor | None = None) -> int:
        shape, dtype = ((), "object") if x is None else (x.shape, x.dtype)
        return self.box.enter(op, shape, dtype, self.axis, self.ranks)


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the grid. A group is None where it would hold one rank: there is nothing to reduce."""

    rank: int
    world: int
    tp: int  # size of the tp axis
    device: torch.device
    tp_group: Group | None
    dp_group: Group | None
    kv_group: Group | None  # tp neighbours that hold the same KV heads, when kv_heads < tp
    kv_replicas: int  # size of kv_group
    world_group: Group | None  # all ranks, on the device
    control: Group | None  # all ranks, gloo on the cpu: plans, checksums, agreements
    saving: Group | None  # the same for the thread that writes checkpoints, in a black box of its own
    sequence_parallel: bool = False  # between the linears each tp rank has 1/tp of the tokens
    box: BlackBox = field(default_factory=BlackBox)  # what this rank is doing, for its supervisor
    store: Any = None  # of the rendezvous
    nodes: tuple[str, ...] = ()  # of each rank

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

    def gather(self, value: Any) -> list[Any]:
        """The small object of every rank, in rank order, on every rank."""
        return gather(self.control, value)

    def barrier(self) -> None:
        if self.control is not None:
            with self.control.noted("barrier"):
                dist.barrier(group=self.control.process_group)

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, for all: the others wait as long as it takes; its failure fails every rank."""
        if self.control is None:
            return work()
        value = None
        store = self.store or dist.distributed_c10d._get_default_store()
        if self.is_main:
            try:
                value = work()
            except BaseException as error:
                store.set("main_first", f"{type(error).__name__}: {error}")
                raise
            store.set("main_first", "done")
        else:
            while not store.check(["main_first"]):  # not store.wait: it warns of every time-out
                self.box.touch()
                time.sleep(0.05)
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


def gather(group: Group | None, value: Any) -> list[Any]:
    """The small object of every rank of the group, in its order, on each."""
    if group is None:
        return [value]
    values: list[Any] = [None] * len(group.ranks)
    with group.noted("all_gather_object"):
        dist.all_gather_object(values, value, group=group.process_group)
    return values


def build_mesh(config: Config, box: BlackBox, claim: Callable[[], None] = lambda: None) -> Mesh:
    """Meet the other ranks, check that they fit together, and build the axes. Reads torchrun's variables.

    `claim` runs on rank 0, once all are there. Raises UserError for a topology, device or run directory that cannot be
    had, RendezvousError where ranks are missing.
    """
    env = os.environ
    box.touch("rendezvous")
    rank, world, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    check_topology(config, world)
    device = pick_device(config, local_rank, int(env["LOCAL_WORLD_SIZE"]))
    backend = config.parallel.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type == "cpu":
        raise UserError("parallel.backend=nccl: this machine shows no CUDA device to torch. Use parallel.backend=gloo.")
    name = "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
    mine = preflight.Report(rank, env["TPTRAIN_NODE"], local_rank, name, config.run.dir)
    patience, hosted = config.watchdog.rendezvous_s, env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = env["TPTRAIN_ATTEMPT"]
    store = preflight.join(env["MASTER_ADDR"], int(env["MASTER_PORT"]), mine, world, hosted, patience, attempt)
    reports = preflight.check(store, mine, world, config, claim, box.touch)
    longest = max(vars(config.watchdog).values())
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=longest + 60),  # the watchdog speaks first
        device_id=device if backend == "nccl" else None,
    )
    box.touch("build")
    return make_mesh(
        config.parallel.tp,
        kv_heads(config.model),
        device,
        box,
        store,
        [report.node for report in reports],
        shared=config.parallel.backend == "auto" and device.type == "cpu",
        sequence_parallel=config.parallel.sequence_parallel,
    )


def make_mesh(
    tp: int,
    kv_heads: int,
    device: torch.device,
    box: BlackBox | None = None,
    store: Any = None,
    nodes: list[str] | None = None,
    shared: bool = False,
    sequence_parallel: bool = False,
) -> Mesh:
    """The axes over the process group that is already there (or over none: a single rank).

    `shared`: ranks on one node (all of them, where no nodes are given) reduce through its memory where they can.
    """
    box = box or BlackBox()
    if not dist.is_initialized():
        return Mesh(0, 1, 1, device, None, None, None, 1, None, None, None, box=box)
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world % tp == 0, (world, tp)
    kv_replicas = max(1, tp // kv_heads)

    def group_of(axis: str, partition: list[list[int]], backend: str | None = None) -> Group | None:
        mine = None
        for ranks in partition:  # every rank creates every group, in the same order
            made = dist.new_group(ranks, backend=backend) if len(ranks) > 1 or backend else None
            if rank in ranks and made is not None:
                process_group = cast(dist.ProcessGroup, made)
                note = BlackBox() if axis == "saving" else box
                together = shared and backend is None and len({nodes[r] for r in ranks} if nodes else ()) <= 1
                mine = Group(axis, tuple(ranks), process_group, note)
                if together:
                    mine = replace(mine, shared=connect(ranks.index(rank), partial(gather, mine)))
        return mine

    def runs(length: int) -> list[list[int]]:
        return [list(range(start, start + length)) for start in range(0, world, length)]

    tp_group = group_of("tp", runs(tp))
    dp_group = group_of("dp", [list(range(offset, world, tp)) for offset in range(tp)])
    return Mesh(
        rank=rank,
        world=world,
        tp=tp,
        device=device,
        tp_group=tp_group,
        dp_group=dp_group,
        kv_group=group_of("kv", runs(kv_replicas)),
        kv_replicas=kv_replicas,
        world_group=group_of("world", runs(world)) if 1 < tp < world else tp_group or dp_group,
        control=group_of("control", runs(world), "gloo"),
        saving=group_of("saving", runs(world), "gloo"),
        sequence_parallel=sequence_parallel and tp > 1,
        box=box,
        store=store,
        nodes=tuple(nodes or []),
    )


def _keep_freed_memory() -> None:
    """Have glibc reuse large blocks: it gives them back to the kernel, and fresh pages cost more than filling them."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def pick_device(config: Config, local_rank: int, local_world: int) -> torch.device:
    """This rank's device; on a CPU it also gets its threads, its cores and a malloc that keeps what it has.

    Raises UserError for a device that cannot be had.
    """
    kind = config.train.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        _keep_freed_memory()
        cores = sorted(os.sched_getaffinity(0))
        each = len(cores) // local_world
        if "OMP_NUM_THREADS" not in os.environ:  # else every rank would start a thread for every core
            torch.set_num_threads(max(1, int(os.environ.get("SLURM_CPUS_PER_TASK", each))))
        if each and "SLURM_PROCID" not in os.environ:  # Slurm binds its tasks itself
            # Otherwise two ranks share a core now and then, and each step waits for both.
            os.sched_setaffinity(0, cores[local_rank * each : (local_rank + 1) * each])
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
