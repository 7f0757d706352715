"""Does cost grow as it should? `python scripts/scaling.py fit` and `python scripts/scaling.py growth [STEPS]`.

One rank on this machine's CPU, one thread. `fit` times a step of models of many sizes, varied one size at a time, and
fits

    seconds = FLOPs / rate + bytes of activations / bandwidth + parameters x constant

to all of them by least squares: a term that the closed forms do not have would show in the last column. `growth` does
10,000 short steps and prints after each thousand: step time, resident memory, tensors alive.
"""

import gc
import resource
import sys
import tempfile
import time
from statistics import median

import numpy as np
import psutil
import torch

from tptrain.config import load_config
from tptrain.models.sizes import sizes as sizes_of
from tptrain.ops.choose import choose
from tptrain.ops.node_cache import node_cache
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import tp_grid
from tptrain.plan.dry_run import dry_run
from tptrain.train.trainer import Trainer, build, initialise

BASE = {"num_hidden_layers": 4, "hidden_size": 256, "seq_len": 256, "micro_batch_size": 4}
VARIED = {
    "num_hidden_layers": (2, 8, 16),
    "hidden_size": (128, 512, 768),
    "seq_len": (128, 512, 1024),
    "micro_batch_size": (2, 8, 16),
}


def trainer(sizes: dict[str, int], folder: str) -> Trainer:
    """A model of these sizes, heads of 32 and an FFN of 2.75 hidden, on the embedded data."""
    settings = [
        f"{'train' if key in ('seq_len', 'micro_batch_size') else 'model'}.{key}={n}" for key, n in sizes.items()
    ]
    hidden = sizes["hidden_size"]
    settings += [
        f"model.num_attention_heads={hidden // 32}",
        "model.num_key_value_heads=null",
        f"model.intermediate_size={hidden * 11 // 4}",
    ]
    settings += [f"train.global_batch_size={sizes['micro_batch_size']}", f"run.dir={folder}", "train.device=cpu"]
    config = load_config(settings)
    ops = choose("cpu", config.train.compile, node_cache())
    trainer = build(config, connect(tp_grid(1, 1, 1), torch.device("cpu")), ops)
    initialise(trainer)
    return trainer


def seconds(subject: Trainer, steps: int = 5) -> float:
    times = []
    for step in range(1, steps + 3):
        began = time.perf_counter()
        subject.step(step)
        times.append(time.perf_counter() - began)
    return median(times[2:])


def fit(folder: str) -> None:
    cases = [BASE, *({**BASE, key: n} for key, values in VARIED.items() for n in values)]
    rows, measured = [], []
    for sizes in cases:
        subject = trainer(sizes, folder)
        train = subject.config.train
        tokens = train.global_batch_size * train.seq_len
        flops = sizes_of(subject.config.model).flops_per_token(train.seq_len) * tokens
        run = dry_run(subject.config, 1, 1, subject.loss.ops)
        rows.append((flops, run.activations, run.parameters))
        measured.append(seconds(subject))
    design, target = np.array(rows), np.array(measured)
    scaled = design / target[:, None]  # relative errors count
    fitted, *_ = np.linalg.lstsq(scaled, np.ones(len(target)), rcond=None)
    rates = [1e-9 / each for each in fitted[:2]]
    print(f"{rates[0]:.0f} GFLOP/s, {rates[1]:.2f} GB/s of activations, {fitted[2] * 1e9:.1f} ns a parameter")
    print("| layers | hidden | sequence | batch | GFLOPs | ms | fitted | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for sizes, row, took in zip(cases, design, target, strict=True):
        predicted = float(row @ fitted)
        cells = " | ".join(str(n) for n in sizes.values())
        print(
            f"| {cells} | {row[0] / 1e9:.1f} | {took * 1e3:.0f} | {predicted * 1e3:.0f} | {took / predicted - 1:+.0%} |"
        )


def growth(folder: str, steps: int) -> None:
    subject = trainer({**BASE, "num_hidden_layers": 2, "hidden_size": 64, "seq_len": 32, "micro_batch_size": 1}, folder)
    block = steps // 10
    print("| steps | ms a step | resident MiB | peak MiB | tensors |")
    print("| --- | --- | --- | --- | --- |")
    times = []
    for step in range(1, steps + 1):
        began = time.perf_counter()
        subject.step(step)
        times.append(time.perf_counter() - began)
        if step % block == 0:
            resident = psutil.Process().memory_info().rss / 2**20
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
            print(f"| {step:,} | {median(times) * 1e3:.2f} | {resident:.1f} | {peak:.1f} | {tensors} |", flush=True)
            times.clear()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        if sys.argv[1:2] == ["growth"]:
            growth(place, int(sys.argv[2]) if len(sys.argv) > 2 else 10_000)
        elif sys.argv[1:] == ["fit"]:
            fit(place)
        else:
            sys.exit(__doc__)
