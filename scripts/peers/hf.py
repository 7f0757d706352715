# pyright: basic, reportMissingImports=false, reportPrivateImportUsage=false
"""Hugging Face Transformers: AutoModelForCausalLM with its own TP plan (`tp_plan="auto"`, where there are ranks to
shard it over) and SDPA attention; eager or compiled. Gemma 2 has eager attention: SDPA leaves out its soft caps.

bf16 is torch.autocast over float32 parameters, as Transformers' Trainer does with bf16=True.
"""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from .cells import Job
from .contestant import Contestant, adamw, clip


def build(job: Job) -> Contestant:
    ranks, device = job.machine.ranks, job.machine.device
    # The spelling of tp_plan="auto" since Transformers 5.18; the bare argument is deprecated.
    model = AutoModelForCausalLM.from_pretrained(
        job.inputs,
        distributed_config=DistributedConfig(tp_size=ranks, tp_plan="auto") if ranks > 1 else None,
        attn_implementation="eager" if job.model.family == "gemma2" else "sdpa",
        dtype=torch.float32,
    )
    model = torch.nn.Module.to(model, device).train()
    if job.options.get("compile"):
        model.compile()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=job.precision == "bf16"):
            return model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss

    return Contestant(loss, lambda total: total.backward(), lambda: clip(model.parameters()), adamw(model.parameters()))
