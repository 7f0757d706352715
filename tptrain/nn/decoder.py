"""The decoder. Read it top to bottom; the all-reduces are in `linear.py`: `_ColumnParallel` (backward) and
`_RowParallel` (forward).

Shapes: B batch, T sequence, N = B*T tokens, n the tokens a rank has between the linears: N, or N/tp with sequence
parallelism. D hidden, H heads, K KV heads, d head_dim, F FFN width, V padded vocabulary. `/tp` marks a dim of which
this rank has its part. Parameter names follow Hugging Face's Llama.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tptrain.models.sizes import Facts
from tptrain.models.spec import AttentionSpec, DecoderSpec, FFNSpec, LayerSpec, NormSpec
from tptrain.nn.attention import Attention
from tptrain.nn.context import Context
from tptrain.nn.cross_entropy import OutputHead, capped
from tptrain.nn.embedding import VocabEmbedding
from tptrain.nn.ffn import FFN
from tptrain.nn.linear import ColumnLinear, PendingSum, Recompute
from tptrain.nn.norm import Norm
from tptrain.nn.parameter import Parameter, parameter, parameters, sharding, use
from tptrain.ops.table import REFERENCE, Operations
from tptrain.parallel.mesh import Mesh, tp_grid

# The module of each mixer's spec, made from (spec, decoder's spec, mesh, operations). A token mixer is called with
# (n, D), the context and what computes its input again; a channel mixer without the context. Both return a PendingSum.
MIXERS: dict[type, Callable[[Any, DecoderSpec, Mesh, Operations], nn.Module]] = {AttentionSpec: Attention, FFNSpec: FFN}


class Stream(NamedTuple):
    """The residual stream (n, D), and the branch that is added to it next."""

    x: Tensor
    branch: PendingSum | None = None


class Layer(nn.Module):
    """Two branches from the residual stream, each with an all-reduce at its entrance (backward) and exit (forward)."""

    def __init__(self, spec: LayerSpec, decoder: DecoderSpec, mesh: Mesh, ops: Operations) -> None:
        super().__init__()

        def norm(norm_spec: NormSpec | None) -> Norm | None:
            return None if norm_spec is None else Norm(mesh, ops, decoder.hidden_size, norm_spec)

        self.parallel, self.branch_scale = spec.parallel, spec.branch_scale
        self.input_layernorm = norm(spec.norm)
        self.self_attn = MIXERS[type(spec.token_mixer)](spec.token_mixer, decoder, mesh, ops)
        self.attn_output_norm = norm(spec.output_norm)
        self.post_attention_layernorm = norm(spec.norm)
        self.mlp = MIXERS[type(spec.channel_mixer)](spec.channel_mixer, decoder, mesh, ops)
        self.mlp_output_norm = norm(spec.output_norm)

    def mix_tokens(self, stream: Stream, context: Context, selective: bool = False) -> Stream:
        """Add the branch before, and begin this one; `selective`: the linears' inputs are computed again, not kept."""
        x, h = normed(self.input_layernorm, stream)
        branch = self.self_attn(h, context, _again(self.input_layernorm, x) if selective else None)
        return Stream(x, self._exit(branch, self.attn_output_norm))

    def mix_channels(self, stream: Stream, selective: bool = False) -> Stream:
        """Wait for the tokens' sum, and begin the FFN; where the branches are parallel, wait only afterwards."""
        x, h = normed(self.post_attention_layernorm, Stream(stream.x) if self.parallel else stream)
        branch = self.mlp(h, _again(self.post_attention_layernorm, x) if selective else None)
        if self.parallel and stream.branch is not None:
            x = x + stream.branch.wait()
        return Stream(x, self._exit(branch, self.mlp_output_norm))

    def _exit(self, branch: PendingSum, norm: Norm | None) -> PendingSum:
        """The branch with what is done to it before it is added."""
        if norm is None and self.branch_scale == 1.0:
            return branch

        def then(y: Tensor) -> Tensor:
            y = y if norm is None else norm(y)  # (n, D)
            return y if self.branch_scale == 1.0 else y * self.branch_scale

        return replace(branch, then=then)

    def forward(self, stream: Stream, context: Context, selective: bool = False) -> Stream:
        return self.mix_channels(self.mix_tokens(stream, context, selective), selective)

    def whole(self, stream: Stream, context: Context) -> Stream:
        """The layer with its last branch added, for what is computed again as one."""
        x, branch = self(stream, context)
        return Stream(x + branch.wait())


class Segment(NamedTuple):
    """A piece of the forward pass, from stream to stream, and the unit whose memory its weights are in."""

    unit: str
    parameters: list[nn.Parameter]
    forward: Callable[[Stream, Context], Stream]


def _parameters(*modules: nn.Module | None) -> list[nn.Parameter]:
    return [p for module in modules if module is not None for p in module.parameters()]


def normed(norm: Norm | None, stream: Stream) -> tuple[Tensor, Tensor]:
    """The residual stream with its branch added, and the norm of it, if it has one: (n, D) each."""
    x, branch = stream
    if norm is None:
        x = x if branch is None else x + branch.wait()
        return x, x
    return (x, norm(x)) if branch is None else norm.add(x, branch.wait())


def _again(norm: Norm | None, x: Tensor) -> Recompute:
    """What computes the norm of x once more; where there is none, x is kept."""
    return None if norm is None else norm.again(x)


