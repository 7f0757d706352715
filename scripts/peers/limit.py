"""The time of a step's matrix products alone: `python -m peers.limit MODEL PRECISION DEVICE RANKS RESULT.json`.

The linears of one rank's shard, with the shapes of the step: forward, input gradient, weight gradient. Run in as many
processes at once as there are ranks, so that the machine's cores and memory are as busy as in training. Attention's
own products, the norms and everything else are left out: no trainer can be as fast as this.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import MODELS, Machine, Model

SECONDS = 4.0


def shapes(m: Model, ranks: int) -> list[tuple[int, int]]:
    """(outputs, inputs) of each linear of a rank."""
    heads, kv, ffn = m.heads * m.head_dim // ranks, m.kv_heads * m.head_dim // ranks, m.ffn // ranks
    layer = [(heads, m.hidden), (kv, m.hidden), (kv, m.hidden), (m.hidden, heads)]
    layer += [(ffn, m.hidden), (ffn, m.hidden), (m.hidden, ffn)]
    return layer * m.layers + [(m.vocab // ranks, m.hidden)]


def once(weights: list[Tensor], inputs: dict[int, Tensor], grads: dict[int, Tensor]) -> float:
    """Seconds of one step's products."""
    began = time.perf_counter()
    for weight in weights:
        F.linear(inputs[weight.shape[1]], weight)
    for weight in reversed(weights):
        grad = grads[weight.shape[0]]
        torch.mm(grad, weight)
        torch.mm(grad.t(), inputs[weight.shape[1]])
    if weights[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def main(model: Model, precision: str, machine: Machine, result: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_device(machine.device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = [torch.randn(shape, dtype=dtype) * 0.02 for shape in shapes(model, machine.ranks)]
    inputs = {n: torch.randn(model.tokens, n, dtype=dtype) for n in {w.shape[1] for w in weights}}
    grads = {n: torch.randn(model.tokens, n, dtype=dtype) for n in {w.shape[0] for w in weights}}
    once(weights, inputs, grads)
    seconds = []
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS or len(seconds) < 3:
        seconds.append(once(weights, inputs, grads))
    result.write_text(json.dumps(sorted(seconds)[len(seconds) // 2]))


if __name__ == "__main__":
    main(MODELS[sys.argv[1]], sys.argv[2], Machine(sys.argv[3], int(sys.argv[4])), Path(sys.argv[5]))
