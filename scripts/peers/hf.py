# pyright: basic, reportMissingImports=false, reportPrivateImportUsage=false
"""Hugging Face Transformers: LlamaForCausalLM with its own TP plan (`tp_plan="auto"`) and SDPA attention.

bf16 is torch.autocast over float32 parameters, as Transformers' Trainer does with bf16=True.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from .cells import Job
from .contestant import Contestant, adamw, clip


def build(job: Job) -> Contestant:
    # The spelling of tp_plan="auto" since Transformers 5.18; the bare argument is deprecated.
    model = LlamaForCausalLM.from_pretrained(
        job.inputs,
        distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"),
        attn_implementation="sdpa",
        dtype=torch.float32,
    ).train()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16"):
            return model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss

    return Contestant(loss, lambda total: total.backward(), lambda: clip(model.parameters()), adamw(model.parameters()))
