"""From a process to a rank of a run: it meets the others, they see that they fit together, and connect their mesh."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tptrain.config import Config, UserError, check_topology, variables
from tptrain.models.sizes import sizes
from tptrain.ops.choose import choose, common
from tptrain.ops.node_cache import node_cache
from tptrain.ops.table import Operations
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import Mesh, tp_grid
from tptrain.parallel.process_groups import urgent_options
from tptrain.run import preflight
from tptrain.run.device import pick_device
from tptrain.watch.black_box import BlackBox


@dataclass(frozen=True)
class Rendezvous:
    """All ranks of a run, met over the store; they fit together, and there is no process group yet."""

    meeting: preflight.Meeting
    reports: list[preflight.Report]  # of each rank
    device: torch.device
    backend: str  # nccl or gloo
    ops: Operations

    @property
    def nodes(self) -> list[str]:
        """Of each rank."""
        return [report.node for report in self.reports]


def meet(config: Config, box: BlackBox) -> Rendezvous:
    """Meet the other ranks. Reads torchrun's variables.

    Raises UserError for a topology or device that cannot be had, RendezvousError where ranks are missing.
    """
    env = os.environ
    rank, world, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"])
    check_topology(config, world)
    device = pick_device(config, local_rank, int(env["LOCAL_WORLD_SIZE"]))
    backend = _backend(config, device)
    ops = choose(device.type, config.train.compile, node_cache())
    name = "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
    report = preflight.Report(rank, env["TPTRAIN_NODE"], local_rank, name, config.run.dir, ops.backend)
    patience, hosted = config.watchdog.rendezvous_s, env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = env["TPTRAIN_ATTEMPT"]
    box.touch("rendezvous")  # not before the device has answered: who is to blame where ranks do not meet rests on it
    store = preflight.join(env["MASTER_ADDR"], int(env["MASTER_PORT"]), report, world, hosted, patience, attempt)
    meeting = preflight.Meeting(store, report, world, patience, box.touch)
    reports = preflight.check_reports(meeting, config)
    ops = common(ops, [(report.node, report.operations) for report in reports])
    return Rendezvous(meeting, reports, device, backend, ops)


def connect_ranks(config: Config, box: BlackBox, rendezvous: Rendezvous) -> Mesh:
    """The mesh of ranks that have met. Every rank calls it."""
    meeting, backend = rendezvous.meeting, rendezvous.backend
    timeout = timedelta(seconds=timeout_s(config))
    tp_first, only_tp = _tp_first(config, backend, os.environ), config.parallel.tp == meeting.world
    dist.init_process_group(
        backend,
        store=meeting.store,
        rank=meeting.report.rank,
        world_size=meeting.world,
        timeout=timeout,
        device_id=rendezvous.device if backend == "nccl" else None,
        pg_options=urgent_options(timeout) if tp_first and only_tp else None,  # it is the tp group
    )
    box.touch("build")
    return connect(
        tp_grid(meeting.world, config.parallel.tp, sizes(config.model).kv_heads),
        rendezvous.device,
        box=box,
        store=meeting.store,
        nodes=rendezvous.nodes,
        shared=config.parallel.backend == "auto" and rendezvous.device.type == "cpu",
        sequence_parallel=config.parallel.sequence_parallel,
        tp_first=tp_first,
        timeout=timeout,
    )


def _tp_first(config: Config, backend: str, environment: Mapping[str, str]) -> bool:
    """Whether the kernels of the tp group's collectives go before others: every layer waits for them."""
    return backend == "nccl" and config.parallel.tp > 1 and environment.get(variables.STREAM_PRIORITY) != "0"


def timeout_s(config: Config) -> float:
    """Of a collective, in every process group: the watchdog speaks first."""
    return max(vars(config.watchdog).values()) + 60


def surroundings(config: Config, rendezvous: Rendezvous, environment: Mapping[str, str]) -> list[str]:
    """Lines that say which variables of those that tptrain or cluster.env sets have which value, and how NCCL runs."""
    names = [name for name in variables.names(config, rendezvous.device.type) if name in environment]
    values = [f"{name}={shlex.quote(environment[name])}" for name in names]
    lines = [f"environment: {' '.join(values)}"] if values else []
    if rendezvous.backend == "nccl":
        tp_first = _tp_first(config, rendezvous.backend, environment)
        first = "the tp group's stream has high priority; " if tp_first else ""
        lines.append(f"NCCL: {first}a collective may take {timeout_s(config):,.0f} s in any group")
    return lines


def _backend(config: Config, device: torch.device) -> str:
    """nccl or gloo. Raises UserError."""
    backend: Any = config.parallel.backend
    if backend == "auto":
        return "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type == "cpu":
        raise UserError("parallel.backend=nccl: this machine shows no CUDA device to torch. Use parallel.backend=gloo.")
    return backend
