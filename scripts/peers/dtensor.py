# pyright: basic
"""PyTorch's own tensor parallelism: `parallelize_module` on DTensor, loss parallel; eager, compiled, or with
sequence parallelism. bf16 is torch.autocast over float32 parameters, which is what PyTorch's documentation recommends
for mixed precision.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from .cells import Job
from .contestant import Contestant, adamw, clip
from .llama import Llama


def build(job: Job) -> Contestant:
    model = Llama(job.model)
    weights = load_file(Path(job.inputs) / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    model.to(job.machine.device)
    if job.machine.ranks > 1:  # else it is plain PyTorch
        mesh = init_device_mesh(job.machine.device, (job.machine.ranks,))
        shard(model, mesh, sequence=job.options.get("sequence", False))
    if job.options.get("compile"):
        model.compile()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(job.machine.device, torch.bfloat16, enabled=job.precision == "bf16"):
            logits = model(inputs)  # (B, T, V) as a DTensor that is sharded over the vocabulary
        with loss_parallel():
            return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def backward(loss: Tensor) -> None:
        with loss_parallel():  # its backward needs the context too
            loss.backward()

    return Contestant(loss, backward, lambda: clip(model.parameters()), adamw(model.parameters()))


def shard(model: Llama, mesh, *, sequence: bool) -> None:
    """The plan of PyTorch's tutorial. The input of attention and FFN becomes a DTensor once, not once for each linear:
    so their input gradients are summed before the one all-reduce (or reduce-scatter).
    """
    outside = Shard(1) if sequence else Replicate()  # of activations between the blocks

    def entry(others: int) -> PrepareModuleInput:
        rest = (None,) * others
        return PrepareModuleInput(
            input_layouts=(outside, *rest), desired_input_layouts=(Replicate(), *rest), use_local_output=False
        )

    plan: dict = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "lm_head": ColwiseParallel(input_layouts=outside, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        plan["norm"] = SequenceParallel()
    parallelize_module(model, mesh, plan)
    for layer in model.layers:
        plan = {
            "self_attn": entry(1),
            "self_attn.q_proj": ColwiseParallel(),
            "self_attn.k_proj": ColwiseParallel(),
            "self_attn.v_proj": ColwiseParallel(),
            "self_attn.o_proj": RowwiseParallel(output_layouts=outside),
            "mlp": entry(0),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(output_layouts=outside),
        }
        if sequence:
            plan |= {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel()}
        parallelize_module(layer, mesh, plan)
