"""The closed forms of `plan`, held to the model itself, built on torch's meta device: full shapes, no memory."""

import math
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.reference import CASES
from tptrain.config import Config, ModelConfig, UserError, load_config
from tptrain.config.load import config_dir
from tptrain.config.schema import kv_heads, padded_vocab_size
from tptrain.config.sizes import (
    checkpoint_bytes,
    collectives,
    gradient_buckets,
    local_parameter_count,
    parameter_count,
    parameter_shapes,
    rank_memory,
)
from tptrain.layers import parameters
from tptrain.loss import vocab_parallel_cross_entropy
from tptrain.mesh import Mesh
from tptrain.model import Decoder
from tptrain.optim import Gradients, build_optimizer
from tptrain.plan import plan, ring_seconds, tp_degrees

GROUPS = sorted(file.stem for file in (config_dir() / "model").glob("*.yaml"))
MODELS = {name: case.ours for name, case in CASES.items()}
MODELS |= {name: load_config([f"model={name}"]).model for name in GROUPS}
SHAPES = [(name, tp) for name, model in MODELS.items() for tp in tp_degrees(Config(model=model))[0] if tp <= 16]


def _mesh(model: ModelConfig, tp: int, dp: int = 1, groups: bool = False) -> Mesh:
    """The last rank of a grid without processes: it has the padding of the vocabulary. A group is only its name."""
    known: dict[str, Any] = dict.fromkeys(item.name for item in fields(Mesh))
    known |= {
        "rank": tp * dp - 1,
        "world": tp * dp,
        "tp": tp,
        "device": torch.device("meta"),
        "kv_replicas": max(1, tp // kv_heads(model)),
    }
    if groups:
        known |= {"tp_group": "tp" if tp > 1 else None, "dp_group": "dp" if dp > 1 else None, "kv_group": "kv"}
    return Mesh(**known)


# ----------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(("name", "tp"), SHAPES)
def test_parameters_are_those_of_the_model(name: str, tp: int) -> None:
    model = MODELS[name]
    decoder = Decoder(model, _mesh(model, tp))
    real = dict(parameters(decoder))
    assert [(shape.name, shape.shape, shape.replicas, shape.partial_grad) for shape in parameter_shapes(model, tp)] == [
        (found, p.spec.shape, p.spec.replicas, p.spec.partial_grad) for found, p in real.items()
    ]
    assert local_parameter_count(model, tp) == sum(p.numel() for p in real.values())
    assert parameter_count(model) == sum(math.prod(p.spec.shape) for p in real.values())
    buckets = Gradients(decoder, _mesh(model, tp)).buckets
    assert [(bucket.replicas, bucket.partial_grad, bucket.elements) for bucket in gradient_buckets(model, tp)] == [
        (bucket.spec.replicas, bucket.spec.partial_grad, bucket.flat.numel()) for bucket in buckets
    ]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808 + (50304 - 50257) * 768),  # and the padding of its vocabulary
        ("llama3_1b", 1_235_814_400),
        ("llama3_8b", 8_030_261_248),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_32b", 32_762_123_264),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, published: int) -> None:
    assert parameter_count(MODELS[name]) == published


@pytest.mark.parametrize("name", ["tiny", "gpt2", "llama_mqa_tied_geglu"])
def test_a_checkpoint_holds_weights_and_two_moments(name: str) -> None:
    decoder = Decoder(MODELS[name], _mesh(MODELS[name], 1))
    optimizer = build_optimizer(decoder, Config().optim)
    moments = [optimizer.state[p][key] for _, p in parameters(decoder) for key in ("exp_avg", "exp_avg_sq")]
    state = [*(p for _, p in parameters(decoder)), *moments]
    assert checkpoint_bytes(MODELS[name]) == sum(t.numel() * t.element_size() for t in state)


# --------------------------------------------------------------------------------------------------------------- memory


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps what CUDA's kernel keeps: input, weight and 1 / rms of each token. Elsewhere torch has no such kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:2])


def _sdpa(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """CUDA's choice of a kernel: fused, except for grouped queries in float32."""

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
        if q.dtype == torch.float32 and enable_gqa:
            return right(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)  # on the meta device: unfused
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    return attention


class _LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made under it and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(made) if isinstance(t, Tensor)):
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return made

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


@dataclass
class _Measured:
    state: int  # weights, gradients, moments
    saved: int  # by autograd, for the backward pass of one micro-batch; weights not counted
    peak: int  # of forward and backward, state included


def _measure(config: Config, tp: int) -> _Measured:
    model, train, mesh = config.model, config.train, _mesh(config.model, tp)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[train.precision]
    tokens = torch.zeros(train.micro_batch_size, train.seq_len, dtype=torch.long, device="meta")
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    def loss_sum() -> Tensor:  # the logits die with it, as in the trainer
        logits = decoder(tokens, dtype)
        return vocab_parallel_cross_entropy(logits.flatten(0, 1), tokens.flatten(), model.vocab_size, mesh).sum()

    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "rms_norm", lambda x, shape, weight, eps: _FusedRMSNorm.apply(x, weight)))
        sdpa = _sdpa(F.scaled_dot_product_attention)
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", sdpa))
        live = stack.enter_context(_LiveBytes())
        decoder = Decoder(model, mesh)
        gradients, optimizer = Gradients(decoder, mesh), build_optimizer(decoder, config.optim)
        state = live.now
        with saved_tensors_hooks(note, lambda t: t):
            loss = loss_sum()
        kept = [p.untyped_storage()._cdata for p in decoder.parameters()]
        kept += [t.untyped_storage()._cdata for t in decoder._rotations.values()]  # made once, not for each micro-batch
        loss.backward()
        del gradients, optimizer
    return _Measured(state, sum(size for key, size in saved.items() if key not in kept), live.peak)


