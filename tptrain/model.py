"""The decoder. Read it top to bottom; the all-reduces are in `column_parallel` (backward) and `row_parallel` (forward).

Shapes: B batch, T sequence, D hidden, H heads, K KV heads, d head_dim, F FFN width, V padded vocabulary. `/tp` marks a
dimension of which this rank has its part. Parameter names follow Hugging Face's Llama.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tptrain.config import ModelConfig
from tptrain.config.schema import RopeScaling, head_dim, kv_heads, padded_vocab_size
from tptrain.layers import (
    ColumnLinear,
    Norm,
    Parameter,
    RowLinear,
    ShardSpec,
    VocabEmbedding,
    column_parallel,
    parameter,
    row_parallel,
)
from tptrain.mesh import Mesh

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Attention(nn.Module):
    """Causal self-attention (MHA, GQA or MQA) on this rank's heads."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.d = mesh, head_dim(config)
        hidden, heads, kv = config.hidden_size, config.num_attention_heads * self.d, kv_heads(config) * self.d
        std, bias = config.initializer_range, config.attention_bias
        self.q_proj = ColumnLinear(mesh, hidden, heads, std=std, bias=bias)
        self.k_proj = ColumnLinear(mesh, hidden, kv, std=std, bias=bias, replicas=mesh.kv_replicas)
        self.v_proj = ColumnLinear(mesh, hidden, kv, std=std, bias=bias, replicas=mesh.kv_replicas)
        self.o_proj = RowLinear(mesh, heads, hidden, std=_residual_std(config), bias=bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            eps = config.rms_norm_eps
            self.q_norm = Norm(mesh, self.d, kind="rmsnorm", eps=eps, partial_grad=True)
            self.k_norm = Norm(mesh, self.d, kind="rmsnorm", eps=eps, partial_grad=True)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        B, T, _ = x.shape  # (B, T, D)
        q, k, v = column_parallel(
            x, self.mesh, self.q_proj, self.k_proj, self.v_proj
        )  # (B, T, H/tp*d), 2x(B, T, K/tp*d)
        q, k, v = (y.view(B, T, -1, self.d) for y in (q, k, v))  # (B, T, H/tp, d), 2 x (B, T, K/tp, d)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H/tp, T, d), 2 x (B, K/tp, T, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H/tp*d)
        return row_parallel(y, self.mesh, self.o_proj)  # (B, T, D)


class FFN(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where the FFN is not gated."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.act = mesh, ACTIVATIONS[config.hidden_act]
        hidden, width, std, bias = (
            config.hidden_size,
            config.intermediate_size,
            config.initializer_range,
            config.mlp_bias,
        )
        self.gate_proj = ColumnLinear(mesh, hidden, width, std=std, bias=bias) if config.gated_ffn else None
        self.up_proj = ColumnLinear(mesh, hidden, width, std=std, bias=bias)
        self.down_proj = RowLinear(mesh, width, hidden, std=_residual_std(config), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is not None:
            gate, up = column_parallel(x, self.mesh, self.gate_proj, self.up_proj)  # 2 x (B, T, F/tp)
            h = self.act(gate) * up  # (B, T, F/tp)
        else:
            h = self.act(*column_parallel(x, self.mesh, self.up_proj))  # (B, T, F/tp)
        return row_parallel(h, self.mesh, self.down_proj)  # (B, T, D)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        norm = {"kind": config.norm, "eps": config.rms_norm_eps}
        self.input_layernorm = Norm(mesh, config.hidden_size, **norm)
        self.self_attn = Attention(config, mesh)
        self.post_attention_layernorm = Norm(mesh, config.hidden_size, **norm)
        self.mlp = FFN(config, mesh)

    def forward(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)  # (B, T, D)
        return x + self.mlp(self.post_attention_layernorm(x))  # (B, T, D)


class Decoder(nn.Module):
    """Embedding, layers, norm, output head. Parameters are float32; activations have the `dtype` given to forward."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.config, self.mesh = config, mesh
        std, vocab = config.initializer_range, padded_vocab_size(config.vocab_size)
        self.embed_tokens = VocabEmbedding(mesh, vocab, config.hidden_size, std=std)
        self.embed_positions: Parameter | None = None
        if config.position_embedding == "learned":
            spec = ShardSpec((config.max_position_embeddings, config.hidden_size), mesh.tp, 0, mesh.tp)
            self.embed_positions = parameter(mesh, spec, std)
        self.layers = nn.ModuleList(Layer(config, mesh) for _ in range(config.num_hidden_layers))
        self.norm = Norm(mesh, config.hidden_size, kind=config.norm, eps=config.rms_norm_eps)
        self.lm_head = ColumnLinear(mesh, config.hidden_size, vocab, std=std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self._rotations: dict[int, Tensor] = {}

    def forward(self, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, T) token ids -> (B, T, V/tp) logits, this rank's columns of the padded vocabulary."""
        T = tokens.shape[1]
        x = self.embed_tokens(tokens, dtype)  # (B, T, D)
        if self.embed_positions is not None:
            x = x + self.embed_positions[:T].to(dtype)
        rotation = self._rotation(T)
        for layer in self.layers:
            x = layer(x, rotation)
        (logits,) = column_parallel(self.norm(x), self.mesh, self.lm_head)
        return logits

    def _rotation(self, T: int) -> Tensor | None:
        if self.config.position_embedding != "rope":
            return None
        if T not in self._rotations:
            self._rotations = {T: rotary_angles(self.config, T).to(self.mesh.device)}
        return self._rotations[T]


def _residual_std(config: ModelConfig) -> float:
    """Projections that end on the residual stream start smaller by sqrt(2 L), as in GPT-2 (Radford et al. 2019)."""
    return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)


# --------------------------------------------------------------------------------------------------------------- rotary


def rotary_angles(config: ModelConfig, T: int) -> Tensor:
    """(2, T, 1, d): cosines and sines of position x frequency (Su et al. 2021, arXiv:2104.09864), float32.

    Hugging Face's layout: dims i and i + d/2 turn together, so its weights are used unpermuted.
    """
    d = head_dim(config)
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, d, 2).float() / d)  # (d/2,)
    if config.rope_scaling.rope_type == "llama3":
        frequencies = _stretch(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(T).float(), frequencies).repeat(1, 2)  # (T, d)
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(2)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's scaling: long wavelengths slowed by `factor`, short ones kept, a smooth ramp between them."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # (d/2,) in the trained context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """(B, T, heads, d) turned by position, in x's precision."""
    cos, sin = rotation.to(x.dtype)  # each (T, 1, d)
    left, right = x.chunk(2, dim=-1)  # each (B, T, heads, d/2)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
