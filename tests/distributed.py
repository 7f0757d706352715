"""Run a function on n real ranks (gloo unless told otherwise), each a process, and get every rank's result."""

import gc
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch.place import free_port
from tptrain.nn.parameter import Sharding
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import Mesh, tp_grid

FORKSERVER = mp.get_context("forkserver")  # starts processes that need not import torch
# The first optimizer of a process imports torch._dynamo, which takes a second.
FORKSERVER.set_forkserver_preload(["tests.distributed", "tptrain.train.loop", "torch._dynamo", "pytest"])


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
            answers[rank] = pickle.loads(value)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [answers[rank] for rank in range(world)]


def spare_garbage_collection() -> None:
    """What is there now is left out where a run collects garbage at its start: of all modules, that takes long."""
    gc.freeze()


def _rank(rank: int, world: int, port: int, backend: str, results: Any, task: bytes) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    spare_garbage_collection()
    try:
        function, arguments = pickle.loads(task)
        store = f"tcp://127.0.0.1:{port}"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
        # By plain pickle: a tensor in a queue is a file that its rank hands over later, and the rank may be gone then.
        results.put((rank, pickle.dumps(function(*arguments)), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def mesh(
    tp: int, kv_heads: int = 10**9, device: str = "cpu", shared: bool = False, sequence_parallel: bool = False
) -> Mesh:
    """The mesh over the ranks that are there, or of one rank."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    grid = tp_grid(world, tp, kv_heads)
    return connect(grid, torch.device(device), shared=shared, sequence_parallel=sequence_parallel)


def gather_global(local: torch.Tensor, layout: Sharding, grid: Mesh) -> torch.Tensor:
    """The global tensor out of every rank's slice; ranks that hold the same slice must have the same bits."""
    slices: list[Any] = [None] * grid.world
    if grid.world == 1:
        slices = [(layout.offsets, local)]
    else:
        dist.all_gather_object(slices, (layout.offsets, local.contiguous()))
    whole = torch.full(layout.shape, torch.nan, dtype=local.dtype)
    first: dict[tuple[int, ...], torch.Tensor] = {}
    own = [rank for rank in range(grid.world) if grid.grid.index("dp", rank) == grid.index("dp")]
    for offsets, part in (slices[rank] for rank in own):
        assert torch.equal(first.setdefault(offsets, part), part), "copies differ"
        whole[tuple(slice(start, start + n) for start, n in zip(offsets, part.shape, strict=True))] = part
    assert not whole.isnan().any(), "a slice is missing"
    return whole
