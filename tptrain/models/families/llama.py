"""Llama (transformers' LlamaForCausalLM): RMSNorm, rotary positions, GQA, SwiGLU."""

from collections.abc import Iterator
from typing import Any

from tptrain.models.families.keys import Key, prefixed
from tptrain.models.spec import AttentionSpec, DecoderSpec, FFNSpec, LayerSpec, NormSpec, RotarySpec

LAYER = ["input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]
LAYER += ["self_attn.o_proj.weight", "post_attention_layernorm.weight"]
LAYER += ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def to_spec(config: dict[str, Any]) -> DecoderSpec:
    """The decoder of a config.json."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    norm = NormSpec("rmsnorm", config["rms_norm_eps"])
    attention = AttentionSpec(
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        qkv_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        rotary=rotary(config),
    )
    ffn = FFNSpec(config["intermediate_size"], config["hidden_act"], bias=config.get("mlp_bias", False))
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        layers=(LayerSpec(norm, attention, ffn),) * config["num_hidden_layers"],
        norm=norm,
        tied=config.get("tie_word_embeddings", False),
        max_positions=config["max_position_embeddings"],
        std=config.get("initializer_range", 0.02),
    )


def rotary(config: dict[str, Any]) -> RotarySpec:
    """Both spellings: `rope_parameters`, and the older `rope_theta` with `rope_scaling`."""
    rope = config.get("rope_parameters") or (config.get("rope_scaling") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    scaled = rope.get("rope_type", "default") == "llama3"
    return RotarySpec(theta, tuple(rope[name] for name in SCALING) if scaled else None)  # type: ignore[arg-type]


def to_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a decoder."""
    return common_config(spec) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": spec.layers[0].channel_mixer.bias,
    }


def common_config(spec: DecoderSpec) -> dict[str, Any]:
    """The fields that families after Llama's model share."""
    attention, ffn = spec.layers[0].token_mixer, spec.layers[0].channel_mixer
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": attention.rotary.theta}
    if attention.rotary.scaling is not None:
        rope |= {"rope_type": "llama3", **dict(zip(SCALING, attention.rotary.scaling, strict=True))}
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": ffn.width,
        "hidden_act": ffn.act,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm.eps,
        "rope_parameters": rope,
        "attention_bias": attention.qkv_bias,
        "tie_word_embeddings": spec.tied,
        "initializer_range": spec.std,
    }


def keys(spec: DecoderSpec) -> Iterator[Key]:
    attention, ffn = spec.layers[0].token_mixer, spec.layers[0].channel_mixer
    names = list(LAYER)
    if attention.qkv_bias:
        names += [f"self_attn.{name}_proj.bias" for name in "qkvo"]
    if ffn.bias:
        names += [f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")]
    return prefixed(spec, names)
