"""tptrain's own ranks, for the profiled run only: its speed is measured through its command line (`runs.py`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from .cells import Job

OPERATIONS = ("sum", "all_reduce_", "all_gather", "reduce_scatter")  # of SharedMemory


class Ours:
    """tptrain's trainer. It takes its batches itself: they are the same."""

    def __init__(self, job: Job) -> None:
        from tptrain.config import load_config
        from tptrain.ops.choose import choose
        from tptrain.ops.node_cache import node_cache
        from tptrain.parallel.connect import connect
        from tptrain.parallel.mesh import tp_grid
        from tptrain.parallel.shared_memory import SharedMemory
        from tptrain.train.trainer import build as build_trainer
        from tptrain.train.trainer import initialise

        config = load_config([*job.overrides, f"parallel.tp={job.machine.ranks}"])
        mesh = connect(
            tp_grid(job.machine.ranks, job.machine.ranks, job.model.kv_heads),
            torch.device("cpu"),
            shared=config.parallel.backend == "auto",
            sequence_parallel=config.parallel.sequence_parallel,
        )
        for name in OPERATIONS:
            setattr(SharedMemory, name, _seen(getattr(SharedMemory, name)))
        self.trainer = build_trainer(config, mesh, choose("cpu", config.train.compile, node_cache()))
        initialise(self.trainer)
        self.done = 0

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        self.done += 1
        loss, _ = self.trainer.step(self.done)
        return loss.item()


def _seen(begin: Callable[..., Any]) -> Callable[..., Any]:
    """A collective through shared memory, under the name that `profiled.py` looks for, in its beginning and its end."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        with record_function("gloo: in shared memory"):
            begun = begin(*arguments, **options)

        def finished() -> None:
            finish = begun[1] if isinstance(begun, tuple) else begun
            with record_function("gloo: in shared memory"):
                finish()

        return (begun[0], finished) if isinstance(begun, tuple) else finished  # `sum` returns its result too

    return wrapped


build = Ours
