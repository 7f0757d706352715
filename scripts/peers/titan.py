# pyright: basic, reportMissingImports=false
# ruff: noqa: E402
"""torchtitan's Llama 3 with its own parallelisation, fed by our loop. SDPA stands in for FlexAttention, which has no
backward pass on CPUs; the rest is as in its registry (fused QKV, rotary positions as complex numbers).

Two of its backends:
- partial_dtensor, through its `parallelize_llama`: TP with sequence parallelism, its default, and FSDP's mixed
  precision (bfloat16 compute over float32 parameters) on a data-parallel mesh of one.
- spmd_types, its default since 0.3: plain local tensors. Its FSDP part needs a newer torch than 2.13, so it is TP alone
  here, all-reducing, which on CPUs is faster than its sequence parallelism; bf16 is torch.autocast.
"""

import sys
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

# Experts' kernels, which import Triton; torch for CPUs comes without it, and nothing here has experts.
sys.modules.setdefault("torchtitan.distributed.minimal_async_ep", MagicMock())

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.llama3 import Llama3Model, parallelize_llama
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.models.llama3.sharding import set_llama3_sharding_config
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

from .cells import ADAM, Job, Model
from .contestant import Contestant, adamw, clip_shards


def build(job: Job) -> Contestant:
    m, plain, device, ranks = job.model, job.options.get("spmd_types", False), job.machine.device, job.machine.ranks
    parallelism = ParallelismConfig(
        tensor_parallel_degree=ranks,
        spmd_backend="spmd_types" if plain else "partial_dtensor",
        enable_sequence_parallel=not plain,
    )
    parallel_dims.device_type = device  # torchtitan means CUDA wherever it finds no accelerator
    dist_utils.set_spmd_backend(parallelism.spmd_backend)
    dims = ParallelDims.from_config(parallelism, world_size=ranks)
    dims.build_mesh()
    in_context = dist_utils.get_spmd_context(parallel_dims=dims)
    config = llama(m)
    set_llama3_sharding_config(config, enable_sp=parallelism.enable_sequence_parallel)
    model = config.build()  # whole, on each rank; parallelising keeps this rank's part
    model.to(device)
    model.init_states(buffer_device=torch.device(device))  # the rotary cache is among the states
    weights = load_file(Path(job.inputs) / "model.safetensors")
    model.load_state_dict(Llama3StateDictAdapter(config, None).from_hf(weights), strict=False)
    if plain:
        with in_context():
            model.parallelize(dims)
    else:
        model = parallelize_llama(
            model,
            parallel_dims=dims,
            training=TrainingConfig(mixed_precision_param="bfloat16" if job.precision == "bf16" else "float32"),
            parallelism=parallelism,
            compile_config=CompileConfig(enable=job.options.get("compile", False)),
            ac_config=None,
            dump_folder="",
        )
    positions = torch.arange(m.seq_len, device=device).expand(m.batch, -1)
    autocast = job.precision == "bf16" and (plain or ranks == 1)  # FSDP's mixed precision needs a mesh
    parameters = list(model.parameters())

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with in_context(), torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(inputs, positions)
        with in_context():
            return cross_entropy_loss(logits, targets, global_vocab_size=m.vocab) / m.tokens

    def backward(total: Tensor) -> None:
        with in_context():
            total.backward()

    def clip() -> None:
        if plain:
            clip_shards(parameters)
        else:
            dist_utils.clip_grad_norm_(parameters, ADAM.clip, foreach=True)

    return Contestant(loss, backward, clip, adamw(parameters))


def llama(m: Model) -> Llama3Model.Config:
    """What torchtitan's registry builds for its own sizes, for ours. The weights are loaded afterwards."""
    any_init = {"weight": partial(nn.init.normal_, std=0.02)}

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=m.hidden, eps=1e-5, param_init={"weight": nn.init.ones_})

    def layer() -> Llama3TransformerBlock.Config:
        return Llama3TransformerBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=make_gqa_config(
                dim=m.hidden,
                n_heads=m.heads,
                n_kv_heads=m.kv_heads,
                wqkv_param_init=any_init,
                wo_param_init=any_init,
                inner_attention=ScaledDotProductAttention.Config(),
                fuse_qkv=True,
                rope=ComplexRoPE.Config(dim=m.head_dim, max_seq_len=m.seq_len, theta=10000, scaling="none"),
            ),
            feed_forward=make_ffn_config(
                dim=m.hidden, hidden_dim=m.ffn, w1_param_init=any_init, w2w3_param_init=any_init
            ),
        )

    return Llama3Model.Config(
        dim=m.hidden,
        vocab_size=m.vocab,
        tok_embeddings=Embedding.Config(num_embeddings=m.vocab, embedding_dim=m.hidden, param_init=any_init),
        norm=norm(),
        lm_head=Linear.Config(in_features=m.hidden, out_features=m.vocab, param_init=any_init),
        layers=[layer() for _ in range(m.layers)],
    )
