"""Models of Transformers at a width of 256, by family, which `verify.width` makes narrower."""

from typing import Any

from tptrain.config import Config, ModelConfig
from tptrain.config.schema import ParallelConfig, VerifyConfig

TP, VOCAB = 2, 256
LAYERS = {"vocab_size": VOCAB, "max_position_embeddings": 64}
WIDE = {**LAYERS, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_n_groups": 2, "mamba_chunk_size": 16}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 12, "long_factor": [2.0] * 12}
LONG |= {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64, "factor": 2.0}
PADDED = {"pad_token_id": 0}
# Models of a width of 256, by family; what differs from the sizes of `WIDE`.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "qwen3": {"head_dim": 64},
    "mixtral": {"num_local_experts": 4, "head_dim": None},
    "deepseek_v3": EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 8},
    "gemma3_text": {"head_dim": 64, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9},
    "gemma4_text": PADDED | {"head_dim": 64, "global_head_dim": 128, "hidden_size_per_layer_input": 0},
    "gpt2": {"intermediate_size": ..., "n_inner": None},
    "gpt_neox": {"num_key_value_heads": ...},
    "qwen3_next": EXPERTS | LINEAR | {"num_experts": 4, "shared_expert_intermediate_size": 128, "head_dim": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 1024},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 512, "head_dim": 32},
    "phi3": PADDED | {"rope_parameters": LONG, "original_max_position_embeddings": 64, "max_position_embeddings": 128},
    "cohere": PADDED | {"logit_scale": 0.1},
}
LAYERS_OF = {"gemma3_text": 2, "gemma4_text": 6, "qwen3_next": 4}
WIDTH = 64  # a quarter


def source(family: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    sizes = WIDE | {"num_hidden_layers": LAYERS_OF.get(family, 2)} | MODELS[family]
    values: dict[str, Any] = {name: value for name, value in sizes.items() if value is not ...}
    return CONFIG_MAPPING[family](**values).to_dict()


def config(family: str, width: int | None = WIDTH, **changes: Any) -> Config:
    from tptrain.hf.resolve import resolve, resolve_cut

    model = ModelConfig(path="DIR", engine="transformers", source=source(family) | changes, dropout=0.0)
    model.facts = resolve(None, model.source, {}, 0.0, TP)
    model.facts["cut"] = resolve_cut(model.source, {}, 0.0, None, width, TP)
    return Config(model=model, parallel=ParallelConfig(tp=TP), verify=VerifyConfig(weights="random", width=width))