MEMORY = {  # overrides, tp
    "tiny": (["train.micro_batch_size=2"], 1),
    "kv heads replicated": (["train.micro_batch_size=2", "train.precision=bf16"], 8),
    "padding of the vocabulary": (["model=gpt2"], 2),
    "layer norm": (["model=gpt2", "train.precision=bf16"], 4),
    "tied": (["model=llama3_1b", "train=pretrain"], 4),
    "8b": (["model=llama3_8b", "train=pretrain"], 8),
    "unfused attention": (["model=llama3_8b", "train=pretrain", "train.precision=fp32"], 4),
    "qk_norm": (["model=qwen3_8b", "train=pretrain"], 16),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_what_autograd_keeps(case: str) -> None:
    overrides, tp = MEMORY[case]
    config = load_config(overrides)
    parts, measured = rank_memory(config, tp), _measure(config, tp)
    tokens = config.train.micro_batch_size * config.train.seq_len
    softmax = 4 * tokens * padded_vocab_size(config.model.vocab_size) // tp  # all that is kept of the logits
    seeds = 24 * config.model.num_hidden_layers  # which the fused attention keeps for a dropout that is not used
    assert 0 <= measured.saved - (parts["activations"] + parts["weight copies"] + softmax) <= seeds
    assert measured.state == pytest.approx(parts["weights"] + parts["gradients"] + parts["optimizer"], rel=0.01)
    assert measured.peak == pytest.approx(sum(parts.values()), rel=0.03)


# -------------------------------------------------------------------------------------------------------------- traffic


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "tp"), [("llama_gqa", 1), ("llama_gqa", 4), ("llama_kv_replicated", 8), ("qwen3", 4), ("gpt2", 2)]
)
def test_collectives_are_those_of_a_step(name: str, tp: int, dp: int, precision: str) -> None:
    """By running one with the all-reduces noted instead of done."""
    config, batches = Config(model=MODELS[name]), 2
    config.train.seq_len, config.train.micro_batch_size, config.train.precision = 16, 2, precision
    config.train.global_batch_size = 2 * batches * dp
    mesh = _mesh(config.model, tp, dp, groups=True)
    sent: Counter[tuple[str, int]] = Counter()

    def note(x: Tensor, group: str | None, *args: Any, **options: Any) -> None:
        if group is not None:
            sent[group, x.numel() * x.element_size()] += 1

    decoder = Decoder(config.model, mesh)
    gradients = Gradients(decoder, mesh)
    tokens = torch.zeros(2, 16, dtype=torch.long, device="meta")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    with ExitStack() as stack:
        for module in ("collectives", "loss", "optim"):
            stack.enter_context(patch(f"tptrain.{module}.all_reduce_", note))
        for _ in range(batches):
            logits = decoder(tokens, dtype).flatten(0, 1)
            vocab_parallel_cross_entropy(logits, tokens.flatten(), config.model.vocab_size, mesh).sum().backward()
        gradients.reduce()
        gradients.norm()
    expected: Counter[tuple[str, int]] = Counter()
    for found in collectives(config, tp, dp):
        expected[found.group, found.bytes] += found.calls
    assert sent == expected


def test_a_ring_sends_each_byte_twice_but_for_a_rank() -> None:
    assert ring_seconds(1e9, 1, 1e9) == 0
    assert ring_seconds(1e9, 2, 1e9) == 1
    assert ring_seconds(1e9, 8, 1e9) == pytest.approx(1.75)


# --------------------------------------------------------------------------------------------------------------- report


def test_legal_degrees_of_eight_heads() -> None:
    legal, refused = tp_degrees(load_config(["model=tiny"]))
    assert (legal, refused) == ([1, 2, 4, 8], [])
    legal, refused = tp_degrees(load_config(["model=tiny", "model.intermediate_size=516"]))
    assert legal == [1, 2, 4]
    assert refused == ["parallel.tp=8: does not divide model.intermediate_size=516. Use a divisor."]


def test_the_report_says_all_of_it_in_plain_lines() -> None:
    report = plan(load_config(["model=llama3_8b", "train=pretrain", "cluster.tasks_per_node=8", "cluster.nodes=2"]))
    lines = report.splitlines()
    assert "8,030.3 M parameters" in lines[0]
    assert "89.75 GiB" in lines[0]
    table = [line.split() for line in lines if line[:2].strip().isdigit()]
    assert [row[0] for row in table] == [str(2**i) for i in range(6)] * 2, "each table has a row for each legal tp"
    assert [row[1] for row in table[6:]] == ["16", "8", "4", "2", "1", "-"], "dp is what tp leaves of the 16 ranks"
    assert table[3][-1] == "23.57"
    assert any(line.startswith("parallel.tp=32: does not divide the 16 ranks") for line in lines)
    assert any(line.startswith("a TP group that spans nodes (here: tp > 8)") for line in lines)
    assert "450 GB/s" in report
    assert "50 GB/s" in report
    assert "\x1b" not in report


def test_reasons_are_one_line_each() -> None:
    report = plan(load_config(["model=gpt2"])).splitlines()
    assert sum(line.startswith("parallel.tp=8: does not divide model.num_attention_heads=12.") for line in report) == 1
    crowded = ["cluster.tasks_per_node=8", "train.global_batch_size=8", "train.micro_batch_size=4"]
    report = plan(load_config(crowded)).splitlines()
    assert any(line.startswith("parallel.tp=2: train.global_batch_size=8: not divisible") for line in report)


def test_a_mistake_in_the_model_is_a_users_error() -> None:
    with pytest.raises(UserError, match="num_key_value_heads=3"):
        plan(load_config(["model.num_key_value_heads=3"]))


def test_plan_imports_no_torch() -> None:
    script = "import sys, tptrain.plan; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
