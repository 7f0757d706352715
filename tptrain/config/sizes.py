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


def parameter_shapes(model: ModelConfig, tp: int) -> Iterator[ParameterShape]:
    """Every parameter of `model.Decoder` at that TP degree, in the order and under the names it gives them."""
    vocab = padded_vocab_size(model.vocab_size)
    if model.position_embedding == "learned":
        yield ParameterShape("embed_positions", (model.max_position_embeddings, model.hidden_size), tp, False)
    yield ParameterShape("embed_tokens.weight", (vocab, model.hidden_size), 1, False)
    for i in range(model.num_hidden_layers):
        yield from _layer_shapes(model, tp, f"layers.{i}.")
    yield from _norm_shapes("norm", model, tp)
    if not model.tie_word_embeddings:
        yield ParameterShape("lm_head.weight", (vocab, model.hidden_size), 1, False)


def _layer_shapes(model: ModelConfig, tp: int, prefix: str) -> Iterator[ParameterShape]:
    hidden, width, d = model.hidden_size, model.intermediate_size, head_dim(model)
    queries, values = model.num_attention_heads * d, kv_heads(model) * d
    attn, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    copies = max(1, tp // kv_heads(model))  # fewer KV heads than ranks: neighbours share one, each with its own queries
    yield from _norm_shapes(f"{prefix}input_layernorm", model, tp)
    yield from _column_shapes(f"{attn}q_proj", (queries, hidden), model.attention_bias)
    for name in ("k_proj", "v_proj"):
        yield from _column_shapes(f"{attn}{name}", (values, hidden), model.attention_bias, copies)
    yield from _row_shapes(f"{attn}o_proj", (hidden, queries), model.attention_bias, tp)
    if model.qk_norm:  # RMSNorm whatever `model.norm` is; each rank sees its own heads only
        for name in ("q_norm", "k_norm"):
            yield ParameterShape(f"{attn}{name}.weight", (d,), tp, True)
    yield from _norm_shapes(f"{prefix}post_attention_layernorm", model, tp)
    for name in ("gate_proj", "up_proj") if model.gated_ffn else ("up_proj",):
        yield from _column_shapes(f"{mlp}{name}", (width, hidden), model.mlp_bias)
    yield from _row_shapes(f"{mlp}down_proj", (hidden, width), model.mlp_bias, tp)


def _column_shapes(name: str, shape: tuple[int, int], bias: bool, replicas: int = 1) -> Iterator[ParameterShape]:
    """A linear with sharded outputs, so its bias is sharded with them."""
    yield ParameterShape(f"{name}.weight", shape, replicas, replicas > 1)
    if bias:
        yield ParameterShape(f"{name}.bias", shape[:1], replicas, replicas > 1)


def _row_shapes(name: str, shape: tuple[int, int], bias: bool, tp: int) -> Iterator[ParameterShape]:
    """A linear with sharded inputs: its bias is added after the sum, so every rank has it whole."""
    yield ParameterShape(f"{name}.weight", shape, 1, False)
    if bias:
        yield ParameterShape(f"{name}.bias", shape[:1], tp, False)


def _norm_shapes(name: str, model: ModelConfig, tp: int) -> Iterator[ParameterShape]:
    for leaf in ("weight", "bias") if model.norm == "layernorm" else ("weight",):
        yield ParameterShape(f"{name}.{leaf}", (model.hidden_size,), tp, False)


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model: with the padding of the vocabulary, a tied embedding once."""
    return sum(shape.elements for shape in parameter_shapes(model, tp=1))


def local_parameter_count(model: ModelConfig, tp: int) -> int:
    """Parameters that one rank holds, at a TP degree that the model allows. Every rank holds as many."""
    return sum(shape.local(tp) for shape in parameter_shapes(model, tp))


def checkpoint_bytes(model: ModelConfig) -> int:
    """A checkpoint's tensors: float32 weights and two float32 moments, each global element written once."""
    return 3 * FLOAT * parameter_count(model)


# --------------------------------------------------------------------------------------------------------------- memory


def rank_memory(config: Config, tp: int) -> dict[str, int]:
    """Bytes on one rank, by part, at the peak of a step: the loss of a micro-batch, when all activations are alive.

    As on a CUDA GPU, with the kernels that PyTorch chooses there. Not counted: what the backward pass holds beside the
    activations (less than it has released by then, unless the model is shallow), NCCL's and cuBLAS's buffers, the CUDA
    context, and what the allocator wastes.
    """
    train, element = config.train, BYTES[config.train.precision]
    local = FLOAT * local_parameter_count(config.model, tp)
    tokens = train.micro_batch_size * train.seq_len
    vocab = padded_vocab_size(config.model.vocab_size)
    # The softmax is a float32 tensor. So are the scores, unless the logits serve: float32, with no padding to mask out.
    copies = 1 if element == FLOAT and vocab == config.model.vocab_size else 2
    return {
        "weights": local,
        "gradients": local,
        "optimizer": 2 * local,  # AdamW's two moments
        "weight copies": _weight_copies(config.model, tp, element),
        "activations": _activations(config, tp),
        "logits": tokens * vocab // tp * (element + FLOAT * copies),
    }


def _weight_copies(model: ModelConfig, tp: int, element: int) -> int:
    """Bytes of the weights in a lower compute precision, which autograd keeps from forward to backward.

    Not kept: a linear's bias, and the embeddings, which are looked up in float32. A tied one is also the head's weight.
    """
    if element == FLOAT:
        return 0  # the parameters themselves are used
    kept = [s for s in parameter_shapes(model, tp) if not s.name.endswith("proj.bias") and "embed_" not in s.name]
    head = padded_vocab_size(model.vocab_size) * model.hidden_size // tp if model.tie_word_embeddings else 0
    return element * (sum(shape.local(tp) for shape in kept) + head)


def _activations(config: Config, tp: int) -> int:
    """Bytes that autograd saves in the forward pass of a micro-batch, without weights and (N, v) tensors.

    The residual stream is kept as the input of each norm; additions, transposes and all-reduces keep nothing.
    """
    model, N = config.model, config.train.micro_batch_size * config.train.seq_len
    element = BYTES[config.train.precision]
    head = element * N * model.hidden_size  # the head's input: the last norm's output
    ids = N * (ID + (tp > 1))  # the embedding's ids, and the mask of those that other ranks hold
    targets = N * (ID + 1)  # the loss's, with the same mask
    return model.num_hidden_layers * _layer_activations(config, tp) + _norm_activations(config) + head + ids + targets


def _norm_activations(config: Config) -> int:
    """A norm's input (N, D), and in float32 for each token 1 / rms (RMSNorm) or mean and 1 / deviation (LayerNorm)."""
    N = config.train.micro_batch_size * config.train.seq_len
    statistics = 2 if config.model.norm == "layernorm" else 1
    return N * (BYTES[config.train.precision] * config.model.hidden_size + FLOAT * statistics)


def _layer_activations(config: Config, tp: int) -> int:
    """Bytes that autograd saves for one layer.

    Of (N, D): the inputs of both norms, their outputs (inputs of q, k, v and of the FFN). Attention: q, k, v as the
    kernel takes them, its output (which is o_proj's input) and the log-sum-exp of each query, float32, but no scores;
    with qk_norm also q and k before it, and 1 / rms; with rotary positions below float32 the converted cosines and
    sines, for q and for k. FFN: gate, act(gate), up and their product, or up and act(up).
    """
    model, train, c = config.model, config.train, BYTES[config.train.precision]
    T, d = train.seq_len, head_dim(model)
    N = train.micro_batch_size * T
    h, k = model.num_attention_heads // tp, max(1, kv_heads(model) // tp)
    size = 2 * _norm_activations(config) + 2 * c * N * model.hidden_size
    if c == FLOAT and h != k:
        # No fused CUDA kernel takes grouped queries in float32 (F.scaled_dot_product_attention's documentation, PyTorch
        # 2.13): k and v are repeated for every query head, and the T x T probabilities are kept.
        size += c * N * h * (4 * d + T)
    else:
        size += c * N * d * 2 * (h + k) + FLOAT * N * h
    if model.qk_norm:
        size += N * (h + k) * (c * d + FLOAT)
    if model.position_embedding == "rope" and c < FLOAT:
        size += 2 * c * 2 * T * d
    return size + c * N * model.intermediate_size // tp * (4 if model.gated_ffn else 2)


# -------------------------------------------------------------------------------------------------------------- traffic


class Collective(NamedTuple):
    """All-reduces of one kind and size."""

    name: str
    calls: int  # in an optimizer step
    bytes: int  # of one, on each rank
    group: Literal["tp", "kv", "dp"]  # kv: the tp / kv_heads neighbours that share KV heads


class GradientBucket(NamedTuple):
    """What `optim.Bucket` reduces as one tensor."""

    replicas: int
    partial_grad: bool
    elements: int  # rounded up to whole rows, and the flag that rides along


def gradient_buckets(model: ModelConfig, tp: int) -> list[GradientBucket]:
    """As `optim.Gradients` cuts them: parameters that are reduced alike, in runs of about BUCKET_ELEMENTS."""
    found: list[GradientBucket] = []
    shapes = sorted(parameter_shapes(model, tp), key=lambda s: (s.replicas, s.partial_grad))
    for (replicas, partial), alike in groupby(shapes, key=lambda s: (s.replicas, s.partial_grad)):
        fills = [0]
        for shape in alike:
            if fills[-1] and fills[-1] + shape.local(tp) > BUCKET_ELEMENTS:
                fills.append(0)
            fills[-1] += shape.local(tp)
        found += [GradientBucket(replicas, partial, math.ceil(fill / BUCKET_ROW) * BUCKET_ROW + 1) for fill in fills]
    return found


def collectives(config: Config, tp: int, dp: int) -> list[Collective]:
    """The all-reduces that a rank takes part in during one optimizer step, gradient accumulation included.

    Not counted: what validation, logging and checkpoints send.
    """
    model, train = config.model, config.train
    batches = train.global_batch_size // dp // train.micro_batch_size  # micro-batches of a rank
    tokens = train.micro_batch_size * train.seq_len
    hidden = tokens * model.hidden_size * BYTES[train.precision]
    layers = model.num_hidden_layers
    buckets = gradient_buckets(model, tp)
    found: list[Collective] = []
    if tp > 1:
        found += [
            Collective("embedding, forward", batches, hidden, "tp"),
            Collective("layers, forward", 2 * layers * batches, hidden, "tp"),
            Collective("layers, backward", 2 * layers * batches, hidden, "tp"),
            Collective("output head, backward", batches, hidden, "tp"),
            Collective("loss, maximum", batches, FLOAT * tokens, "tp"),
            Collective("loss, sums", batches, 2 * FLOAT * tokens, "tp"),
            Collective("gradient norm and flag", 1, 2 * FLOAT, "tp"),
        ]
        partial = Counter((bucket.replicas, bucket.elements) for bucket in buckets if bucket.partial_grad)
        for (replicas, elements), count in partial.items():
            group = "tp" if replicas == tp else "kv"
            found.append(Collective("gradients of replicated heads and norms", count, FLOAT * elements, group))
    if dp > 1:
        for elements, count in Counter(bucket.elements for bucket in buckets).items():
            found.append(Collective("gradients", count, FLOAT * elements, "dp"))
    return found


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