class Decoder(nn.Module):
    """Embedding, layers, norm and output head, without memory: a `Store` gives the weights theirs.

    Activations have the precision of the weights.
    """

    def __init__(self, spec: DecoderSpec, mesh: Mesh, ops: Operations) -> None:
        super().__init__()
        self.spec, self.mesh = spec, mesh
        hidden, vocab = spec.hidden_size, spec.padded_vocab_size
        self.embed_tokens = VocabEmbedding(mesh, vocab, hidden, std=spec.std)
        self.embed_positions: Parameter | None = None
        if spec.learned_positions:
            summed = ("tp",) if mesh.sequence_parallel else ()
            layout = sharding(mesh, (spec.max_positions, hidden), summed=summed)
            self.embed_positions = parameter(mesh, layout, spec.std)
        self.layers = nn.ModuleList(Layer(layer, spec, mesh, ops) for layer in spec.layers)
        self.norm = Norm(mesh, ops, hidden, spec.norm)
        self.lm_head = ColumnLinear(mesh, hidden, vocab, std=spec.std)
        if spec.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.tables: dict[Any, Tensor] = {}  # of rotary positions

    def forward(self, tokens: Tensor, context: Context | None = None) -> Tensor:
        """(B, T) token ids -> (n, D), the head's input."""
        context = context or self.context(tokens)
        stream = self.embed(tokens, context)
        for layer in cast("list[Layer]", self.layers):
            stream = layer(stream, context)
        return self.head_input(stream)

    def context(self, tokens: Tensor) -> Context:
        return Context(tokens.shape[1], tokens.device, self.tables)

    def embed(self, tokens: Tensor, context: Context) -> Stream:
        """(B, T) token ids -> (n, D)."""
        x = self.embed_tokens(tokens.flatten())  # (n, D)
        if self.embed_positions is not None:
            x = x + F.embedding(self._own(context.positions(len(tokens))), use(self.embed_positions))
        if self.spec.embedding_scale != 1.0:
            x = x * x.new_tensor(self.spec.embedding_scale)  # rounded to x's precision, as in Transformers' Gemma
        return Stream(x)

    def head_input(self, stream: Stream) -> Tensor:
        """(n, D) -> (n, D), normed, and scaled as the logits are to be."""
        x = normed(self.norm, stream)[1]
        return x if self.spec.logit_scale == 1.0 else x * self.spec.logit_scale

    @property
    def output_head(self) -> OutputHead:
        return OutputHead(self.lm_head.weight, self.spec.vocab_size, self.spec.logit_softcap)

    def logits(self, x: Tensor) -> Tensor:
        """(n, D), the head's input -> (N, V/tp), this rank's columns of the padded vocabulary."""
        return capped(self.lm_head(x), self.spec.logit_softcap)

    def segments(self, recompute: str = "none") -> list["Segment"]:
        """What the forward pass is made of, in order: the pieces that a schedule runs one by one.

        With `recompute=full` a layer is one segment, whose forward pass comes twice.
        """
        table = list(self.embed_tokens.parameters())
        pieces = [Segment("embedding", table, lambda stream, context: self.embed(stream.x, context))]
        if self.embed_positions is not None:
            pieces[0].parameters.append(self.embed_positions)
        for i, layer in enumerate(cast("list[Layer]", self.layers)):
            if recompute == "full":
                pieces.append(Segment(f"layers.{i}", list(layer.parameters()), layer.whole))
                continue
            selective = recompute == "selective"
            tokens = partial(layer.mix_tokens, selective=selective)
            channels = partial(layer.mix_channels, selective=selective)
            attention = _parameters(layer.input_layernorm, layer.self_attn, layer.attn_output_norm)
            pieces.append(Segment(f"layers.{i}", attention, tokens))
            pieces.append(
                Segment(
                    f"layers.{i}",
                    _parameters(layer.post_attention_layernorm, layer.mlp, layer.mlp_output_norm),
                    lambda stream, _, mix=channels: mix(stream),
                )
            )
        head = Segment("head", list(self.norm.parameters()), lambda stream, _: Stream(self.head_input(stream)))
        return [*pieces, head]

    def unit_of(self, name: str) -> str:
        """The unit of memory and reduction that a parameter belongs to: a layer, the embedding or the head."""
        if name.startswith("layers."):
            return ".".join(name.split(".")[:2])
        return "head" if name.startswith(("norm.", "lm_head.")) else "embedding"

    def _own(self, positions: Tensor) -> Tensor:
        """The positions (N,) of those tokens that this rank has between the linears: (n,)."""
        mesh = self.mesh
        return positions.chunk(mesh.size("tp"))[mesh.index("tp")] if mesh.sequence_parallel else positions


def on_meta(spec: DecoderSpec) -> Decoder:
    """A whole decoder on no device, for the shapes of its parameters."""
    return Decoder(spec, Mesh(tp_grid(1, 1, 1), 0, torch.device("meta")), REFERENCE)


def parameter_count(spec: DecoderSpec | Facts) -> int:
    """Parameters of a model, padding of the vocabulary among them; a layer of each kind is built, on no device."""
    if isinstance(spec, Facts):
        return spec.parameters
    kinds = Counter(spec.layers)
    model = on_meta(replace(spec, layers=tuple(kinds)))

    def count(module: nn.Module) -> int:
        return sum(math.prod(p.sharding.shape) for _, p in parameters(module))

    more = zip(model.layers, kinds.values(), strict=True)
    return count(model) + sum(count(layer) * (times - 1) for layer, times in more)
