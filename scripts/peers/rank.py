"""One rank of a peer: `python -m peers.rank JOB.json`, under torchrun's variables (RANK, MASTER_ADDR, ...)."""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .cells import Job
from .contestant import Contestant
from .ours_profiled import Ours
from .profiled import collective_share

PROFILED_STEPS = 3


def main() -> None:
    job = Job.read(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if job.machine.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if job.machine.device == "cuda" else "gloo")
    contestant = importlib.import_module(f".{job.module}", __package__).build(job)
    tokens = torch.from_numpy(np.load(Path(job.inputs) / "tokens.npy")).to(job.machine.device)  # (steps, B, T + 1)
    result = profile(contestant, tokens) if job.profile else train(contestant, tokens[: job.steps])
    if dist.get_rank() == 0:
        Path(job.result).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def train(contestant: Contestant | Ours, tokens: Tensor) -> dict[str, object]:
    losses, seconds, first = [], [], 0.0
    for ids in tokens:
        began = time.perf_counter()
        losses.append(contestant.step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
        seconds.append(time.perf_counter() - began)
        first = first or time.time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
    if tokens.is_cuda:
        memory = torch.cuda.max_memory_allocated() / 2**30
    return {"losses": losses, "seconds": seconds, "first_step_at": first, "memory_gb": memory}


def profile(contestant: Contestant | Ours, tokens: Tensor) -> dict[str, object]:
    """The share of a step's time in which gloo has a collective of this rank under way."""

    def one(ids: Tensor) -> None:
        contestant.step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    for ids in tokens[:2]:
        one(ids)
    return {"communication": collective_share(lambda: [one(ids) for ids in tokens[2 : 2 + PROFILED_STEPS]])}


if __name__ == "__main__":
    main()
