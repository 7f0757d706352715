"""Granite 3.x (transformers' GraniteForCausalLM): Llama with a factor on embeddings, scores, branches and logits."""

from collections.abc import Iterator

from tptrain.models.families import llama
from tptrain.models.families.fields import NUMBER, Fields
from tptrain.models.families.keys import Key
from tptrain.models.families.parts import attention, decoder, ffn, rms_norm, rotary
from tptrain.models.spec import DecoderSpec, LayerSpec


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json."""
    norm, bias = rms_norm(fields, 1e-6), fields.get("attention_bias", bool, False)
    scale = float(fields.get("attention_multiplier", NUMBER, 1.0))
    mixer = attention(fields, qkv_bias=bias, output_bias=bias, rotary=rotary(fields), scale=scale)
    layer = LayerSpec(
        norm,
        mixer,
        ffn(fields, bias=fields.get("mlp_bias", bool, False)),
        branch_scale=float(fields.get("residual_multiplier", NUMBER, 1.0)),
    )
    return decoder(
        fields,
        (layer,) * fields.count("num_hidden_layers"),
        norm,
        tied=False,
        embedding_scale=float(fields.get("embedding_multiplier", NUMBER, 1.0)),
        logit_scale=1.0 / fields.get("logits_scaling", NUMBER, 1.0),
    )


def keys(spec: DecoderSpec) -> Iterator[Key]:
    return llama.keys(spec)
