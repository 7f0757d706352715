# pyright: basic, reportMissingImports=false, reportPrivateImportUsage=false
"""Megatron-core's GPTModel with its local layer spec (no Transformer Engine, no Apex: neither exists for CPUs).
Without them it has no sequence parallelism: its torch norm refuses it.

bf16 is Megatron's own recipe: bfloat16 parameters and gradients, with float32 masters that the optimizer steps. Its
optimizer class takes CUDA tensors only, so the masters are kept here, in the same order of copy, clip, step, copy back.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from .cells import Job, Model
from .contestant import Contestant, adamw, clip_shards


class SDPA(nn.Module):
    """In place of Megatron's unfused attention, which writes out the (T, T) scores."""

    def __init__(self, config: TransformerConfig, **_) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_, **__) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # (T, B, heads, d) -> (B, heads, T, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.permute(2, 0, 1, 3).flatten(2)  # (T, B, heads * d)


def build(job: Job) -> Contestant:
    if job.machine.device == "cpu":
        torch.cuda.current_device = lambda: torch.device("cpu")  # Megatron asks it where to put its buffers
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=job.machine.ranks)
    initialize_rng_tracker(inference_rng_tracker=True)  # the tracker that does nothing: there is no dropout
    m, bf16 = job.model, job.precision == "bf16"
    config = TransformerConfig(
        num_layers=m.layers,
        hidden_size=m.hidden,
        ffn_hidden_size=m.ffn,
        num_attention_heads=m.heads,
        num_query_groups=m.kv_heads,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=job.machine.ranks,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if job.options.get("sdpa"):
        spec.submodules.self_attention.submodules.core_attention = SDPA
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=m.vocab,
        max_sequence_length=m.seq_len,
        position_embedding_type="rope",
        rotary_base=10000,
    )
    if bf16:
        model.bfloat16()
    load(model, m, load_file(Path(job.inputs) / "model.safetensors"))
    mask = torch.ones(m.seq_len, m.seq_len, dtype=torch.bool).triu(1)[None, None]  # True: not attended to
    positions = torch.arange(m.seq_len).expand(m.batch, -1)
    updates = Updates(model, bf16)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return model(inputs, positions, mask, labels=targets).float().mean()

    return Contestant(loss, lambda total: total.backward(), updates.clip, updates)


def load(model: nn.Module, m: Model, weights: dict[str, Tensor]) -> None:
    """This rank's part, in Megatron's layout: q, k, v of a KV head side by side, gate over up."""
    rank, ranks, d, own = dist.get_rank(), dist.get_world_size(), m.head_dim, {}

    def rows(weight: Tensor) -> Tensor:
        return weight.chunk(ranks)[rank]

    for layer in range(m.layers):
        hf, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        q, k, v = (
            weights[f"{hf}self_attn.{x}_proj.weight"].view(m.kv_heads, -1, d, m.hidden) for x in "qkv"
        )  # each (KV heads, heads of it, d, hidden)
        own[f"{ours}self_attention.linear_qkv.weight"] = rows(torch.cat([q, k, v], 1)).reshape(-1, m.hidden)
        gate, up = (rows(weights[f"{hf}mlp.{x}_proj.weight"]) for x in ("gate", "up"))
        own[f"{ours}mlp.linear_fc1.weight"] = torch.cat([gate, up])
        own[f"{ours}mlp.linear_fc2.weight"] = weights[f"{hf}mlp.down_proj.weight"].chunk(ranks, 1)[rank]
        own[f"{ours}self_attention.linear_proj.weight"] = weights[f"{hf}self_attn.o_proj.weight"].chunk(ranks, 1)[rank]
        own[f"{ours}input_layernorm.weight"] = weights[f"{hf}input_layernorm.weight"]
        own[f"{ours}pre_mlp_layernorm.weight"] = weights[f"{hf}post_attention_layernorm.weight"]
    own["embedding.word_embeddings.weight"] = rows(weights["model.embed_tokens.weight"])
    own["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
    own["output_layer.weight"] = rows(weights["lm_head.weight"])
    named = dict(model.named_parameters())
    assert named.keys() == own.keys(), named.keys() ^ own.keys()
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(own[name])


class Updates:
    """AdamW on float32 masters (the parameters themselves in fp32), after clipping by the norm over both ranks."""

    def __init__(self, model: nn.Module, bf16: bool) -> None:
        self.parameters = list(model.parameters())
        self.masters = [nn.Parameter(p.detach().float()) for p in self.parameters] if bf16 else self.parameters
        self.adam = adamw(self.masters)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def clip(self) -> None:
        if self.masters is not self.parameters:
            for master, p in zip(self.masters, self.parameters, strict=True):
                assert p.grad is not None
                master.grad = p.grad.float()
        clip_shards(self.masters)

    def step(self) -> None:
        self.adam.step()
        if self.masters is not self.parameters:
            torch._foreach_copy_([p.data for p in self.parameters], [p.data for p in self.masters])
