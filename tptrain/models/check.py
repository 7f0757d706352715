"""Whether a model can be trained as the config asks. Imports no torch."""

from pathlib import Path

from tptrain.config import Config, UserError
from tptrain.config.generation import check_prompt
from tptrain.config.schema import MODEL_FILES, ModelConfig, RopeScaling, kv_heads
from tptrain.config.validate import vocabulary
from tptrain.models.directory import TENSORS, check_weights
from tptrain.models.settings import family_of_settings
from tptrain.models.sizes import Facts, sizes
from tptrain.models.spec import AttentionSpec, DecoderSpec, FFNSpec


def check_model(config: Config, reads_weights: bool = True) -> None:
    """Raises UserError for a model that is no model, or that these settings do not suit.

    `reads_weights`: those of `model.path` will be wanted, unless the run has begun with them already.
    """
    spec = checked_spec(config.model)
    begun = (Path(config.run.dir) / MODEL_FILES / TENSORS).exists()
    if config.checkpoint.export != "none" and config.model.path is None:
        family_of_settings(config.model)
    check_tp(spec, config.parallel.tp)
    seq_len, longest = config.train.seq_len, spec.max_positions
    if seq_len > longest:
        raise UserError(
            f"train.seq_len={seq_len}: longer than model.max_position_embeddings={longest}. "
            "Shorten it or raise the model's limit."
        )
    if config.data.tokenizer != "auto":  # `check_data` refuses it where data is read
        _check_tokenizer(config, spec)
        _check_samples(config, longest)
    if reads_weights and config.model.path is not None and config.model.engine != "transformers" and not begun:
        check_weights(config.model)


def _check_tokenizer(config: Config, spec: DecoderSpec | Facts) -> None:
    tokens, _ = vocabulary(config.data)
    if tokens > spec.vocab_size:
        advice = "Choose" if config.model.path is not None else f"Set model.vocab_size={tokens} or choose"
        raise UserError(
            f"data.tokenizer={config.data.tokenizer}: has {tokens} tokens, more than model.vocab_size="
            f"{spec.vocab_size}. {advice} the model's own tokenizer."
        )


def checked_spec(model: ModelConfig) -> DecoderSpec | Facts:
    """The model of these settings, whose engine has been settled. Raises UserError where they contradict each other."""
    if model.path is None:
        _check_settings(model)
    return sizes(model)


def _check_samples(config: Config, positions: int) -> None:
    """Of tokens that are bytes, and of empty prompts; a tokenizer.json counts the others before the first step."""
    prompts, data = config.logging.samples, config.data
    for number, prompt in enumerate(prompts, 1):
        if data.tokenizer == "bytes" or (not prompt and data.bos_token is None):
            which = f"logging.samples, prompt {number} of {len(prompts)}"
            check_prompt(which, len(prompt.encode(errors="replace")), positions)


def _check_settings(model: ModelConfig) -> None:
    heads, groups, scaling = model.num_attention_heads, kv_heads(model), model.rope_scaling
    if model.head_dim is None and model.hidden_size % heads:
        raise UserError(
            f"model.num_attention_heads={heads}: does not divide model.hidden_size={model.hidden_size}. "
            "Change one of them or set model.head_dim."
        )
    if heads % groups:
        raise UserError(
            f"model.num_key_value_heads={groups}: does not divide model.num_attention_heads={heads}. Use a divisor."
        )
    head_dim = model.head_dim or model.hidden_size // heads
    if model.position_embedding == "rope" and head_dim % 2:
        raise UserError(f"model.head_dim={head_dim}: rotary positions need an even head_dim.")
    if scaling.rope_type == "default" and scaling != RopeScaling():
        raise UserError(
            "model.rope_scaling: has no effect with rope_type=default. Set model.rope_scaling.rope_type=llama3."
        )
    if scaling.rope_type != "default" and model.position_embedding != "rope":
        raise UserError(
            "model.rope_scaling: has no effect on learned positions. Set model.rope_scaling.rope_type=default."
        )


def check_tp(spec: DecoderSpec | Facts, tp: int) -> None:
    """Raises UserError where the model cannot be cut into so many parts.

    Of a model of Transformers only the vocabulary is looked at: its code has been asked about the rest.
    """
    for layer in () if isinstance(spec, Facts) else dict.fromkeys(spec.layers):
        if isinstance(layer.token_mixer, AttentionSpec):
            _check_heads(layer.token_mixer.heads, layer.token_mixer.kv_heads, tp)
        if isinstance(layer.channel_mixer, FFNSpec) and layer.channel_mixer.width % tp:
            raise UserError(
                f"parallel.tp={tp}: does not divide model.intermediate_size={layer.channel_mixer.width}. Use a divisor."
            )
    if spec.padded_vocab_size % tp:
        raise UserError(
            f"parallel.tp={tp}: does not divide the padded vocabulary of {spec.padded_vocab_size} rows "
            f"(model.vocab_size={spec.vocab_size}). Use a power of two."
        )


def _check_heads(heads: int, groups: int, tp: int) -> None:
    if tp > heads:
        raise UserError(f"parallel.tp={tp}: more than model.num_attention_heads={heads}. Use at most {heads}.")
    if heads % tp:
        divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        raise UserError(f"parallel.tp={tp}: does not divide model.num_attention_heads={heads}. Use {divisors}.")
    if groups % tp and tp % groups:
        raise UserError(
            f"parallel.tp={tp}: neither divides model.num_key_value_heads={groups} nor is divided by it. "
            "Choose a tp for which one divides the other."
        )
