"""The time of a step's matrix products alone: `python -m peers.limit MODEL PRECISION RESULT.json`.

The linears of one rank's shard at TP=2, with the shapes of the step: forward, input gradient, weight gradient. Run in
two processes at once, one thread each, so that the machine's cores and memory are as busy as in training. Attention's
own products, the norms and everything else are left out: no trainer can be as fast as this.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import MODELS, RANKS, Model

SECONDS = 4.0


def shapes(m: Model) -> list[tuple[int, int]]:
    """(outputs, inputs) of each linear of a rank."""
    heads, kv, ffn = m.heads * m.head_dim // RANKS, m.kv_heads * m.head_dim // RANKS, m.ffn // RANKS
    layer = [(heads, m.hidden), (kv, m.hidden), (kv, m.hidden), (m.hidden, heads)]
    layer += [(ffn, m.hidden), (ffn, m.hidden), (m.hidden, ffn)]
    return layer * m.layers + [(m.vocab // RANKS, m.hidden)]


def once(weights: list[Tensor], inputs: dict[int, Tensor], grads: dict[int, Tensor]) -> float:
    """Seconds of one step's products."""
    began = time.perf_counter()
    for weight in weights:
        F.linear(inputs[weight.shape[1]], weight)
    for weight in reversed(weights):
        grad = grads[weight.shape[0]]
        torch.mm(grad, weight)
        torch.mm(grad.t(), inputs[weight.shape[1]])
    return time.perf_counter() - began


@torch.no_grad()
def main(model: Model, precision: str, result: Path) -> None:
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = [torch.randn(shape, dtype=dtype) * 0.02 for shape in shapes(model)]
    inputs = {n: torch.randn(model.tokens, n, dtype=dtype) for n in {w.shape[1] for w in weights}}
    grads = {n: torch.randn(model.tokens, n, dtype=dtype) for n in {w.shape[0] for w in weights}}
    once(weights, inputs, grads)
    seconds = []
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS or len(seconds) < 3:
        seconds.append(once(weights, inputs, grads))
    result.write_text(json.dumps(sorted(seconds)[len(seconds) // 2]))


if __name__ == "__main__":
    main(MODELS[sys.argv[1]], sys.argv[2], Path(sys.argv[3]))
