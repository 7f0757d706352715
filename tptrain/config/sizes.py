"""What a run will take, in closed form: parameters, memory, traffic and operations. Imports no torch.

Symbols: B sequences of T tokens in a micro-batch, N = B*T tokens; D hidden, d head_dim; h and k this rank's query and
KV heads, v its part of the padded vocabulary; c bytes of an element in the compute precision. What is said here of the
model follows from `model.py`, `layers.py`, `loss.py` and `optim.py`, and the tests hold it to them.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from tptrain.config.schema import Config, ModelConfig, head_dim, kv_heads, padded_vocab_size

BYTES = {"fp32": 4, "bf16": 2}  # an element in the compute precision
FLOAT = 4  # bytes of a float32
ID = 8  # bytes of a token id
BUCKET_ELEMENTS = 16 * 2**20  # of gradients that are reduced at once: 64 MiB of float32
BUCKET_ROW = 4096  # elements whose squares are summed at once: a bucket is rounded up to whole rows
LOGITS_BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}  # of a chunk in float32


def loss_chunk(tokens: int, columns: int, device: str = "cuda") -> int:
    """Tokens whose logits exist at once, on a rank with so many columns of the vocabulary: equal but for the last."""
    most = max(1, LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"]) // (FLOAT * max(1, columns)))
    return math.ceil(tokens / math.ceil(tokens / most))


# ----------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class ParameterShape:
    """One parameter, with the sharding that its `layers.ShardSpec` has."""

    name: str
    shape: tuple[int, ...]  # global
    replicas: int  # adjacent tp ranks that hold the same slice
    partial_grad: bool  # the gradient is a sum over those replicas

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def local(self, tp: int) -> int:
        """Elements of a rank's slice."""
        return self.elements * self.replicas // tp


def parameter_shapes(model: ModelConfig, tp: int, sequence_parallel: bool = False) -> Iterator[ParameterShape]:
    """Every parameter of `model.Decoder` at that TP degree, in the order and under the names it gives them."""
    vocab, some = padded_vocab_size(model.vocab_size), sequence_parallel and tp > 1
    if model.position_embedding == "learned":
        yield ParameterShape("embed_positions", (model.max_position_embeddings, model.hidden_size), tp, some)
    yield ParameterShape("embed_tokens.weight", (vocab, model.hidden_size), 1, False)
    for i in range(model.num_hidden_layers):
        yield from _layer_shapes(model, tp, f"layers.{i}.", some)
    yield from _norm_shapes("norm", model, tp, some)
    if not model.tie_word_embeddings:
        yield ParameterShape("lm_head.weight", (vocab, model.hidden_size), 1, False)


