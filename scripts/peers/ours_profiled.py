"""tptrain's own ranks, for the profiled run only: its speed is measured through its command line (`runs.py`)."""

import torch
from torch import Tensor

from .cells import RANKS, Job


class Ours:
    """tptrain's trainer. It takes its batches itself: they are the same."""

    def __init__(self, job: Job) -> None:
        from tptrain.config import load_config
        from tptrain.mesh import make_mesh
        from tptrain.train import build as build_trainer

        config = load_config([*job.overrides, f"parallel.tp={RANKS}"])
        self.trainer = build_trainer(config, make_mesh(RANKS, job.model.kv_heads, torch.device("cpu")))
        self.done = 0

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        self.done += 1
        loss, _ = self.trainer.step(self.done)
        return loss.item()


build = Ours
