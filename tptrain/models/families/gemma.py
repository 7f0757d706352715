"""Gemma 2 and Gemma 3, text (transformers' Gemma2ForCausalLM, Gemma3ForCausalLM): norms by 1 + weight at both ends of a
branch, scaled embeddings, windows in some layers; Gemma 2 with soft caps, Gemma 3 with norms of queries and keys.
"""

from collections.abc import Iterator
from typing import Any

from tptrain.models.families.fields import NUMBER, Fields
from tptrain.models.families.keys import LAYER, Key, named
from tptrain.models.families.parts import attention, decoder, ffn, layer_types, rms_norm, rotary, rotary_section
from tptrain.models.spec import DecoderSpec, LayerSpec, RotarySpec

NORMS = {
    "attn_output_norm.weight": "post_attention_layernorm.weight",
    "post_attention_layernorm.weight": "pre_feedforward_layernorm.weight",
    "mlp_output_norm.weight": "post_feedforward_layernorm.weight",
}


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json."""
    third = fields.config["model_type"] == "gemma3_text"
    fields.ignore(hidden_act="hidden_activation takes its place", cache_implementation="of generation")
    fields.expect("use_bidirectional_attention", False)
    norm = rms_norm(fields, 1e-6, zero_centred=True)
    feedforward = ffn(fields, act="hidden_activation", default="gelu_pytorch_tanh")
    bias, scalar = fields.get("attention_bias", bool, False), fields.get("query_pre_attn_scalar", NUMBER, 256)
    settings: dict[str, Any] = {
        "head_dim": 256,
        "qkv_bias": bias,
        "output_bias": bias,
        "qk_norm": norm if third else None,
        "scale": scalar**-0.5,
        "softcap": fields.get("attn_logit_softcapping", NUMBER, None if third else _absent(fields, "attn", 50.0)),
    }
    window, count = fields.count("sliding_window", 4096), fields.count("num_hidden_layers")
    pattern = fields.count("sliding_window_pattern", 6 if third else 2)
    fields.count("_sliding_window_pattern", pattern)
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    layers = []
    for kind in layer_types(fields, default):
        windowed = kind == "sliding_attention"
        position = _gemma3_rotary(fields, kind) if third else rotary(fields)
        mixer = attention(fields, rotary=position, window=window if windowed else None, **settings)
        layers.append(LayerSpec(norm, mixer, feedforward, output_norm=norm))
    return decoder(
        fields,
        tuple(layers),
        norm,
        tied=True,
        embedding_scale=fields.count("hidden_size") ** 0.5,
        logit_softcap=fields.get("final_logit_softcapping", NUMBER, None if third else _absent(fields, "final", 30.0)),
    )


def _absent(fields: Fields, name: str, default: float) -> float | None:
    """Transformers' value where the field is absent; one that is null is none."""
    return None if f"{name}_logit_softcapping" in fields.config else default


def _gemma3_rotary(fields: Fields, kind: str) -> RotarySpec:
    """Of one kind of layer: in the older spelling the scaling is that of full attention only."""
    nested, older = fields.section("rope_parameters"), fields.section("rope_scaling")
    full = fields.get("rope_theta", NUMBER, 1e6), older
    local = fields.get("rope_local_base_freq", NUMBER, 1e4), None
    theta, section = full if kind == "full_attention" else local
    return rotary_section(fields, section if nested is None else nested.section(kind), theta)


def keys(spec: DecoderSpec) -> Iterator[Key]:
    mixer = spec.layers[0].token_mixer
    further = [f"self_attn.{name}_norm.weight" for name in "qk"] if mixer.qk_norm is not None else []
    further += [f"self_attn.{name}_proj.bias" for name in "qkvo"] if mixer.qkv_bias else []
    return named(spec, LAYER | NORMS | dict(zip(further, further, strict=True)))
