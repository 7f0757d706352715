"""OLMo 2 and OLMo 3 (transformers' Olmo2ForCausalLM, Olmo3ForCausalLM): RMSNorm at the exits of the branches, and over
all heads' queries and keys at once; OLMo 3 has windows in three of four layers.
"""

from collections.abc import Iterator
from typing import Any

from tptrain.models.families.fields import NUMBER, Fields
from tptrain.models.families.keys import ATTENTION_BIASES, LAYER, QK_NORMS, Key, named
from tptrain.models.families.parts import attention, decoder, ffn, layer_types, rms_norm, rotary, rotary_of
from tptrain.models.spec import DecoderSpec, LayerSpec, RotarySpec

NORMS = {
    "attn_output_norm.weight": "post_attention_layernorm.weight",
    "mlp_output_norm.weight": "post_feedforward_layernorm.weight",
}


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json."""
    norm, bias, feedforward = rms_norm(fields, 1e-5), fields.get("attention_bias", bool, False), ffn(fields)
    settings: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, "qk_norm": norm, "joint_qk_norm": True}

    def layer(position: RotarySpec, window: int | None = None) -> LayerSpec:
        mixer = attention(fields, rotary=position, window=window, **settings)
        return LayerSpec(None, mixer, feedforward, output_norm=norm)

    count = fields.count("num_hidden_layers")
    if fields.config["model_type"] == "olmo2":
        layers = [layer(rotary(fields))] * count
    else:
        theta = fields.get("rope_theta", NUMBER, 500000.0)
        windowed = layer(rotary_of(fields, "sliding_attention", theta), fields.count("sliding_window", 4096))
        full = layer(rotary_of(fields, "full_attention", theta))
        default = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(count)]
        layers = [full if kind == "full_attention" else windowed for kind in layer_types(fields, default)]
    return decoder(fields, tuple(layers), norm, tied=False)


def keys(spec: DecoderSpec) -> Iterator[Key]:
    layer = {ours: theirs for ours, theirs in LAYER.items() if "layernorm" not in ours}
    return named(spec, layer | QK_NORMS | NORMS | (ATTENTION_BIASES if spec.layers[0].token_mixer.qkv_bias else {}))
