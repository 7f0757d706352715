"""How fast one rank computes its shard: `python scripts/shard_speed.py [OVERRIDE ...]`, on one device.

Steps of tp rank 0 at tp = 1, 2, 4, 8, one after another, with every collective of the TP group left out: so the losses
mean nothing, and the times are those of the compute alone, which no network can make shorter. A shard at tp has 1/tp of
the matrix products and all of what is not sharded (norms, residual additions, launches of kernels); efficiency is the
time at tp=1 over tp times the time at tp.

On CUDA the default is model=llama3_1b, one sequence of 4,096 tokens, bf16; on a CPU, a model that suits it. MFU counts
6 FLOPs for a weight and token and 12 L H d T for attention (PaLM, arXiv:2204.02311), over the device's peak if known.
"""

import sys
import time
from dataclasses import replace
from statistics import median

import torch

from tptrain.config import UserError, load_config
from tptrain.models.settings import decoder_spec
from tptrain.ops.choose import choose
from tptrain.ops.node_cache import node_cache
from tptrain.parallel.mesh import Mesh, tp_grid
from tptrain.plan.report import tp_degrees
from tptrain.train.metrics import memory_gb, peak_flops
from tptrain.train.trainer import build, initialise

WARMUP, STEPS = 3, 10
GPU = ["model=llama3_1b", "train.seq_len=4096", "train.precision=bf16"]
CPU = ["model.hidden_size=512", "model.intermediate_size=1376", "model.vocab_size=8192", "train.seq_len=512"]
DATA = ["data=stdlib", "data.tokenizer=bytes"]
BOTH = [*DATA, "train.global_batch_size=1", "train.micro_batch_size=1", "optim=constant", "optim.warmup_steps=0"]


def main(overrides: list[str]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config([*BOTH, *(GPU if device.type == "cuda" else CPU), *overrides])
    train = config.train
    tokens = train.global_batch_size * train.seq_len
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{config.model.name}, {tokens:,} tokens a step, {train.precision}, {name}, torch {torch.__version__}")
    print("no communication between ranks: what one rank computes, and no more")
    peak, alone = peak_flops(device, train.precision), 0.0
    flops = decoder_spec(config.model).flops_per_token(train.seq_len) * tokens
    ops = choose(device.type, train.compile, node_cache())
    for tp in tp_degrees(config.model)[0]:
        if tp > 8:
            break
        group = replace(config, parallel=replace(config.parallel, tp=tp))
        # The first rank of a grid without groups: it communicates with nobody.
        trainer = build(group, Mesh(tp_grid(tp, tp, decoder_spec(config.model).kv_heads), 0, device), ops)
        initialise(trainer)
        seconds = []
        for step in range(1, WARMUP + STEPS + 1):
            began = time.perf_counter()
            loss, _ = trainer.step(step)
            loss.item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        took, parts = median(seconds[WARMUP:]), flops / tp
        alone = alone or took
        mfu = f"MFU {parts / took / peak:.1%}, " if peak else ""
        print(
            f"tp={tp}: {1000 * took:,.1f} ms, {parts / took / 1e12:,.3f} TFLOP/s, {mfu}"
            f"efficiency {alone / (tp * took):.2f}, {memory_gb(device):.2f} GiB",
            flush=True,
        )
        del trainer


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
