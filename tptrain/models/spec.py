"""What a decoder is made of: a list of layers, each a token mixer and a channel mixer. Imports no torch.

Config, plan, parameters and the Hugging Face maps of `families/` follow from it. Sizes are global: no topology.
"""

import math
from dataclasses import dataclass
from typing import Any

from tptrain.config.schema import ModelConfig, RopeScaling, head_dim, kv_heads, padded_vocab_size


@dataclass(frozen=True)
class NormSpec:
    kind: str  # rmsnorm or layernorm
    eps: float


@dataclass(frozen=True)
class RotarySpec:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

    theta: float
    scaling: tuple[float, float, float, int] | None = None  # Llama 3.1's: factor, low and high factor, context


@dataclass(frozen=True)
class AttentionSpec:
    """Causal self-attention: MHA, GQA or MQA."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormSpec | None = None  # over each head's query and key
    rotary: RotarySpec | None = None

    def multiplied(self, hidden: int) -> int:
        """Weights that multiply each token."""
        return hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    def mixing_flops(self, T: int) -> float:
        """Forward FLOPs of a token's scores and values in a sequence of T; the half that the mask hides is counted."""
        return 4.0 * self.heads * self.head_dim * T


@dataclass(frozen=True)
class FFNSpec:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where it is not gated."""

    width: int
    act: str
    gated: bool = True
    bias: bool = False

    def multiplied(self, hidden: int) -> int:
        """Weights that multiply each token."""
        return hidden * self.width * (3 if self.gated else 2)


@dataclass(frozen=True)
class LayerSpec:
    """Two branches from the residual stream, each with a norm at its entrance.

    A mixer's spec is of any class for which `nn/decoder.MIXERS` has a module. It counts the weights that multiply a
    token (`multiplied`), and a token mixer the FLOPs between tokens (`mixing_flops`).
    """

    norm: NormSpec
    token_mixer: Any
    channel_mixer: Any


@dataclass(frozen=True)
class DecoderSpec:
    vocab_size: int  # before padding
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec  # before the output head
    tied: bool  # whether the output head is the embedding
    max_positions: int  # tokens of a sequence at most
    learned_positions: bool = False  # a table of `max_positions` rows is added to the embedding
    std: float = 0.02  # standard deviation of the matrices at step 0

    @property
    def padded_vocab_size(self) -> int:
        return padded_vocab_size(self.vocab_size)

    @property
    def residual_std(self) -> float:
        """Projections that end on the residual stream start smaller by sqrt(2 L), as in GPT-2 (Radford et al. 2019)."""
        return self.std / math.sqrt(2 * len(self.layers))

    def flops_per_token(self, T: int) -> float:
        """Forward and backward FLOPs of a token in a sequence of T: 6 for each weight that multiplies it, and three
        times the forward FLOPs between tokens.

        PaLM's count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
        """
        weights = self.hidden_size * self.padded_vocab_size
        weights += sum(
            layer.token_mixer.multiplied(self.hidden_size) + layer.channel_mixer.multiplied(self.hidden_size)
            for layer in self.layers
        )
        return 6.0 * weights + 3.0 * sum(layer.token_mixer.mixing_flops(T) for layer in self.layers)


def decoder_spec(model: ModelConfig) -> DecoderSpec:
    """The decoder that the settings `model.*` describe."""
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


def _scaling(scaling: RopeScaling) -> tuple[float, float, float, int] | None:
    if scaling.rope_type == "default":
        return None
    return (
        scaling.factor,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
