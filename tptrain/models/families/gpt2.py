"""GPT-2 (transformers' GPT2LMHeadModel): LayerNorm, learned positions, biases, a tied head; matrices are (in, out)."""

from collections.abc import Iterator
from typing import Any

from tptrain.models.families.keys import Key
from tptrain.models.spec import AttentionSpec, DecoderSpec, FFNSpec, LayerSpec, NormSpec

LAYER = {  # theirs -> ours, each with a weight and a bias
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}


def to_spec(config: dict[str, Any]) -> DecoderSpec:
    """The decoder of a config.json."""
    hidden, heads = config["n_embd"], config["n_head"]
    norm = NormSpec("layernorm", config["layer_norm_epsilon"])
    attention = AttentionSpec(heads, heads, hidden // heads, qkv_bias=True, output_bias=True)
    ffn = FFNSpec(config.get("n_inner") or 4 * hidden, config["activation_function"], gated=False, bias=True)
    return DecoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        layers=(LayerSpec(norm, attention, ffn),) * config["n_layer"],
        norm=norm,
        tied=config.get("tie_word_embeddings", True),
        max_positions=config["n_positions"],
        learned_positions=True,
        std=config.get("initializer_range", 0.02),
    )


def to_config(spec: DecoderSpec) -> dict[str, Any]:
    """The config.json of a decoder. Dropout is off, as in training here."""
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
    yield Key("transformer.wte.weight", ("embed_tokens.weight",))
    yield Key("transformer.wpe.weight", ("embed_positions",))
    for i in range(len(spec.layers)):
        for theirs, ours in LAYER.items():
            matrix = not theirs.startswith("ln_")
            for leaf in ("weight", "bias"):
                names = tuple(f"layers.{i}.{name}.{leaf}" for name in ours)
                yield Key(f"transformer.h.{i}.{theirs}.{leaf}", names, transposed=matrix and leaf == "weight")
    for leaf in ("weight", "bias"):
        yield Key(f"transformer.ln_f.{leaf}", (f"norm.{leaf}",))
    if not spec.tied:
        yield Key("lm_head.weight", ("lm_head.weight",))
