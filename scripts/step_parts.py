"""Where a step's time goes, on two cores of a CPU:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 torchrun --standalone --nproc-per-node 2 scripts/step_parts.py [OVERRIDE ...]

Milliseconds of rank 0 by part, from torch's profiler over a few steps of the real trainer at tp=2; the default model is
the S of `scripts/bench`. The first three parts are the floor of a step that uses these kernels: it takes at least as
long as its matrix products, attention and all-reduces. What the profiler costs goes to the rest.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from tptrain import fused
from tptrain.attention import _Attention
from tptrain.config import UserError, load_config
from tptrain.config.schema import kv_heads
from tptrain.mesh import make_mesh, pick_device
from tptrain.optim import Optimizer
from tptrain.shared_memory import SharedMemory
from tptrain.train import build

WARMUP, STEPS = 6, 5
S = ["model.hidden_size=256", "model.intermediate_size=688", "model.vocab_size=4096", "train.seq_len=256"]
S += ["model.num_hidden_layers=4", "model.num_attention_heads=8", "model.num_key_value_heads=4"]
BATCH = ["train.global_batch_size=8", "train.micro_batch_size=8", "optim=constant", "train.compile=elementwise"]

FLOOR = ("matrix products", "attention", "all-reduces")
# The part of an event is that of the innermost of its callers, itself included, whose name begins with one of these.
PARTS = {
    "aten::mm": "matrix products",
    "aten::addmm_": "matrix products",
    "aten::_scaled_dot_product": "attention",
    "attention": "attention",
    "all-reduces": "all-reduces",
    "norms": "norms, residual stream",
    "gate": "activation",
    "rotary": "rotary",
    "loss": "loss without products",
    "optimizer": "optimizer",
}
FUSED = {
    "rms_norm": "norms",
    "rms_norm_backward": "norms",
    "add_rms_norm": "norms",
    "add_rms_norm_backward": "norms",
    "gate_product": "gate",
    "_gated_backward": "gate",
    "_rotate_qkv": "rotary",
    "_rotate_qkv_backward": "rotary",
    "statistics": "loss",
    "logit_gradient": "loss",
}


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            result = function(*arguments, **options)
        return named(name, result) if name == "all-reduces" and callable(result) else result  # what finishes it

    return call


def part(event: Any) -> str:
    while event is not None:
        for beginning, name in PARTS.items():
            if event.name.startswith(beginning):
                return name
        event = event.cpu_parent
    return "the rest"


def main(overrides: list[str]) -> None:
    dist.init_process_group("gloo")
    config = load_config([*S, *BATCH, "parallel.tp=2", "train.device=cpu", *overrides])
    device = pick_device(config, int(os.environ["LOCAL_RANK"]), 2)
    mesh = make_mesh(2, kv_heads(config.model), device, shared=True)
    for name, label in FUSED.items():
        setattr(fused, name, named(label, getattr(fused, name)))
    for name in ("all_reduce", "all_reduce_", "all_gather", "reduce_scatter"):
        setattr(SharedMemory, name, named("all-reduces", getattr(SharedMemory, name)))
    for name in ("norm", "clip", "step"):
        setattr(Optimizer, name, named("optimizer", getattr(Optimizer, name)))
    _Attention.backward = staticmethod(named("attention", _Attention.backward))
    trainer = build(config, mesh)
    for step in range(1, WARMUP + 1):
        trainer.step(step)
    with profile(activities=[ProfilerActivity.CPU]) as profiled, record_function("steps"):
        for step in range(WARMUP + 1, WARMUP + STEPS + 1):
            trainer.step(step)
    taken: Counter[str] = Counter()
    for event in profiled.events() or []:
        taken[part(event)] += event.self_cpu_time_total / 1000 / STEPS
    if mesh.is_main:
        rest = taken.pop("the rest")
        for name, each in [*taken.most_common(), ("the rest", rest)]:
            print(f"{name:24} {each:8,.1f} ms")
        floor = sum(taken[name] for name in FLOOR)
        print(f"{'step':24} {taken.total() + rest:8,.1f} ms, of which the first three take {floor:,.1f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
