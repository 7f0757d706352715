"""Prints the memory table of docs/performance.md: `python -m tests.memory_table`."""

from tptrain.config import load_config
from tptrain.ops.choose import planned
from tptrain.plan.dry_run import dry_run

BASE = ["model=llama3_1b", "train=pretrain"]
ROWS = {
    "": [],
    "sequence parallel": ["parallel.sequence_parallel=true"],
    "selective recomputation": ["train.recompute=selective"],
    "both": ["parallel.sequence_parallel=true", "train.recompute=selective"],
    "full recomputation": ["train.recompute=full"],
    "ZeRO-1 over dp=4": [],
    "float32": ["train.precision=fp32"],
}

if __name__ == "__main__":
    print("| | tp | state | activations | loss, backward | peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, changes in ROWS.items():
        for tp in (1, 2, 4):
            dp, config = 4 if "dp=4" in name else 1, load_config([*BASE, *changes])
            run = dry_run(config, tp, dp, planned(config))
            state = run.weights + run.gradients + run.optimizer
            sizes = (state, run.activations, run.peak - state - run.activations, run.peak)
            print(f"| {name} | {tp} | {' | '.join(f'{size / 2**30:.2f}' for size in sizes)} |")
