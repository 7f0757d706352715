"""The decoder. Read it top to bottom; the all-reduces are in `column_parallel` (backward) and `row_parallel` (forward).

Shapes: B batch, T sequence, N = B*T tokens, n the tokens a rank has between the linears: N, or N/tp with sequence
parallelism. D hidden, H heads, K KV heads, d head_dim, F FFN width, V padded vocabulary. `/tp` marks a dimension of
which this rank has its part. Parameter names follow Hugging Face's Llama.
"""

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tptrain import fused
from tptrain.attention import attention
from tptrain.config import ModelConfig
from tptrain.config.schema import RopeScaling, head_dim, kv_heads, padded_vocab_size
from tptrain.layers import Norm, Parameter, ShardSpec, VocabEmbedding, parameter, parameters, use
from tptrain.linear import Again, ColumnLinear, RowLinear, Summing, column_parallel, row_parallel
from tptrain.mesh import Mesh


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
        self.heads = config.num_attention_heads // mesh.tp  # H/tp
        self.kv_heads = max(1, kv_heads(config) // mesh.tp)  # K/tp
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            eps = config.rms_norm_eps
            self.q_norm = Norm(mesh, self.d, kind="rmsnorm", eps=eps, partial_grad=True)
            self.k_norm = Norm(mesh, self.d, kind="rmsnorm", eps=eps, partial_grad=True)

    def forward(self, x: Tensor, T: int, rotation: Tensor | None, again: Again) -> Summing:
        """(n, D) -> (n, D)."""
        qkv = column_parallel(x, self.mesh, self.q_proj, self.k_proj, self.v_proj, again=again)  # (N, (H + 2 K)/tp * d)
        heads = [self.heads, self.kv_heads, self.kv_heads]
        qkv = qkv.view(-1, T, sum(heads), self.d)  # (B, T, (H + 2 K)/tp, d)
        if self.q_norm is None and rotation is not None:
            q, k, v = fused.rotate_qkv(qkv, rotation, heads)
        else:
            q, k, v = qkv.split(heads, dim=2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            if rotation is not None:
                q, k = fused.rotate(q, rotation), fused.rotate(k, rotation)
        y = attention(q, k, v)  # (B, T, H/tp, d)
        return row_parallel(y.reshape(-1, self.heads * self.d), self.mesh, self.o_proj)


class FFN(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where the FFN is not gated."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.mesh, self.act = mesh, config.hidden_act
        hidden, width, std = config.hidden_size, config.intermediate_size, config.initializer_range
        bias = config.mlp_bias
        self.gate_proj = ColumnLinear(mesh, hidden, width, std=std, bias=bias) if config.gated_ffn else None
        self.up_proj = ColumnLinear(mesh, hidden, width, std=std, bias=bias)
        self.down_proj = RowLinear(mesh, width, hidden, std=_residual_std(config), bias=bias)

    def forward(self, x: Tensor, again: Again) -> Summing:
        """(n, D) -> (n, D)."""
        act, plain, first = fused.activated, fused.activated, (self.up_proj,)
        if self.gate_proj is not None:
            act, plain, first = fused.gated, fused.gate_product, (self.gate_proj, self.up_proj)
        inner = column_parallel(x, self.mesh, *first, again=again)  # (N, 2 F/tp), or (N, F/tp) where not gated
        h = act(inner, self.act)  # (N, F/tp)
        again = partial(plain, inner.detach(), self.act) if again is not None else None
        return row_parallel(h, self.mesh, self.down_proj, again)


Stream = tuple[Tensor, Summing | None]  # the residual stream (n, D), and the branch that is added to it next


class Layer(nn.Module):
    """Two branches from the residual stream, each with an all-reduce at its entrance (backward) and exit (forward)."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        norm = {"kind": config.norm, "eps": config.rms_norm_eps}
        self.input_layernorm = Norm(mesh, config.hidden_size, **norm)
        self.self_attn = Attention(config, mesh)
        self.post_attention_layernorm = Norm(mesh, config.hidden_size, **norm)
        self.mlp = FFN(config, mesh)

    def attend(self, stream: Stream, T: int, rotation: Tensor | None, selective: bool) -> Stream:
        """Begin attention; `selective`: the linears' inputs are made again in the backward pass, not kept."""
        x, h = _normed(self.input_layernorm, stream)
        return x, self.self_attn(h, T, rotation, self.input_layernorm.recipe(x) if selective else None)

    def feed_forward(self, stream: Stream, selective: bool) -> Stream:
        """Wait for attention's sum, and begin the FFN."""
        x, h = _normed(self.post_attention_layernorm, stream)
        return x, self.mlp(h, self.post_attention_layernorm.recipe(x) if selective else None)

    def forward(self, x: Tensor, T: int, rotation: Tensor | None) -> Tensor:
        """The whole layer, (n, D) -> (n, D), for what is computed again as one."""
        x, branch = self.feed_forward(self.attend((x, None), T, rotation, False), False)
        return x if branch is None else x + branch.value()


def _normed(norm: Norm, stream: Stream) -> tuple[Tensor, Tensor]:
    """The residual stream with its branch added, and the norm of it: (n, D) each."""
    x, branch = stream
    return norm.add(x, *branch.terms()) if branch is not None else (x, norm(x))


class Decoder(nn.Module):
    """Embedding, layers, norm; the output head is run by `loss.py`. Activations have the precision of the weights."""

    def __init__(self, config: ModelConfig, mesh: Mesh, recompute: str = "none", overlap: bool = False) -> None:
        """`overlap`: in training, the layers run the two halves of a batch in turn; one's sums travel meanwhile."""
        super().__init__()
        self.config, self.mesh, self.recompute = config, mesh, recompute
        self.halves = 2 if overlap and mesh.tp > 1 else 1
        std, vocab = config.initializer_range, padded_vocab_size(config.vocab_size)
        self.embed_tokens = VocabEmbedding(mesh, vocab, config.hidden_size, std=std)
        self.embed_positions: Parameter | None = None
        if config.position_embedding == "learned":
            shape = (config.max_position_embeddings, config.hidden_size)
            self.embed_positions = parameter(mesh, ShardSpec(shape, mesh.tp, 0, mesh.tp, mesh.sequence_parallel), std)
        self.layers = nn.ModuleList(Layer(config, mesh) for _ in range(config.num_hidden_layers))
        self.norm = Norm(mesh, config.hidden_size, kind=config.norm, eps=config.rms_norm_eps)
        for module in (self.layers, self.norm):
            for _, p in parameters(module):
                p.uses = self.halves
        self.lm_head = ColumnLinear(mesh, config.hidden_size, vocab, std=std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
            self.lm_head.weight.uses = 2
        self._rotations: dict[int, Tensor] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) token ids -> (n, D), the head's input."""
        T = tokens.shape[1]
        x = self.embed_tokens(tokens.flatten())  # (n, D)
        if self.embed_positions is not None:
            x = x + F.embedding(self._positions(tokens), use(self.embed_positions))
        rotation, training = self._rotation(T), torch.is_grad_enabled()
        if self.recompute == "full" and training:
            for layer in self.layers:
                x = checkpoint(layer, x, T, rotation, use_reentrant=False, preserve_rng_state=False)
            return self.norm(x)
        selective = self.recompute == "selective"
        streams: list[Stream] = [(part, None) for part in x.chunk(self.halves if training else 1)]
        for layer in cast("list[Layer]", self.layers):
            streams = [layer.attend(stream, T, rotation, selective) for stream in streams]
            streams = [layer.feed_forward(stream, selective) for stream in streams]
        parts = [_normed(self.norm, stream)[1] for stream in streams]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def logits(self, x: Tensor) -> Tensor:
        """(n, D) -> (N, V/tp), this rank's columns of the padded vocabulary."""
        return column_parallel(x, self.mesh, self.lm_head)

    def _positions(self, tokens: Tensor) -> Tensor:
        """The position in its sequence of each token that this rank has between the linears: (n,)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens))  # (N,)
        return positions.chunk(self.mesh.tp)[self.mesh.tp_rank] if self.mesh.sequence_parallel else positions

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
    """(2, T, 1, d/2): cosines and sines of position x frequency (Su et al. 2021, arXiv:2104.09864), float32.

    Hugging Face's layout: dims i and i + d/2 turn together, so its weights are used unpermuted.
    """
    d = head_dim(config)
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, d, 2).float() / d)  # (d/2,)
    if config.rope_scaling.rope_type == "llama3":
        frequencies = _stretch(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(T).float(), frequencies)  # (T, d/2)
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(2)


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's scaling: long wavelengths slowed by `factor`, short ones kept, a smooth ramp between them."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # (d/2,) in the trained context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)