def _layer_shapes(model: ModelConfig, tp: int, prefix: str, some: bool) -> Iterator[ParameterShape]:
    """`some`: with sequence parallelism a rank applies what is not sharded to some of the tokens only."""
    hidden, width, d = model.hidden_size, model.intermediate_size, head_dim(model)
    queries, values = model.num_attention_heads * d, kv_heads(model) * d
    attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    copies = max(1, tp // kv_heads(model))  # fewer KV heads than ranks: neighbours share one, each with its own queries
    yield from _norm_shapes(f"{prefix}input_layernorm", model, tp, some)
    yield from _column_shapes(f"{attn}q_proj", (queries, hidden), model.attention_bias)
    for name in ("k_proj", "v_proj"):
        yield from _column_shapes(f"{attn}{name}", (values, hidden), model.attention_bias, copies)
    yield from _row_shapes(f"{attn}o_proj", (hidden, queries), model.attention_bias, tp, some)
    if model.qk_norm:  # RMSNorm whatever `model.norm` is; each rank sees its own heads only
        for name in ("q_norm", "k_norm"):
            yield ParameterShape(f"{attn}{name}.weight", (d,), tp, True)
    yield from _norm_shapes(f"{prefix}post_attention_layernorm", model, tp, some)
    for name in ("gate_proj", "up_proj") if model.gated_ffn else ("up_proj",):
        yield from _column_shapes(f"{mlp}{name}", (width, hidden), model.mlp_bias)
    yield from _row_shapes(f"{mlp}down_proj", (hidden, width), model.mlp_bias, tp, some)


def _column_shapes(name: str, shape: tuple[int, int], bias: bool, replicas: int = 1) -> Iterator[ParameterShape]:
    """A linear with sharded outputs, so its bias is sharded with them."""
    yield ParameterShape(f"{name}.weight", shape, replicas, replicas > 1)
    if bias:
        yield ParameterShape(f"{name}.bias", shape[:1], replicas, replicas > 1)


def _row_shapes(name: str, shape: tuple[int, int], bias: bool, tp: int, some: bool) -> Iterator[ParameterShape]:
    """A linear with sharded inputs: its bias is added after the sum, so every rank has it whole."""
    yield ParameterShape(f"{name}.weight", shape, 1, False)
    if bias:
        yield ParameterShape(f"{name}.bias", shape[:1], tp, some)


def _norm_shapes(name: str, model: ModelConfig, tp: int, some: bool) -> Iterator[ParameterShape]:
    for leaf in ("weight", "bias") if model.norm == "layernorm" else ("weight",):
        yield ParameterShape(f"{name}.{leaf}", (model.hidden_size,), tp, some)


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model: with the padding of the vocabulary, a tied embedding once."""
    return sum(shape.elements for shape in parameter_shapes(model, tp=1))


def checkpoint_bytes(model: ModelConfig) -> int:
    """A checkpoint's tensors: float32 weights and two float32 moments, each global element written once."""
    return 3 * FLOAT * parameter_count(model)


# --------------------------------------------------------------------------------------------------------------- memory


def rank_memory(config: Config, tp: int, dp: int = 1) -> dict[str, int]:
    """Bytes on one rank, by part, at the peak of a step: the loss of a micro-batch, when all activations are alive.

    As on a CUDA GPU, with the kernels that PyTorch chooses there. Not counted: what the backward pass holds beside the
    activations (less than it has released by then, unless the model is shallow), NCCL's and cuBLAS's buffers, the CUDA
    context, and what the allocator wastes.
    """
    element = BYTES[config.train.precision]
    buckets = gradient_buckets(config.model, tp, dp, config.parallel.sequence_parallel)
    held = sum(bucket.elements for bucket in buckets)
    mine = held // dp if config.parallel.zero else held  # what this rank updates
    return {
        "weights": element * held,
        "gradients": FLOAT * held,
        "optimizer": (2 if element == FLOAT else 3) * FLOAT * mine,  # AdamW's moments, and masters of rounded weights
        "activations": _activations(config, tp),
        "loss": _loss_memory(config, tp),
    }


def _loss_memory(config: Config, tp: int) -> int:
    """The gradient to the hidden states, with sequence parallelism also all tokens of these, and of one chunk of tokens
    the logits and their gradient.
    """
    element, columns = BYTES[config.train.precision], padded_vocab_size(config.model.vocab_size) // tp
    tokens = config.train.micro_batch_size * config.train.seq_len
    chunk = loss_chunk(tokens, columns)
    states = 2 if config.parallel.sequence_parallel and tp > 1 else 1
    return states * tokens * config.model.hidden_size * element + 2 * chunk * columns * element


def _activations(config: Config, tp: int) -> int:
    """Bytes that are kept in the forward pass of a micro-batch for the backward pass, without weights and the loss's.

    The residual stream is kept as the input of each norm; additions, rotations and collectives keep nothing.
    """
    model, N = config.model, config.train.micro_batch_size * config.train.seq_len
    n = _own_tokens(config, tp)
    head = BYTES[config.train.precision] * n * model.hidden_size  # the head's input: the last norm's output
    ids = N * ID  # the embedding's
    if model.position_embedding == "learned":
        ids += n * ID
    layers = model.num_hidden_layers * _layer_activations(config, tp)
    if config.train.recompute == "full":  # the input of each layer, and all of one
        layers = model.num_hidden_layers * head + _layer_activations(config, tp)
    return layers + _norm_activations(config, n) + head + ids


def _own_tokens(config: Config, tp: int) -> int:
    """Tokens of a micro-batch that a rank has between the linears."""
    N = config.train.micro_batch_size * config.train.seq_len
    return N // tp if config.parallel.sequence_parallel else N


def _norm_activations(config: Config, n: int) -> int:
    """A norm's input (n, D), and for each token in float32 the sum of squares, or of LayerNorm two numbers."""
    statistics = 2 if config.model.norm == "layernorm" else 1
    return n * (BYTES[config.train.precision] * config.model.hidden_size + FLOAT * statistics)


def _layer_activations(config: Config, tp: int) -> int:
    """Bytes that are kept for one layer.

    Of (n, D): the inputs of both norms and their outputs, which are inputs of q, k, v and of the FFN. Attention: q, k,
    v as the kernel takes them, its output (which is o_proj's input) and the log-sum-exp of each query, float32, but no
    scores; with qk_norm also q, k and v before it, and their sums of squares. FFN: gate, up and act(gate) * up, or up
    and act(up). With selective recomputation the norms' outputs and the last product are not kept.
    """
    model, train, c = config.model, config.train, BYTES[config.train.precision]
    T, d, n = train.seq_len, head_dim(model), _own_tokens(config, tp)
    N = train.micro_batch_size * T
    h, k = model.num_attention_heads // tp, max(1, kv_heads(model) // tp)
    again = train.recompute == "selective"
    size = 2 * _norm_activations(config, n) + (0 if again else 2 * c * n * model.hidden_size)
    if c == FLOAT and h != k:
        # No fused CUDA kernel takes grouped queries in float32 (F.scaled_dot_product_attention's documentation, PyTorch
        # 2.13): k and v are repeated for every query head, and the T x T probabilities are kept.
        size += c * N * h * (4 * d + T)
    else:
        size += c * N * d * 2 * (h + k) + FLOAT * N * h
    if model.qk_norm:  # v is kept as a part of q, k and v together
        size += N * (h + k) * (c * d + FLOAT)
    return size + c * N * model.intermediate_size // tp * ((2 if model.gated_ffn else 1) + (not again))


# -------------------------------------------------------------------------------------------------------------- traffic


class Collective(NamedTuple):
    """Calls of one kind and size."""

    name: str
    op: Literal["all_reduce", "all_gather", "reduce_scatter"]
    calls: int  # in an optimizer step
    bytes: int  # of one: of the whole tensor, which for all_gather is the result, for reduce_scatter the input
    group: Literal["tp", "kv", "dp", "world"]  # kv: the tp / kv_heads neighbours that share KV heads

    @property
    def reduced(self) -> float:
        """Bytes that as much traffic in all-reduces has: a gather or scatter is half of one."""
        return self.calls * self.bytes / (1 if self.op == "all_reduce" else 2)


class GradientBucket(NamedTuple):
    """What `buckets.Bucket` reduces as one tensor."""

    replicas: int
    partial_grad: bool
    elements: int  # rounded up to whole rows on each dp rank


def gradient_buckets(model: ModelConfig, tp: int, dp: int, sequence_parallel: bool = False) -> list[GradientBucket]:
    """As `buckets.make_buckets` cuts them: parameters that are treated alike, in runs of about BUCKET_ELEMENTS."""

    def kind(s: ParameterShape) -> tuple[int, bool, int]:
        return s.replicas, s.partial_grad, len(s.shape)

    found: list[GradientBucket] = []
    shapes = sorted(parameter_shapes(model, tp, sequence_parallel), key=kind)
    for (replicas, partial, _), alike in groupby(shapes, key=kind):
        fills = [0]
        for shape in alike:
            if fills[-1] and fills[-1] + shape.local(tp) > BUCKET_ELEMENTS:
                fills.append(0)
            fills[-1] += shape.local(tp)
        rows = BUCKET_ROW * dp
        found += [GradientBucket(replicas, partial, math.ceil(fill / rows) * rows) for fill in fills]
    return found


def collectives(config: Config, tp: int, dp: int) -> list[Collective]:
    """What a rank takes part in during one optimizer step, gradient accumulation included.

    Not counted: what validation, logging and checkpoints send.
    """
    found: list[Collective] = []
    if tp > 1:
        found += _tp_collectives(config, tp, dp)
    for bucket in gradient_buckets(config.model, tp, dp, config.parallel.sequence_parallel):
        size = FLOAT * bucket.elements
        if bucket.partial_grad:
            group = "tp" if bucket.replicas == tp else "kv"
            found.append(Collective("gradients of replicated parameters", "all_reduce", 1, size, group))
        if dp > 1 and config.parallel.zero:
            weights = BYTES[config.train.precision] * bucket.elements
            found.append(Collective("gradients", "reduce_scatter", 1, size, "dp"))
            found.append(Collective("weights", "all_gather", 1, weights, "dp"))
        elif dp > 1:
            found.append(Collective("gradients", "all_reduce", 1, size, "dp"))
    if tp * dp > 1:
        group = "world" if tp > 1 and dp > 1 else "tp" if tp > 1 else "dp"
        found.append(Collective("gradient norm and flag", "all_gather", 1, tp * dp * 2 * FLOAT, group))
    return found


def _tp_collectives(config: Config, tp: int, dp: int) -> list[Collective]:
    """Of the model and the loss, over tp, with all micro-batches of a step."""
    model, train = config.model, config.train
    batches = train.global_batch_size // dp // train.micro_batch_size  # micro-batches of a rank
    tokens = train.micro_batch_size * train.seq_len
    hidden = tokens * model.hidden_size * BYTES[train.precision]
    entrances = 2 * model.num_hidden_layers * batches  # of column-parallel linears, and as many exits of row-parallel
    again = entrances if train.recompute == "full" else 0  # a layer's forward pass comes twice
    parts = 2 if config.parallel.overlap else 1  # of a micro-batch, each on its own
    chunk = loss_chunk(tokens, padded_vocab_size(model.vocab_size) // tp)
    chunks = Counter([chunk] * (tokens // chunk) + ([tokens % chunk] if tokens % chunk else []))
    found = [
        Collective("loss, log sum exp and target", "all_gather", count * batches, tp * 2 * FLOAT * length, "tp")
        for length, count in chunks.items()
    ]
    if not config.parallel.sequence_parallel:
        return [
            Collective("embedding, forward", "all_reduce", batches, hidden, "tp"),
            Collective("layers, forward", "all_reduce", parts * (entrances + again), hidden // parts, "tp"),
            Collective("layers, backward", "all_reduce", parts * entrances, hidden // parts, "tp"),
            Collective("output head, backward", "all_reduce", batches, hidden, "tp"),
            *found,
        ]
    return [
        Collective("embedding, forward", "reduce_scatter", batches, hidden, "tp"),
        Collective("embedding, backward", "all_gather", batches, hidden, "tp"),
        Collective("layers, forward, entrances", "all_gather", entrances + again, hidden, "tp"),
        Collective("layers, forward, exits", "reduce_scatter", entrances + again, hidden, "tp"),
        Collective("layers, backward, exits", "all_gather", entrances, hidden, "tp"),
        Collective("layers, backward, inputs again", "all_gather", entrances, hidden, "tp"),
        Collective("layers, backward, entrances", "reduce_scatter", entrances, hidden, "tp"),
        Collective("output head, forward", "all_gather", batches, hidden, "tp"),
        Collective("output head, backward", "reduce_scatter", batches, hidden, "tp"),
        *found,
    ]


# ----------------------------------------------------------------------------------------------------------- operations


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Forward and backward: 6 for each weight that multiplies, and 12 L H d T for attention scores and values.

    PaLM's count (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): the causal half that a kernel skips is counted.
    """
    d = head_dim(model)
    attention = model.hidden_size * d * (2 * model.num_attention_heads + 2 * kv_heads(model))
    ffn = model.hidden_size * model.intermediate_size * (3 if model.gated_ffn else 2)
    head = model.hidden_size * padded_vocab_size(model.vocab_size)
    weights = model.num_hidden_layers * (attention + ffn) + head
    scores = 12 * model.num_hidden_layers * model.num_attention_heads * d * seq_len
    return 6.0 * weights + scores
