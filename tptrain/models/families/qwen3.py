"""Qwen3 (transformers' Qwen3ForCausalLM): Llama with RMSNorm over each head's query and key."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tptrain.models.families import llama
from tptrain.models.families.keys import Key, prefixed
from tptrain.models.spec import DecoderSpec


def to_spec(config: dict[str, Any]) -> DecoderSpec:
    """The decoder of a config.json."""
    spec = llama.to_spec(config)
    layers = [replace(layer, token_mixer=replace(layer.token_mixer, qk_norm=spec.norm)) for layer in spec.layers]
    return replace(spec, layers=tuple(layers))


def to_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a decoder."""
    return llama.common_config(spec) | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def keys(spec: DecoderSpec) -> Iterator[Key]:
    biases = [f"self_attn.{name}_proj.bias" for name in "qkvo"] if spec.layers[0].token_mixer.qkv_bias else []
    return prefixed(spec, [*llama.LAYER, "self_attn.q_norm.weight", "self_attn.k_norm.weight", *biases])
