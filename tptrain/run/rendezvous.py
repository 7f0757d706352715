"""From a process to a rank of a run: it meets the others, they see that they fit together, and connect their mesh."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tptrain.config import Config, UserError, check_topology
from tptrain.config.schema import kv_heads
from tptrain.ops.choose import choose
from tptrain.ops.table import Operations
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import Mesh, tp_grid
from tptrain.run import preflight
from tptrain.run.device import pick_device
from tptrain.train.trainer import compiled_folder
from tptrain.watch.black_box import BlackBox


@dataclass(frozen=True)
class Rank:
    """One rank of a run that has met the others."""

    mesh: Mesh
    ops: Operations
    nodes: tuple[str, ...]  # of each rank


def meet(config: Config, box: BlackBox, own_run_dir: Callable[[], None] = lambda: None) -> Rank:
    """Meet the other ranks and connect the mesh. Reads torchrun's variables.

    `own_run_dir` is called on rank 0 once all are there. Raises UserError for a topology, device or run directory that
    cannot be had, RendezvousError where ranks are missing.
    """
    env = os.environ
    box.touch("rendezvous")
    rank, world, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    check_topology(config, world)
    device = pick_device(config, local_rank, int(env["LOCAL_WORLD_SIZE"]))
    backend = _backend(config, device)
    ops = choose(device.type, config.train.compile, compiled_folder(config))
    name = "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
    report = preflight.Report(rank, env["TPTRAIN_NODE"], local_rank, name, config.run.dir, ops.backend)
    patience, hosted = config.watchdog.rendezvous_s, env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = env["TPTRAIN_ATTEMPT"]
    store = preflight.join(env["MASTER_ADDR"], int(env["MASTER_PORT"]), report, world, hosted, patience, attempt)
    meeting = preflight.Meeting(store, report, world, patience, box.touch)
    reports = preflight.check_reports(meeting, config)
    preflight.check_run_dir(meeting, reports, config, own_run_dir)
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
    nodes = tuple(each.node for each in reports)
    mesh = connect(
        tp_grid(world, config.parallel.tp, kv_heads(config.model)),
        device,
        box=box,
        store=store,
        nodes=nodes,
        shared=config.parallel.backend == "auto" and device.type == "cpu",
        sequence_parallel=config.parallel.sequence_parallel,
    )
    return Rank(mesh, ops, nodes)


def _backend(config: Config, device: torch.device) -> str:
    """nccl or gloo. Raises UserError."""
    backend: Any = config.parallel.backend
    if backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type == "cpu":
        raise UserError("parallel.backend=nccl: this machine shows no CUDA device to torch. Use parallel.backend=gloo.")
    return backend
