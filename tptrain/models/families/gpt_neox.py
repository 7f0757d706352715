"""GPT-NeoX, Pythia (transformers' GPTNeoXForCausalLM): LayerNorm, biases, both branches of a layer from one place, and
the first dims of each head turned; q, k and v of a head lie one after another.
"""

from collections.abc import Iterator

from tptrain.models.families.fields import NUMBER, Fields
from tptrain.models.families.keys import Key, named
from tptrain.models.families.parts import attention, decoder, ffn, rotary
from tptrain.models.spec import DecoderSpec, LayerSpec, NormSpec

LAYER = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
OUTER = {
    "embed_tokens.weight": "gpt_neox.embed_in.weight",
    "norm.weight": "gpt_neox.final_layer_norm.weight",
    "norm.bias": "gpt_neox.final_layer_norm.bias",
    "lm_head.weight": "embed_out.weight",
}


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json."""
    fields.expect_no_dropout("hidden_dropout")
    fields.ignore(classifier_dropout="of classifiers")
    norm = NormSpec("layernorm", fields.get("layer_norm_eps", NUMBER, 1e-5))
    theta = fields.get("rotary_emb_base", NUMBER, 10000.0)
    position = rotary(fields, theta=theta, share=fields.get("rotary_pct", NUMBER, 0.25))
    bias = fields.get("attention_bias", bool, True)
    mixer = attention(fields, qkv_bias=bias, output_bias=bias, rotary=position)
    parallel = fields.get("use_parallel_residual", bool, True)
    layer = LayerSpec(norm, mixer, ffn(fields, default="gelu", gated=False, bias=True), parallel=parallel)
    return decoder(fields, (layer,) * fields.count("num_hidden_layers"), norm, tied=False)


def keys(spec: DecoderSpec) -> Iterator[Key]:
    mixer = spec.layers[0].token_mixer
    leaves = ("weight", "bias") if mixer.qkv_bias else ("weight",)
    names = {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in LAYER.items() for leaf in ("weight", "bias")}
    names |= {f"self_attn.o_proj.{leaf}": f"attention.dense.{leaf}" for leaf in leaves}
    yield from named(spec, names, OUTER, "gpt_neox.layers")
    d = mixer.head_dim
    for i in range(len(spec.layers)):
        for leaf in leaves:
            theirs = f"gpt_neox.layers.{i}.attention.query_key_value.{leaf}"
            for place, name in enumerate("qkv"):
                yield Key(f"layers.{i}.self_attn.{name}_proj.{leaf}", theirs, place * d, block=d, period=3 * d)
