"""Causal self-attention on this rank's heads: the token mixer of most models.

Shapes: see decoder.py.
"""

from torch import Tensor, nn

from tptrain.models.spec import AttentionSpec, DecoderSpec
from tptrain.nn.context import Context
from tptrain.nn.linear import ColumnLinear, Joined, PendingSum, Recompute, RowLinear
from tptrain.nn.norm import JointNorm, Norm
from tptrain.nn.rotary import rotate, rotate_qkv
from tptrain.ops.table import Operations
from tptrain.parallel.mesh import Mesh


class Attention(nn.Module):
    """MHA, GQA or MQA."""

    def __init__(self, spec: AttentionSpec, decoder: DecoderSpec, mesh: Mesh, ops: Operations) -> None:
        super().__init__()
        self.spec, self.ops, self.d = spec, ops, spec.head_dim
        hidden, std, bias = decoder.hidden_size, decoder.std, spec.qkv_bias
        queries, values = spec.heads * self.d, spec.kv_heads * self.d
        self.q_proj = ColumnLinear(mesh, hidden, queries, std=std, bias=bias)
        # Where there are fewer KV heads than ranks, neighbours on the kv axis have the same ones.
        self.k_proj = ColumnLinear(mesh, hidden, values, std=std, bias=bias, axis="kv_shard", copies="kv")
        self.v_proj = ColumnLinear(mesh, hidden, values, std=std, bias=bias, axis="kv_shard", copies="kv")
        self.o_proj = RowLinear(mesh, queries, hidden, std=decoder.residual_std, bias=spec.output_bias)
        self.qkv = Joined(self.q_proj, self.k_proj, self.v_proj)
        self.joined = self.qkv.runs
        self.heads = spec.heads // mesh.size("tp")  # H/tp
        self.kv_heads = spec.kv_heads // mesh.size("kv_shard")  # K/tp, at least 1
        self.q_norm = self.k_norm = None
        if spec.qk_norm is not None and spec.joint_qk_norm:
            self.q_norm = JointNorm(mesh, queries, spec.qk_norm)
            self.k_norm = JointNorm(mesh, values, spec.qk_norm, axis="kv_shard", copies="kv")
        elif spec.qk_norm is not None:
            self.q_norm = Norm(mesh, ops, self.d, spec.qk_norm, own_heads=True)
            self.k_norm = Norm(mesh, ops, self.d, spec.qk_norm, own_heads=True)

    def forward(self, x: Tensor, context: Context, recompute: Recompute = None) -> PendingSum:
        """(n, D) -> (n, D)."""
        spec, heads = self.spec, [self.heads, self.kv_heads, self.kv_heads]
        qkv = self.qkv(x, recompute)  # (N, (H + 2 K)/tp * d)
        qkv = qkv.view(*context.rows, sum(heads), self.d)  # (B, T, (H + 2 K)/tp, d)
        rotary = spec.rotary
        if self.q_norm is None and rotary is not None and rotary.dims is None:
            q, k, v = rotate_qkv(qkv, context.rotation(rotary, self.d), heads, self.ops)
        else:
            q, k, v = qkv.split(heads, dim=2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            if rotary is not None:
                rotation = context.rotation(rotary, rotary.dims or self.d)
                q, k = rotate(q, rotation, self.ops), rotate(k, rotation, self.ops)
        y = context.attend(self, q, k, v)  # (B, T, H/tp, d)
        return self.o_proj(y.reshape(-1, self.heads * self.d))
