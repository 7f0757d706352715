"""SmolLM3 (transformers' SmolLM3ForCausalLM): Llama without rotary positions in some layers."""

from collections.abc import Iterator

from tptrain.models.families import llama
from tptrain.models.families.fields import Fields
from tptrain.models.families.keys import Key
from tptrain.models.families.parts import attention, decoder, ffn, layer_types, rms_norm, rotary
from tptrain.models.spec import DecoderSpec, LayerSpec


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json."""
    norm, position, bias = rms_norm(fields, 1e-6), rotary(fields, theta=2e6), fields.get("attention_bias", bool, False)
    feedforward = ffn(fields, bias=fields.get("mlp_bias", bool, False))
    count, interval = fields.count("num_hidden_layers"), fields.count("no_rope_layer_interval", 4)
    turned = fields.get("no_rope_layers", list, [(i + 1) % interval != 0 for i in range(count)])
    window, used = fields.get("sliding_window", int), fields.get("use_sliding_window", bool, False)
    window = window if used else None
    types = layer_types(fields, ["full_attention" if window is None or t else "sliding_attention" for t in turned])
    layers = [
        LayerSpec(
            norm,
            attention(
                fields,
                qkv_bias=bias,
                output_bias=bias,
                rotary=position if turned[i] else None,
                window=window if types[i] == "sliding_attention" else None,
            ),
            feedforward,
        )
        for i in range(count)
    ]
    return decoder(fields, tuple(layers), norm, tied=True)


def keys(spec: DecoderSpec) -> Iterator[Key]:
    return llama.keys(spec)
