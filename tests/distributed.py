"""Run a function on n real ranks (gloo unless told otherwise), each a process, and get every rank's result."""

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch.place import free_port
from tptrain.mesh import Mesh, make_mesh

FORKSERVER = mp.get_context("forkserver")  # starts processes that need not import torch
FORKSERVER.set_forkserver_preload(["tests.distributed", "tptrain.train"])


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, backend: str = "gloo") -> list[Any]:
    """`function(*arguments)` on `world` ranks; their return values in rank order. A rank's exception fails the call."""
    results = FORKSERVER.SimpleQueue()
    port = free_port()
    task = pickle.dumps((function, arguments))  # as Process would, each tensor were a file of its own: too many
    processes = [
        FORKSERVER.Process(target=_rank, args=(rank, world, port, backend, results, task), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world:
            if results.empty():
                dead = [p for i, p in enumerate(processes) if i not in answers and not p.is_alive() and p.exitcode]
                assert not dead, f"a rank died with exit code {dead[0].exitcode}"
                processes[0].join(0.05)
                continue
            rank, value, failure = results.get()
            assert failure is None, f"rank {rank}:\n{failure}"
            answers[rank] = value
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [answers[rank] for rank in range(world)]


def _rank(rank: int, world: int, port: int, backend: str, results: Any, task: bytes) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        function, arguments = pickle.loads(task)
        store = f"tcp://127.0.0.1:{port}"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
        results.put((rank, function(*arguments), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def mesh(
    tp: int, kv_heads: int = 10**9, device: str = "cpu", shared: bool = False, sequence_parallel: bool = False
) -> Mesh:
    return make_mesh(tp, kv_heads, torch.device(device), shared=shared, sequence_parallel=sequence_parallel)


def gather_global(local: torch.Tensor, spec: Any, grid: Mesh) -> torch.Tensor:
    """The global tensor out of every rank's slice; replicas must be bit for bit alike."""
    parts = [torch.empty_like(local) for _ in range(spec.tp)]
    if grid.tp_group is None:
        parts = [local]
    else:
        dist.all_gather(parts, local.contiguous(), group=grid.tp_group.process_group)
    for index, part in enumerate(parts):
        first = parts[index // spec.replicas * spec.replicas]
        assert torch.equal(part, first), "replicas differ"
    return torch.cat(parts[:: spec.replicas], dim=spec.dim) if spec.slices > 1 else parts[0]
