"""Where a step's time goes, on two cores of a CPU:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 torchrun --standalone --nproc-per-node 2 scripts/step_parts.py S fp32

Milliseconds of rank 0 by part, medians over steps of the real trainer, tp as many ranks as there are, for a cell of
`scripts/bench` (S or M, fp32 or bf16); overrides may follow. Timed by wrapping functions, because a profiler's own
memory moves the trainer's to fresh pages. The first three parts are the floor of a step that uses these kernels: its
matrix products, attention and all-reduces.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from peers.cells import MODELS
from peers.ours_profiled import OPERATIONS
from peers.settings import overrides
from torch import Tensor

from tptrain import fused, model
from tptrain.config import UserError, load_config
from tptrain.config.schema import kv_heads
from tptrain.mesh import make_mesh, pick_device
from tptrain.optim import Optimizer
from tptrain.shared_memory import SharedMemory
from tptrain.train import build

WARMUP, STEPS = 6, 15

PRODUCTS, ATTENTION, ALL_REDUCES = FLOOR = ("matrix products", "attention", "all-reduces")
FUSED = {
    "rms_norm": "norms, residual stream",
    "rms_norm_backward": "norms, residual stream",
    "add_rms_norm": "norms, residual stream",
    "add_rms_norm_backward": "norms, residual stream",
    "gate_product": "activation",
    "_gated_backward": "activation",
    "_rotate": "rotary",
    "_rotate_qkv": "rotary",
    "_rotate_qkv_backward": "rotary",
    "_statistics": "loss without products",
    "_scaled_softmax": "loss without products",
}

taken: dict[str, float] = defaultdict(float)  # seconds of this step, by part
inside = [0.0]  # of the calls that are going on: what the timed calls within each have taken


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Its time is that of the part `name`, but for the parts within it."""

    def call(*arguments: Any, **options: Any) -> Any:
        inside.append(0.0)
        began = time.perf_counter()
        result = function(*arguments, **options)
        whole = time.perf_counter() - began
        taken[name] += whole - inside.pop()
        inside[-1] += whole
        return timed(name, result) if name == ALL_REDUCES and callable(result) else result  # what finishes it

    return call


class TimedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        with torch.enable_grad():
            ctx.y = timed(ATTENTION, right_attention)(*ctx.inputs)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        y, inputs = ctx.y, ctx.inputs
        del ctx.y, ctx.inputs
        return timed(ATTENTION, torch.autograd.grad)(y, inputs, grads)


right_attention = model.attention


def time_the_parts() -> None:
    Tensor.__matmul__ = timed(PRODUCTS, Tensor.__matmul__)
    Tensor.addmm_ = timed(PRODUCTS, Tensor.addmm_)
    torch.mm = timed(PRODUCTS, torch.mm)
    model.attention = TimedAttention.apply
    for name in OPERATIONS:
        setattr(SharedMemory, name, timed(ALL_REDUCES, getattr(SharedMemory, name)))
    fused.add = timed(ALL_REDUCES, fused.add)  # of what was exchanged; in the forward pass the norms do it
    right = fused._Fusible.__call__
    fused._Fusible.__call__ = lambda self, *given: timed(FUSED[self.function.__name__], right)(self, *given)
    for name in ("statistics", "logit_gradient"):
        setattr(fused, name, timed("loss without products", getattr(fused, name)))
    for name in ("norm", "clip", "step"):
        setattr(Optimizer, name, timed("optimizer", getattr(Optimizer, name)))


def main(model_name: str, precision: str, *changes: str) -> None:
    dist.init_process_group("gloo")
    cell = overrides(MODELS[model_name], precision, Path(load_config([]).data.cache_dir))
    tp = dist.get_world_size()
    config = load_config([*cell, f"parallel.tp={tp}", *changes])
    device = pick_device(config, int(os.environ["LOCAL_RANK"]), tp)
    mesh = make_mesh(tp, kv_heads(config.model), device, shared=True)
    time_the_parts()
    trainer = build(config, mesh)
    steps: list[dict[str, float]] = []
    for step in range(1, WARMUP + STEPS + 1):
        taken.clear()
        timed("the rest", trainer.step)(step)
        steps.append(dict(taken))
    if mesh.is_main:
        parts = {name: 1000 * median(each[name] for each in steps[WARMUP:]) for name in steps[-1]}
        rest = parts.pop("the rest")
        floor = {name: parts.pop(name, 0.0) for name in FLOOR}
        for name, ms in [*floor.items(), *sorted(parts.items(), key=lambda each: -each[1]), ("the rest", rest)]:
            print(f"{name:24} {ms:8,.1f} ms")
        whole = 1000 * median(sum(each.values()) for each in steps[WARMUP:])
        print(f"{'step':24} {whole:8,.1f} ms, of which the first three take {sum(floor.values()):,.1f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
