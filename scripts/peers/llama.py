# pyright: basic
"""A plain Llama in PyTorch, as PyTorch's tensor-parallel tutorial writes it: nothing in it knows of parallelism."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cells import Model


class Attention(nn.Module):
    def __init__(self, m: Model) -> None:
        super().__init__()
        self.d = m.head_dim
        self.q_proj = nn.Linear(m.hidden, m.heads * m.head_dim, bias=False)
        self.k_proj = nn.Linear(m.hidden, m.kv_heads * m.head_dim, bias=False)
        self.v_proj = nn.Linear(m.hidden, m.kv_heads * m.head_dim, bias=False)
        self.o_proj = nn.Linear(m.heads * m.head_dim, m.hidden, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        B, T = q.shape[:2]  # of q: x is a shard of the sequence where sequence parallelism gathers it in the linears
        q, k, v = (y.view(B, T, -1, self.d) for y in (q, k, v))  # this rank's heads
        q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class FFN(nn.Module):
    def __init__(self, m: Model) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(m.hidden, m.ffn, bias=False)
        self.up_proj = nn.Linear(m.hidden, m.ffn, bias=False)
        self.down_proj = nn.Linear(m.ffn, m.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, m: Model) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(m.hidden, eps=1e-5)
        self.self_attn = Attention(m)
        self.post_attention_layernorm = nn.RMSNorm(m.hidden, eps=1e-5)
        self.mlp = FFN(m)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Parameters have Hugging Face's names, without the `model.` before them."""

    def __init__(self, m: Model) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(m.vocab, m.hidden)
        self.layers = nn.ModuleList(Layer(m) for _ in range(m.layers))
        self.norm = nn.RMSNorm(m.hidden, eps=1e-5)
        self.lm_head = nn.Linear(m.hidden, m.vocab, bias=False)
        self.register_buffer("rotation", rotary(m.head_dim, m.seq_len), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.rotation)
        return self.lm_head(self.norm(x))


def rotary(d: int, T: int) -> Tensor:
    """(2, T, 1, d): cosines and sines, in Hugging Face's layout."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, d, 2).float() / d)
    angles = torch.outer(torch.arange(T).float(), frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()]).unsqueeze(2)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    cos, sin = rotation.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
