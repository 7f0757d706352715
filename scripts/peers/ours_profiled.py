"""tptrain's own ranks, for the profiled run only: its speed is measured through its command line (`runs.py`)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from .cells import Job

OPERATIONS = ("exchange", "all_reduce", "all_reduce_", "all_gather", "reduce_scatter")  # of SharedMemory


class Ours:
    """tptrain's trainer. It takes its batches itself: they are the same."""

    def __init__(self, job: Job) -> None:
        from tptrain.config import load_config
        from tptrain.mesh import make_mesh
        from tptrain.shared_memory import SharedMemory
        from tptrain.train import build as build_trainer

        config = load_config([*job.overrides, f"parallel.tp={job.machine.ranks}"])
        mesh = make_mesh(
            job.machine.ranks,
            job.model.kv_heads,
            torch.device("cpu"),
            shared=config.parallel.backend == "auto",
            sequence_parallel=config.parallel.sequence_parallel,
        )
        for name in OPERATIONS:
            setattr(SharedMemory, name, _seen(getattr(SharedMemory, name)))
        self.trainer = build_trainer(config, mesh)
        self.done = 0

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        self.done += 1
        loss, _ = self.trainer.step(self.done)
        return loss.item()


def _seen(begin: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
    """A collective through shared memory, under the name that `profiled.py` looks for, in its beginning and its end."""

    def wrapped(*arguments: Any, **options: Any) -> Callable[[], Any]:
        with record_function("gloo: in shared memory"):
            finish = begin(*arguments, **options)

        def finished() -> Any:
            with record_function("gloo: in shared memory"):
                return finish()

        return finished

    return wrapped


build = Ours
