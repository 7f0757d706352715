"""Parts of a spec out of the fields that most families share, those of Llama's config.json."""

import math
from typing import Any

from tptrain.config import UserError
from tptrain.models.families.fields import NUMBER, Fields
from tptrain.models.spec import (
    AttentionSpec,
    DecoderSpec,
    DynamicScaling,
    FFNSpec,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    NormSpec,
    RotarySpec,
    Scaling,
    YarnScaling,
)

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh")


def attention(fields: Fields, *, head_dim: int | None = None, **changes: Any) -> AttentionSpec:
    """`head_dim`: where the file has none and it is not the hidden size divided by the heads."""
    fields.expect_no_dropout("attention_dropout")
    heads, hidden = fields.count("num_attention_heads"), fields.count("hidden_size")
    d = fields.count("head_dim", head_dim or hidden // heads)
    return AttentionSpec(heads, fields.count("num_key_value_heads", heads), d, **changes)


def ffn(fields: Fields, *, act: str = "hidden_act", default: str = "silu", **changes: Any) -> FFNSpec:
    """`act`: the field that names the activation; `default`: where it is absent."""
    fields.expect(act, *ACTIVATIONS)
    return FFNSpec(fields.count("intermediate_size"), fields.get(act, str, default), **changes)


def decoder(
    fields: Fields, layers: tuple[LayerSpec, ...], norm: NormSpec, *, tied: bool, **changes: Any
) -> DecoderSpec:
    """`tied`: where the file does not say."""
    positions = fields.count("max_position_embeddings")
    rotary = [layer.token_mixer.rotary for layer in layers if layer.token_mixer.rotary is not None]
    if rotary and isinstance(rotary[0].scaling, DynamicScaling):
        positions = int(positions * rotary[0].scaling.factor)
    return DecoderSpec(
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        layers=layers,
        norm=norm,
        tied=fields.get("tie_word_embeddings", bool, tied),
        max_positions=positions,
        std=fields.get("initializer_range", NUMBER, 0.02),
        **changes,
    )


def rms_norm(fields: Fields, default: float, **changes: Any) -> NormSpec:
    return NormSpec("rmsnorm", fields.get("rms_norm_eps", NUMBER, default), **changes)


def layer_types(fields: Fields, default: list[str]) -> list[str]:
    """For each layer, `full_attention` or `sliding_attention`. Raises UserError for any other."""
    types = fields.get("layer_types", list, default)
    count = fields.count("num_hidden_layers")
    if len(types) != count or not set(types) <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"model.path: {fields.where} has layer_types={types!r}: not {count} of full_attention, sliding_attention."
        )
    return types


# -------------------------------------------------------------------------------------------------------------- rotary


def rotary(fields: Fields, *, theta: float = 10000.0, share: float = 1.0) -> RotarySpec:
    """Both spellings: `rope_parameters`, and the older `rope_theta` with `rope_scaling`.

    `theta` and `share` (of a head's dims, which are turned): where the file has none.
    """
    theta = fields.get("rope_theta", NUMBER, theta)
    share = fields.get("partial_rotary_factor", NUMBER, share)
    rope = fields.section("rope_parameters") or fields.section("rope_scaling")
    fields.honoured |= {"rope_parameters", "rope_scaling"}
    return rotary_section(fields, rope, theta, share)


def rotary_of(fields: Fields, kind: str, theta: float) -> RotarySpec:
    """Of one kind of layer, where each has parameters of its own; `theta`: where the file has none.

    In the older spelling the scaling is that of full attention only.
    """
    nested, older = fields.section("rope_parameters"), fields.section("rope_scaling")
    if nested is not None:
        return rotary_section(fields, nested.section(kind), theta)
    return rotary_section(fields, older if kind == "full_attention" else None, theta)


def rotary_section(fields: Fields, rope: Fields | None, theta: float, share: float = 1.0) -> RotarySpec:
    """Out of one set of rope parameters; None: not scaled."""
    fields.ignore(original_max_position_embeddings="read where a scaling asks for it")
    scaling = None
    if rope is not None:
        theta, share = rope.get("rope_theta", NUMBER, theta), rope.get("partial_rotary_factor", NUMBER, share)
        scaling = _scaling(fields, rope)
        rope.finish()
    d = fields.get("head_dim", int) or fields.count("hidden_size") // fields.count("num_attention_heads")
    if theta <= 0 or not 0 < share <= 1 or int(d * share) % 2:
        raise UserError(f"model.path: {fields.where} has rotary positions of theta {theta} over {share} of {d} dims.")
    return RotarySpec(float(theta), scaling, None if int(d * share) == d else int(d * share))


def _scaling(fields: Fields, rope: Fields) -> Scaling | None:
    kinds = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    rope.expect("rope_type", *kinds)
    rope.expect("type", *kinds, "su")
    kind = rope.get("rope_type", str) or rope.get("type", str, "default")
    if kind == "default":
        rope.ignore(**dict.fromkeys(("factor", "original_max_position_embeddings"), "of a scaling, and there is none"))
        return None
    if kind == "linear":
        return LinearScaling(_positive(rope, "factor"))
    positions = fields.count("max_position_embeddings")
    if kind == "dynamic":
        rope.ignore(original_max_position_embeddings="Transformers does not read it")
        return DynamicScaling(_positive(rope, "factor"), positions)
    inner = rope.count("original_max_position_embeddings", positions)
    context = fields.get("original_max_position_embeddings", int) or inner  # in this order, as Transformers reads them
    if kind == "llama3":
        low, high = _positive(rope, "low_freq_factor"), _positive(rope, "high_freq_factor")
        return Llama3Scaling(_positive(rope, "factor"), low, high, context)
    if kind == "yarn":
        return _yarn(rope, context)
    factor = rope.get("factor", NUMBER) or positions / context
    magnitude = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return LongScaling(
        short=tuple(rope.require("short_factor", list)),
        long=tuple(rope.require("long_factor", list)),
        context=context,
        magnitude=rope.get("attention_factor", NUMBER, magnitude),
    )


def _yarn(rope: Fields, context: int) -> YarnScaling:
    factor = _positive(rope, "factor")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_dims = rope.get("mscale", NUMBER), rope.get("mscale_all_dim", NUMBER)
    default = magnitude(one) / magnitude(all_dims) if one and all_dims else magnitude(1.0)
    return YarnScaling(
        factor=factor,
        context=context,
        magnitude=rope.get("attention_factor", NUMBER, default),
        beta_fast=rope.get("beta_fast", NUMBER) or 32.0,
        beta_slow=rope.get("beta_slow", NUMBER) or 1.0,
        truncate=rope.get("truncate", bool, True),
    )


def _positive(fields: Fields, name: str) -> float:
    value = float(fields.require(name, NUMBER))
    if value <= 0:
        raise UserError(f"model.path: {fields.where} has {name}={value}, and it must be greater than 0.")
    return value
