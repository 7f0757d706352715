"""Prints the memory table of docs/performance.md: `python -m tests.memory_table`."""

from tests.meta import measure
from tptrain.config import load_config
from tptrain.config.sizes import rank_memory

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
    print("| | tp | state | activations | loss | closed form | measured | |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, changes in ROWS.items():
        for tp in (1, 2, 4):
            dp = 4 if "dp=4" in name else 1
            config = load_config([*BASE, *changes])
            parts = rank_memory(config, tp, dp)
            state = parts["weights"] + parts["gradients"] + parts["optimizer"]
            whole, found = sum(parts.values()), measure(config, tp, dp).peak
            sizes = (state, parts["activations"], parts["loss"], whole, found)
            cells = " | ".join(f"{size / 2**30:.2f}" for size in sizes)
            print(f"| {name} | {tp} | {cells} | {found / whole - 1:+.1%} |")
