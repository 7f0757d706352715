"""Mistral (transformers' MistralForCausalLM): Llama with a window in every layer."""

from collections.abc import Iterator

from tptrain.models.families.fields import Fields
from tptrain.models.families.keys import LAYER, Key, named
from tptrain.models.families.parts import attention, decoder, ffn, rms_norm, rotary
from tptrain.models.spec import DecoderSpec, LayerSpec


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json. A window of null is none; where the field is absent it is Transformers' 4,096."""
    norm = rms_norm(fields, 1e-6)
    window = fields.nullable("sliding_window", int, 4096)
    layer = LayerSpec(norm, attention(fields, rotary=rotary(fields), window=window), ffn(fields))
    return decoder(fields, (layer,) * fields.count("num_hidden_layers"), norm, tied=False)


def keys(spec: DecoderSpec) -> Iterator[Key]:
    return named(spec, LAYER)
