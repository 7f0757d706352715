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
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from peers.cells import MODELS
from peers.ours_profiled import OPERATIONS
from peers.settings import overrides
from torch import Tensor

from tptrain.config import UserError, load_config
from tptrain.config.schema import kv_heads
from tptrain.ops.choose import choose
from tptrain.ops.node_cache import node_cache
from tptrain.ops.table import Operations
from tptrain.optim.adamw import Optimizer
from tptrain.optim.reduce import Reducer
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import tp_grid
from tptrain.parallel.shared_memory import SharedMemory
from tptrain.run.device import pick_device
from tptrain.train.trainer import build, initialise

WARMUP, STEPS = 6, 15

PRODUCTS, ATTENTION, ALL_REDUCES = FLOOR = ("matrix products", "attention", "all-reduces")
PARTS = {  # of operations in `Operations`
    "rms_norm": "norms, residual stream",
    "rms_norm_backward": "norms, residual stream",
    "add_rms_norm": "norms, residual stream",
    "add_rms_norm_backward": "norms, residual stream",
    "gate_product": "activation",
    "gate_product_backward": "activation",
    "rotate": "rotary",
    "rotate_qkv": "rotary",
    "rotate_qkv_backward": "rotary",
    "statistics": "loss without products",
    "logit_gradient_": "loss without products",
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
        if name != ALL_REDUCES:
            return result
        # What finishes it is timed, too; `sum` returns its result beside that.
        return (
            (result[0], timed(name, result[1]))
            if isinstance(result, tuple)
            else timed(name, result)
            if result
            else None
        )

    return call


class TimedAttention(torch.autograd.Function):
    """Another attention, timed forward and backward."""

    @staticmethod
    def forward(ctx: Any, attention: Callable[..., Tensor], *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        with torch.enable_grad():
            ctx.y = timed(ATTENTION, attention)(*ctx.inputs)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, inputs = ctx.y, ctx.inputs
        del ctx.y, ctx.inputs
        return None, *timed(ATTENTION, torch.autograd.grad)(y, inputs, grads)


def time_the_parts(ops: Operations) -> Operations:
    """Wrap matrix products, collectives and the optimizer; returns the table with its operations wrapped."""
    Tensor.__matmul__ = timed(PRODUCTS, Tensor.__matmul__)
    Tensor.addmm_ = timed(PRODUCTS, Tensor.addmm_)
    torch.mm = timed(PRODUCTS, torch.mm)
    for name in OPERATIONS:
        setattr(SharedMemory, name, timed(ALL_REDUCES, getattr(SharedMemory, name)))
    for name in ("norm_and_flags", "clip"):
        setattr(Reducer, name, timed("optimizer", getattr(Reducer, name)))
    Optimizer.step = timed("optimizer", Optimizer.step)
    wrapped = {name: timed(part, getattr(ops, name)) for name, part in PARTS.items()}
    return replace(ops, attention=partial(TimedAttention.apply, ops.attention), **wrapped)


def main(model_name: str, precision: str, *changes: str) -> None:
    dist.init_process_group("gloo")
    cell = overrides(MODELS[model_name], precision, Path(load_config([]).data.cache_dir))
    tp = dist.get_world_size()
    config = load_config([*cell, f"parallel.tp={tp}", *changes])
    device = pick_device(config, int(os.environ["LOCAL_RANK"]), tp)
    mesh = connect(tp_grid(tp, tp, kv_heads(config.model)), device, shared=True)
    ops = time_the_parts(choose("cpu", config.train.compile, node_cache()))
    trainer = build(config, mesh, ops)
    initialise(trainer)
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
