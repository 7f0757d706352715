"""Llama 2, 3, 3.x, SmolLM2 (transformers' LlamaForCausalLM): RMSNorm, rotary positions, GQA, SwiGLU."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tptrain.models.families.fields import Fields
from tptrain.models.families.keys import ATTENTION_BIASES, FFN_BIASES, LAYER, Key, named
from tptrain.models.families.parts import attention, decoder, ffn, rms_norm, rotary
from tptrain.models.spec import DecoderSpec, LayerSpec, Llama3Scaling


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json."""
    fields.ignore(pretraining_tp="a way to compute, not what is computed")
    norm, bias = rms_norm(fields, 1e-6), fields.get("attention_bias", bool, False)
    mixer = attention(fields, qkv_bias=bias, output_bias=bias, rotary=rotary(fields))
    layer = LayerSpec(norm, mixer, ffn(fields, bias=fields.get("mlp_bias", bool, False)))
    return decoder(fields, (layer,) * fields.count("num_hidden_layers"), norm, tied=False)


def to_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a decoder that was trained from scratch."""
    return common_config(spec) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": spec.layers[0].channel_mixer.bias,
    }


def common_config(spec: DecoderSpec) -> dict[str, Any]:
    """The fields that families after Llama's model share."""
    attention, ffn = spec.layers[0].token_mixer, spec.layers[0].channel_mixer
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": attention.rotary.theta}
    if isinstance(scaling := attention.rotary.scaling, Llama3Scaling):
        rope |= {"rope_type": "llama3", **asdict(scaling)}
        rope["original_max_position_embeddings"] = rope.pop("context")
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
    attention_biases = ATTENTION_BIASES if attention.qkv_bias else {}
    return named(spec, LAYER | attention_biases | (FFN_BIASES if ffn.bias else {}))
