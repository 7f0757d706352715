"""Gemma 2 and Gemma 3, text (transformers' Gemma2ForCausalLM, Gemma3ForCausalLM): norms by 1 + weight at both ends of a
branch, scaled embeddings, windows in some layers; Gemma 2 with soft caps, Gemma 3 with norms of queries and keys.
"""

from collections.abc import Iterator
from typing import Any

from tptrain.models.families.fields import NUMBER, Fields
from tptrain.models.families.keys import ATTENTION_BIASES, LAYER, QK_NORMS, Key, named
from tptrain.models.families.parts import attention, decoder, ffn, layer_types, rms_norm, rotary, rotary_of
from tptrain.models.spec import DecoderSpec, LayerSpec

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
        "softcap": fields.nullable("attn_logit_softcapping", NUMBER, None if third else 50.0),
    }
    window, count = fields.count("sliding_window", 4096), fields.count("num_hidden_layers")
    pattern = fields.count("sliding_window_pattern", 6 if third else 2)
    fields.count("_sliding_window_pattern", pattern)
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    thetas: dict[str, float] = {}  # of Gemma 3, by kind of layer
    if third:
        thetas["full_attention"] = fields.get("rope_theta", NUMBER, 1e6)
        thetas["sliding_attention"] = fields.get("rope_local_base_freq", NUMBER, 1e4)
    layers = []
    for kind in layer_types(fields, default):
        windowed = kind == "sliding_attention"
        position = rotary_of(fields, kind, thetas[kind]) if third else rotary(fields)
        mixer = attention(fields, rotary=position, window=window if windowed else None, **settings)
        layers.append(LayerSpec(norm, mixer, feedforward, output_norm=norm))
    return decoder(
        fields,
        tuple(layers),
        norm,
        tied=True,
        embedding_scale=fields.count("hidden_size") ** 0.5,
        logit_softcap=fields.nullable("final_logit_softcapping", NUMBER, None if third else 30.0),
    )


def keys(spec: DecoderSpec) -> Iterator[Key]:
    mixer = spec.layers[0].token_mixer
    qk_norms = {} if mixer.qk_norm is None else QK_NORMS
    return named(spec, LAYER | NORMS | qk_norms | (ATTENTION_BIASES if mixer.qkv_bias else {}))
