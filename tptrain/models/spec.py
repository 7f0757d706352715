"""What a decoder is made of: a list of layers, each a token mixer and a channel mixer. Imports no torch.

Config, plan, parameters and the Hugging Face maps of `families/` follow from it. Sizes are global: no topology.
"""

import math
from dataclasses import dataclass
from typing import Any

from tptrain.config.schema import padded_vocab_size


@dataclass(frozen=True)
class NormSpec:
    kind: str  # rmsnorm or layernorm
    eps: float
    zero_centred: bool = False  # the norm multiplies by 1 + weight, as in Gemma


@dataclass(frozen=True)
class LinearScaling:
    """Every position divided by the factor (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """Sequences beyond `context` tokens turn more slowly, by a larger theta; shorter ones are as they were."""

    factor: float
    context: int


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: long wavelengths slowed by `factor`, short ones kept, a smooth ramp between them."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    context: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    context: int
    magnitude: float  # of cosines and sines
    beta_fast: float = 32.0  # turns within the context from which a frequency is kept
    beta_slow: float = 1.0  # and up to which it is slowed by the whole factor
    truncate: bool = True  # the bounds of the ramp between them are whole dims


@dataclass(frozen=True)
class LongScaling:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a factor for each frequency, others beyond `context` tokens."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    context: int
    magnitude: float  # of cosines and sines


Scaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True)
class RotarySpec:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864)."""

    theta: float
    scaling: Scaling | None = None
    dims: int | None = None  # the first dims of each head, which alone are turned; None: all


@dataclass(frozen=True)
class AttentionSpec:
    """Causal self-attention: MHA, GQA or MQA."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormSpec | None = None  # of queries and of keys, before they are turned
    joint_qk_norm: bool = False  # one norm over all heads at once, as in OLMo 2; else one over each head
    rotary: RotarySpec | None = None
    window: int | None = None  # keys that a query sees at most, itself included; None: all before it
    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    softcap: float | None = None  # scores s become cap * tanh(s / cap)

    def multiplied(self, hidden: int) -> int:
        """Weights that multiply each token."""
        return hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    def mixing_flops(self, T: int) -> float:
        """Forward FLOPs of a token's scores and values in a sequence of T; the half that the causal mask hides is
        counted, what lies outside the window is not.
        """
        return 4.0 * self.heads * self.head_dim * min(T, self.window or T)


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
    """Two branches from the residual stream, each with a norm at its entrance, at its exit, or at both.

    A mixer's spec is of any class for which `nn/decoder.MIXERS` has a module. It counts the weights that multiply a
    token (`multiplied`), and a token mixer the FLOPs between tokens (`mixing_flops`).
    """

    norm: NormSpec | None  # at the entrances
    token_mixer: Any
    channel_mixer: Any
    output_norm: NormSpec | None = None  # at the exits, before a branch is added
    parallel: bool = False  # both branches leave the stream at one place; else the second begins where the first ended
    branch_scale: float = 1.0  # of what a branch adds


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
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits z become cap * tanh(z / cap), after the scale

    @property
    def heads(self) -> int:
        """Of the layer with most."""
        return max(getattr(layer.token_mixer, "heads", 1) for layer in self.layers)

    @property
    def kv_heads(self) -> int:
        """Of every layer with attention: the grid of ranks follows from it."""
        (count,) = {layer.token_mixer.kv_heads for layer in self.layers if isinstance(layer.token_mixer, AttentionSpec)}
        return count

    @property
    def padded_vocab_size(self) -> int:
        return padded_vocab_size(self.vocab_size)

    @property
    def residual_std(self) -> float:
        """Projections that end on the residual stream start smaller by sqrt(2 L), as in GPT-2 (Radford et al. 2019)."""
        return self.std / math.sqrt(2 * len(self.layers))

    @property
    def multiplied(self) -> int:
        """Weights that multiply each token, those of the output head among them."""
        return self.hidden_size * self.padded_vocab_size + sum(
            layer.token_mixer.multiplied(self.hidden_size) + layer.channel_mixer.multiplied(self.hidden_size)
            for layer in self.layers
        )

    @property
    def matrix_parameters(self) -> int:
        """All parameters but the vectors: norms and biases."""
        tables = (0 if self.tied else self.padded_vocab_size) + (self.max_positions if self.learned_positions else 0)
        return self.multiplied + self.hidden_size * tables

    def flops_per_token(self, T: int) -> float:
        """Forward and backward FLOPs of a token in a sequence of T: 6 for each weight that multiplies it, and three
        times the forward FLOPs between tokens.

        PaLM's count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
        """
        return 6.0 * self.multiplied + 3.0 * sum(layer.token_mixer.mixing_flops(T) for layer in self.layers)
