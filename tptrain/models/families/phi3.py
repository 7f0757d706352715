"""Phi-3, Phi-3.5, Phi-4-mini (transformers' Phi3ForCausalLM): Llama with q|k|v and gate|up in one matrix each."""

from collections.abc import Iterator

from tptrain.models.families.fields import Fields
from tptrain.models.families.keys import LAYER, Key, named
from tptrain.models.families.parts import attention, decoder, ffn, rms_norm, rotary
from tptrain.models.spec import DecoderSpec, LayerSpec

WHOLE = {name: name for name in LAYER if not any(f".{part}_proj" in name for part in ("q", "k", "v", "gate", "up"))}


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json."""
    fields.expect_no_dropout("resid_pdrop", "embd_pdrop")
    norm = rms_norm(fields, 1e-5)
    window = fields.get("sliding_window", int)
    layer = LayerSpec(norm, attention(fields, rotary=rotary(fields), window=window), ffn(fields))
    return decoder(fields, (layer,) * fields.count("num_hidden_layers"), norm, tied=False)


def keys(spec: DecoderSpec) -> Iterator[Key]:
    yield from named(spec, WHOLE)
    attention, ffn = spec.layers[0].token_mixer, spec.layers[0].channel_mixer
    queries, values = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    for i in range(len(spec.layers)):
        for name, first in (("q", 0), ("k", queries), ("v", queries + values)):
            theirs = f"model.layers.{i}.self_attn.qkv_proj.weight"
            yield Key(f"layers.{i}.self_attn.{name}_proj.weight", theirs, first)
        for name, first in (("gate", 0), ("up", ffn.width)):
            yield Key(f"layers.{i}.mlp.{name}_proj.weight", f"model.layers.{i}.mlp.gate_up_proj.weight", first)
