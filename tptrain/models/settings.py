"""The decoder that the settings `model.*` describe: by themselves, or by a Hugging Face config.json."""

from types import ModuleType

from tptrain.config import UserError
from tptrain.config.schema import ModelConfig, RopeScaling, head_dim, kv_heads
from tptrain.models.families import FAMILIES
from tptrain.models.families.fields import Fields
from tptrain.models.spec import (
    AttentionSpec,
    DecoderSpec,
    FFNSpec,
    LayerSpec,
    Llama3Scaling,
    NormSpec,
    RotarySpec,
)


def decoder_spec(model: ModelConfig) -> DecoderSpec:
    """Raises UserError for a config.json that says something which cannot be trained here."""
    if model.path is not None:
        fields = Fields(model.source, dropout=model.dropout)
        spec = family(model).to_spec(fields)
        fields.finish()
        return spec
    norm, rope = NormSpec(model.norm, model.rms_norm_eps), model.position_embedding == "rope"
    attention = AttentionSpec(
        heads=model.num_attention_heads,
        kv_heads=kv_heads(model),
        head_dim=head_dim(model),
        qkv_bias=model.attention_bias,
        output_bias=model.attention_bias,
        qk_norm=NormSpec("rmsnorm", model.rms_norm_eps) if model.qk_norm else None,
        rotary=RotarySpec(model.rope_theta, _scaling(model.rope_scaling)) if rope else None,
    )
    ffn = FFNSpec(model.intermediate_size, model.hidden_act, model.gated_ffn, model.mlp_bias)
    return DecoderSpec(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layers=(LayerSpec(norm, attention, ffn),) * model.num_hidden_layers,
        norm=norm,
        tied=model.tie_word_embeddings,
        max_positions=model.max_position_embeddings,
        learned_positions=not rope,
        std=model.initializer_range,
    )


def _scaling(scaling: RopeScaling) -> Llama3Scaling | None:
    if scaling.rope_type == "default":
        return None
    context = scaling.original_max_position_embeddings
    return Llama3Scaling(scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, context)


def family_of_settings(model: ModelConfig) -> ModuleType:
    """The family in whose terms a model is exported that began with `model.*`. Raises UserError where none has it."""
    name, spec = "llama", decoder_spec(model)
    if spec.learned_positions:
        name = "gpt2"
    elif model.qk_norm:
        name = "qwen3"
    if FAMILIES[name].to_spec(Fields(FAMILIES[name].to_config(spec))) != spec:
        raise UserError(f"model: no family of Transformers has all of these settings; {name} is the nearest.")
    return FAMILIES[name]


def family(model: ModelConfig) -> ModuleType:
    """The family of a Hugging Face directory. Raises UserError for one that is not known."""
    name = model.source.get("model_type")
    if model.source.get("quantization_config") is not None:
        method = model.source["quantization_config"]
        method = method.get("quant_method", "quantized") if isinstance(method, dict) else method
        raise UserError(
            f"model.path={model.path}: its weights are quantized ({method}), and only float32, float16 and bfloat16 "
            "can be trained. Name the directory of the original weights."
        )
    if isinstance(model.source.get("text_config"), dict):
        raise UserError(
            f"model.path={model.path}: model_type={name} is of images and text, and only text models can be trained. "
            "Name a text model of the family."
        )
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"model.path={model.path}: config.json has model_type={name!r}, which is none of {known}.")
    return FAMILIES[name]
