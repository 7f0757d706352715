"""A small Hugging Face model of every native family, with every kind of layer that the family has."""

from typing import Any

from tests.reference import VOCAB, Case
from tptrain.config import ModelConfig

LLAMA = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SMALL = {
    "vocab_size": VOCAB,  # no multiple of the padding
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # fewer than ranks at tp=4
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "pad_token_id": None,  # Transformers gives the embedding of this token no gradient; here no token is padding
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 9  # tokens, of a sequence of 24
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


def case_of(family: str, **changes: Any) -> Case:
    source = {"model_type": family, **SMALL, **changes}
    source = {name: value for name, value in source.items() if value is not ...}
    return Case(family, ModelConfig(path="DIR", source=source))


def _rope(kind: str, **changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **changes}}


# Llama, Qwen3 without windows and GPT-2 are compared with Transformers in test_parity.py, at more topologies.
ELSEWHERE = ("llama", "llama, biases, tied", "llama, llama3", "qwen3", "gpt2")
FAMILIES = {
    "llama": case_of("llama"),
    "llama, biases, tied": case_of("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, llama3": case_of("llama", rope_parameters=LLAMA | {"original_max_position_embeddings": 16}),
    "llama, yarn": case_of("llama", rope_parameters=YARN),
    "llama, linear": case_of("llama", **_rope("linear", factor=4.0)),
    "llama, dynamic": case_of("llama", max_position_embeddings=16, **_rope("dynamic", factor=4.0)),
    "qwen2": case_of("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": case_of("qwen3", head_dim=16),
    "mistral": case_of("mistral", sliding_window=WINDOW),
    "phi3": case_of("phi3"),
    "phi3, longrope": case_of(
        "phi3",
        original_max_position_embeddings=16,
        **_rope("longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 2.2, 2.5, 3.0]),
    ),
    "gemma2": case_of(
        "gemma2",
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": case_of(
        "gemma3_text",
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        },
    ),
    "olmo2": case_of("olmo2"),
    "olmo3": case_of(
        "olmo3",
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": YARN},
    ),
    "smollm3": case_of("smollm3", no_rope_layers=[1, 0]),
    "gpt_neox": case_of("gpt_neox", num_key_value_heads=..., **_rope("default", partial_rotary_factor=0.5)),
    "gpt_neox, serial": case_of("gpt_neox", num_key_value_heads=..., use_parallel_residual=False),
    "gpt2": Case(
        "gpt2",
        ModelConfig(
            path="DIR",
            dropout=0.0,
            source={
                "model_type": "gpt2",
                "vocab_size": VOCAB,
                "n_embd": 64,
                "n_layer": 2,
                "n_head": 8,
                "n_positions": 64,
            },
        ),
    ),
    "granite": case_of(
        "granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
}
