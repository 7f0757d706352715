"""Qwen2, Qwen2.5 (transformers' Qwen2ForCausalLM): Llama with biases on q, k and v, and windows in its upper layers."""

from collections.abc import Iterator

from tptrain.models.families.fields import Fields
from tptrain.models.families.keys import LAYER, Key, named, same
from tptrain.models.families.parts import attention, decoder, ffn, layer_types, rms_norm, rotary
from tptrain.models.spec import DecoderSpec, LayerSpec

BIASES = same(*(f"self_attn.{name}_proj.bias" for name in "qkv"))


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json."""
    norm, position, feedforward = rms_norm(fields, 1e-6), rotary(fields), ffn(fields)
    layers = [
        LayerSpec(norm, attention(fields, qkv_bias=True, rotary=position, window=window), feedforward)
        for window in windows(fields)
    ]
    return decoder(fields, tuple(layers), norm, tied=False)


def windows(fields: Fields) -> list[int | None]:
    """The window of each layer: those from `max_window_layers` on have one, or those that `layer_types` names."""
    window, first = fields.count("sliding_window", 4096), fields.get("max_window_layers", int, 28)
    used = fields.get("use_sliding_window", bool, False)
    count = fields.count("num_hidden_layers")
    default = ["sliding_attention" if used and i >= first else "full_attention" for i in range(count)]
    return [window if used and kind == "sliding_attention" else None for kind in layer_types(fields, default)]


def keys(spec: DecoderSpec) -> Iterator[Key]:
    return named(spec, LAYER | BIASES)
