"""GPT-2 (transformers' GPT2LMHeadModel): LayerNorm, learned positions, biases, a tied head; matrices are (in, out)."""

from collections.abc import Iterator
from typing import Any

from tptrain.models.families.fields import NUMBER, Fields
from tptrain.models.families.keys import Key
from tptrain.models.families.parts import ACTIVATIONS
from tptrain.models.spec import AttentionSpec, DecoderSpec, FFNSpec, LayerSpec, NormSpec

LAYER = {  # theirs -> ours, each with a weight and a bias
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


def to_spec(fields: Fields) -> DecoderSpec:
    """The decoder of a config.json."""
    fields.expect_no_dropout("resid_pdrop", "embd_pdrop", "attn_pdrop")
    fields.expect("scale_attn_weights", True)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("add_cross_attention", False)
    fields.expect("activation_function", *ACTIVATIONS)
    fields.ignore(reorder_and_upcast_attn="a way to compute, not what is computed", task_specific_params="of pipelines")
    fields.ignore(gradient_checkpointing="train.recompute decides", n_ctx="n_positions says the same")
    summary = ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
    fields.ignore(**{f"summary_{name}": "of classifiers" for name in summary})
    hidden, heads = fields.count("n_embd"), fields.count("n_head")
    norm = NormSpec("layernorm", fields.get("layer_norm_epsilon", NUMBER, 1e-5))
    attention = AttentionSpec(heads, heads, hidden // heads, qkv_bias=True, output_bias=True)
    act = fields.get("activation_function", str, "gelu_new")
    ffn = FFNSpec(fields.count("n_inner", 4 * hidden), act, gated=False, bias=True)
    return DecoderSpec(
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        layers=(LayerSpec(norm, attention, ffn),) * fields.count("n_layer"),
        norm=norm,
        tied=fields.get("tie_word_embeddings", bool, True),
        max_positions=fields.count("n_positions"),
        learned_positions=True,
        std=fields.get("initializer_range", NUMBER, 0.02),
    )


def to_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a decoder that was trained from scratch, without dropout."""
    ffn = spec.layers[0].channel_mixer
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": spec.vocab_size,
        "n_embd": spec.hidden_size,
        "n_layer": len(spec.layers),
        "n_head": spec.layers[0].token_mixer.heads,
        "n_inner": ffn.width,
        "n_positions": spec.max_positions,
        "activation_function": ffn.act,
        "layer_norm_epsilon": spec.norm.eps,
        "initializer_range": spec.std,
        "tie_word_embeddings": spec.tied,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def keys(spec: DecoderSpec) -> Iterator[Key]:
    yield Key("embed_tokens.weight", "transformer.wte.weight")
    yield Key("embed_positions", "transformer.wpe.weight")
    for i in range(len(spec.layers)):
        for theirs, ours in LAYER.items():
            for leaf in ("weight", "bias"):
                transposed = leaf == "weight" and not theirs.startswith("ln_")
                for place, name in enumerate(ours):
                    tensor, first = f"transformer.h.{i}.{theirs}.{leaf}", place * spec.hidden_size
                    yield Key(f"layers.{i}.{name}.{leaf}", tensor, first, transposed=transposed)
    for leaf in ("weight", "bias"):
        yield Key(f"norm.{leaf}", f"transformer.ln_f.{leaf}")
    if not spec.tied:
        yield Key("lm_head.weight", "lm_head.weight")
