"""What a Llama (SwiGLU, RMSNorm, rotary positions, no biases) takes, in closed form: a check of the dry run.

Symbols: N tokens of a micro-batch, n of them between the linears on a rank; D hidden, d head_dim; h and k a rank's
query and KV heads, f its FFN width, v its rows of the padded vocabulary; c bytes of an element of the weights.
"""

import math
from collections import Counter

from tptrain.config import Config
from tptrain.config.schema import head_dim, kv_heads, micro_batch_size, padded_vocab_size

FLOAT, ID = 4, 8  # bytes
LOGITS_BYTES = 256 * 2**20  # of a chunk of logits in float32 on a GPU


class ClosedForm:
    def __init__(self, config: Config, tp: int, dp: int) -> None:
        model, train = config.model, config.train
        self.config, self.tp, self.dp = config, tp, dp
        self.sp = config.parallel.sequence_parallel and tp > 1
        self.c = {"fp32": 4, "bf16": 2}[train.precision]
        self.D, self.d, self.L = model.hidden_size, head_dim(model), model.num_hidden_layers
        self.h, self.k = model.num_attention_heads // tp, max(1, kv_heads(model) // tp)
        self.f, self.v = model.intermediate_size // tp, padded_vocab_size(model.vocab_size) // tp
        self.tables = 1 if model.tie_word_embeddings else 2  # of the vocabulary
        self.b = micro_batch_size(config, dp)
        self.N = self.b * train.seq_len
        self.n = self.N // tp if self.sp else self.N

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        model = self.config.model
        heads = 2 * model.num_attention_heads + 2 * kv_heads(model)
        layer = self.D * (heads * self.d + 3 * model.intermediate_size + 2)
        return self.L * layer + self.D + self.tables * padded_vocab_size(model.vocab_size) * self.D

    @property
    def units(self) -> list[int]:
        """Elements of a rank's units: embedding, layers, head."""
        layer = self.D * ((2 * self.h + 2 * self.k) * self.d + 3 * self.f + 2)
        head = self.D + (self.v * self.D if self.tables == 2 else 0)
        return [self._padded(elements) for elements in (self.v * self.D, *[layer] * self.L, head)]

    def _padded(self, elements: int) -> int:
        return math.ceil(elements / (64 * self.dp)) * 64 * self.dp

    @property
    def state(self) -> int:
        """Weights, float32 gradients, moments, and masters of rounded weights."""
        held = sum(self.units)
        own = held // self.dp if self.config.parallel.zero else held
        return (self.c + FLOAT) * held + (2 if self.c == FLOAT else 3) * FLOAT * own

    @property
    def activations(self) -> int:
        """Kept for the backward pass when the loss of the last part of a micro-batch begins, its input included.

        A layer: both norms' inputs with a float32 a token; their outputs, which are the linears' inputs; q, k, v, what
        attention puts out and a float32 a query; gate, up and their product. Beside them the token ids, the rotary
        table, and the head's norm.
        """
        recompute, c = self.config.train.recompute, self.c
        stream = c * self.n * self.D
        norm = stream + FLOAT * self.n
        attention = c * self.N * self.d * 2 * (self.h + self.k) + FLOAT * self.N * self.h
        if c == FLOAT and self.h != self.k:  # no fused kernel: k and v for each query head, T x T probabilities
            attention = c * self.N * self.h * (4 * self.d + self.config.train.seq_len)
        layer = 2 * norm + attention + 2 * c * self.N * self.f
        if recompute != "selective":
            layer += 2 * stream + c * self.N * self.f
        layers = self.L * (stream if recompute == "full" else layer)
        table = FLOAT * self.config.train.seq_len * self.d
        return layers + norm + stream + 2 * ID * self.N + table

    @property
    def calls(self) -> Counter[tuple[str, str, int]]:
        """Collectives of an optimizer step: (operation, axis, bytes of the whole tensor) -> how often."""
        train, tp, dp = self.config.train, self.tp, self.dp
        batches = train.global_batch_size // dp // self.b
        calls: Counter[tuple[str, str, int]] = Counter()
        if tp > 1:
            parts = 2 if self.config.parallel.overlap else 1
            tokens = self.N // parts
            hidden, batches = tokens * self.D * self.c, batches * parts
            forward = 2 * self.L * (2 if train.recompute == "full" else 1)  # entrances of linears, and as many exits
            backward = 2 * self.L
            if self.sp:  # embedding, entrances and exits of layers, inputs again, head
                calls["all_gather", "tp", hidden] += batches * (1 + forward + 2 * backward + 1)
                calls["reduce_scatter", "tp", hidden] += batches * (1 + forward + backward + 1)
            else:
                calls["all_reduce", "tp", hidden] += batches * (1 + forward + backward + 1)
            chunk = math.ceil(tokens / math.ceil(tokens / max(1, LOGITS_BYTES // (FLOAT * self.v))))
            for start in range(0, tokens, chunk):
                calls["all_gather", "tp", tp * 2 * FLOAT * min(chunk, tokens - start)] += batches
        if self.sp:  # norms see a rank's tokens only
            calls["all_reduce", "tp", FLOAT * 2 * self.D] += self.L
            calls["all_reduce", "tp", FLOAT * self.D] += 1
        for elements in self.units if dp > 1 else []:
            if self.config.parallel.zero:
                calls["reduce_scatter", "dp", FLOAT * elements] += 1
                calls["all_gather", "dp", self.c * elements] += 1
            else:
                calls["all_reduce", "dp", FLOAT * elements] += 1
        if tp * dp > 1:
            axis = "world" if tp > 1 and dp > 1 else "tp" if tp > 1 else "dp"
            calls["all_gather", axis, tp * dp * 2 * FLOAT] += 1
        return calls
