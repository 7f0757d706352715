"""Qwen3 (transformers' Qwen3ForCausalLM): Llama with RMSNorm over each head's query and key."""

from collections.abc import Iterator
from typing import Any

from tptrain.models.families import llama
from tptrain.models.families.fields import Fields
from tptrain.models.families.keys import ATTENTION_BIASES, LAYER, QK_NORMS, Key, named
from tptrain.models.families.parts import attention, decoder, ffn, rms_norm, rotary
from tptrain.models.families.qwen2 import windows
from tptrain.models.spec import DecoderSpec, LayerSpec


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json."""
    norm, bias = rms_norm(fields, 1e-6), fields.get("attention_bias", bool, False)
    position, feedforward = rotary(fields), ffn(fields)

    def layer(window: int | None) -> LayerSpec:
        settings: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, "qk_norm": norm, "rotary": position}
        return LayerSpec(norm, attention(fields, head_dim=128, window=window, **settings), feedforward)

    return decoder(fields, tuple(layer(window) for window in windows(fields)), norm, tied=False)


def to_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a decoder that was trained from scratch."""
    return llama.common_config(spec) | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def keys(spec: DecoderSpec) -> Iterator[Key]:
    return named(spec, LAYER | QK_NORMS | (ATTENTION_BIASES if spec.layers[0].token_mixer.qkv_bias else {}))
