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

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.reference import CASES
from tptrain import collectives as collectives_module
from tptrain import fused, linear, loss, optim
from tptrain.config import Config, ModelConfig, UserError, load_config
from tptrain.config.load import config_dir
from tptrain.config.schema import kv_heads
from tptrain.config.sizes import (
    BYTES,
    checkpoint_bytes,
    collectives,
    gradient_buckets,
    local_parameter_count,
    parameter_count,
    parameter_shapes,
    rank_memory,
)
from tptrain.layers import parameters
from tptrain.loss import cross_entropy_backward
from tptrain.mesh import Mesh
from tptrain.model import Decoder
from tptrain.optim import Optimizer
from tptrain.plan import plan, ring_seconds, tp_degrees
from tptrain.train import DTYPES, Trainer

GROUPS = sorted(file.stem for file in (config_dir() / "model").glob("*.yaml"))
MODELS = {name: case.ours for name, case in CASES.items()}
MODELS |= {name: load_config([f"model={name}"]).model for name in GROUPS}
SHAPES = [(name, tp) for name, model in MODELS.items() for tp in tp_degrees(Config(model=model))[0] if tp <= 16]


class _Group:
    """The name and size of an axis, without processes."""

    def __init__(self, axis: str, size: int) -> None:
        self.axis, self.ranks = axis, range(size)


def _mesh(model: ModelConfig, tp: int, dp: int = 1, sequence_parallel: bool = False) -> Mesh:
    """The last rank of a grid: it has the padding of the vocabulary."""
    replicas = max(1, tp // kv_heads(model))
    known: dict[str, Any] = dict.fromkeys(item.name for item in fields(Mesh))
    known |= {"rank": tp * dp - 1, "world": tp * dp, "tp": tp, "device": torch.device("meta"), "kv_replicas": replicas}
    sizes = {"tp": tp, "dp": dp, "kv": replicas}
    known |= {f"{axis}_group": _Group(axis, size) for axis, size in sizes.items() if size > 1}
    known["world_group"] = _Group("world", tp * dp) if tp > 1 and dp > 1 else known["tp_group"] or known["dp_group"]
    box = type("Box", (), {"touch": lambda self: None})()
    return Mesh(**known | {"sequence_parallel": sequence_parallel and tp > 1, "box": box})


class _Sent(ExitStack):
    """Collectives are noted instead of done: (operation, axis, bytes) and how often."""

    def __enter__(self) -> "_Sent":
        self.calls: Counter[tuple[str, str, int]] = Counter()
        done = type("Done", (), {"wait": lambda self: None})()

        def all_reduce_(x: Tensor, group: _Group | None, *args: Any, **options: Any) -> Any:
            if group is not None:
                self.calls["all_reduce", group.axis, x.nbytes] += 1
            return done

        def all_gather(x: Tensor, group: _Group | None, async_op: bool = False, out: Tensor | None = None) -> Any:
            if group is None:
                return x, done
            out = x.new_empty(len(group.ranks) * len(x), *x.shape[1:]) if out is None else out
            self.calls["all_gather", group.axis, out.nbytes] += 1
            return out, done

        def reduce_scatter(x: Tensor, group: _Group, async_op: bool = False, out: Tensor | None = None) -> Any:
            self.calls["reduce_scatter", group.axis, x.nbytes] += 1
            return x.new_empty(len(x) // len(group.ranks), *x.shape[1:]) if out is None else out, done

        for function in (all_reduce_, all_gather, reduce_scatter):
            for module in (collectives_module, linear, loss, optim):
                if hasattr(module, function.__name__):
                    self.enter_context(patch.object(module, function.__name__, function))
        return self


# ----------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("name", "tp"), SHAPES)
def test_parameters_are_those_of_the_model(name: str, tp: int, sequence_parallel: bool) -> None:
    model = MODELS[name]
    mesh = _mesh(model, tp, 2, sequence_parallel)
    decoder = Decoder(model, mesh)
    shapes = list(parameter_shapes(model, tp, sequence_parallel))
    assert [(shape.name, shape.shape, shape.replicas, shape.partial_grad) for shape in shapes] == [
        (found, p.spec.shape, p.spec.replicas, p.spec.partial_grad) for found, p in parameters(decoder)
    ]
    buckets = Optimizer(decoder, Config().optim, mesh, torch.float32, zero=False).buckets
    assert local_parameter_count(model, tp) == sum(p.numel() for _, p in parameters(decoder))
    assert parameter_count(model) == sum(math.prod(p.spec.shape) for _, p in parameters(decoder))
    assert gradient_buckets(model, tp, 2, sequence_parallel) == [
        (bucket.replicas, bucket.partial_grad, len(bucket.grads)) for bucket in buckets
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
    mesh = _mesh(MODELS[name], 1)
    optimizer = Optimizer(Decoder(MODELS[name], mesh), Config().optim, mesh, torch.float32, zero=False)
    size = sum(piece.place.stop - piece.place.start for bucket in optimizer.buckets for piece in bucket.pieces)
    kept = [t for b in optimizer.buckets for t in (b.master, *optimizer.adamw.state[b.master].values()) if t.dim()]
    assert checkpoint_bytes(MODELS[name]) == 4 * 3 * size
    assert len(kept) == 3 * len(optimizer.buckets)


# --------------------------------------------------------------------------------------------------------------- memory


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
    state: int  # weights, gradients, masters, moments
    saved: int  # by autograd, for the backward pass of one micro-batch; weights not counted
    peak: int  # of forward and backward, state included


def _fused_kernels(stack: ExitStack) -> None:
    """As compiled ones, they make nothing but their results."""
    for name, made in {
        "rms_norm": lambda x, weight, eps: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)),
        "add_rms_norm": lambda x, y, weight, eps: (
            torch.empty_like(x),
            torch.empty_like(x),
            x.new_empty(*x.shape[:-1], 1, dtype=torch.float32),
        ),
        "_rotate_qkv": lambda qkv, cos, sin, heads: tuple(
            qkv.new_empty(*qkv.shape[:2], count, qkv.shape[3]) for count in heads
        ),
        "gate_product": lambda x, act: x.new_empty(len(x), x.shape[1] // 2),
        "_rotate": lambda x, cos, sin: torch.empty(x.shape, dtype=x.dtype, device="meta"),
        "statistics": lambda logits, local: logits.new_empty(1, 2, len(logits), dtype=torch.float32),
        "logit_gradient": lambda logits, lse, local, scale: torch.empty_like(logits),
    }.items():
        stack.enter_context(patch.object(fused, name, fused._Fusible(made)))


def _measure(config: Config, tp: int, dp: int) -> _Measured:
    model, train = config.model, config.train
    mesh = _mesh(model, tp, dp, config.parallel.sequence_parallel)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[train.precision]
    tokens = torch.zeros(train.micro_batch_size, train.seq_len, dtype=torch.long, device="meta")
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with _Sent() as stack:
        sdpa = _sdpa(F.scaled_dot_product_attention)
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", sdpa))
        _fused_kernels(stack)
        live = stack.enter_context(_LiveBytes())
        decoder = Decoder(model, mesh, train.recompute)
        optimizer = Optimizer(decoder, config.optim, mesh, dtype, config.parallel.zero == 1)
        state = live.now
        with saved_tensors_hooks(note, lambda t: t):
            x = decoder(tokens)
        head = decoder.lm_head.weight
        _, grad = cross_entropy_backward(x.detach(), head, tokens.flatten(), model.vocab_size, mesh, 1.0)
        kept = [bucket.weights.untyped_storage()._cdata for bucket in optimizer.buckets]
        kept += [t.untyped_storage()._cdata for t in decoder._rotations.values()]  # made once, not for each micro-batch
        peak = live.peak
        x.backward(grad)
    return _Measured(state, sum(size for key, size in saved.items() if key not in kept), peak)


MEMORY = {  # overrides, tp, dp
    "tiny": (["train.micro_batch_size=2"], 1, 1),
    "kv heads replicated": (["train.micro_batch_size=2", "train.precision=bf16"], 8, 1),
    "padding of the vocabulary": (["model=gpt2"], 2, 1),
    "layer norm": (["model=gpt2", "train.precision=bf16"], 4, 2),
    "tied": (["model=llama3_1b", "train=pretrain"], 4, 2),
    "8b": (["model=llama3_8b", "train=pretrain"], 8, 4),
    "8b, sequence parallel": (["model=llama3_8b", "train=pretrain", "parallel.sequence_parallel=true"], 8, 1),
    "selective recomputation": (["model=llama3_8b", "train=pretrain", "train.recompute=selective"], 8, 1),
    "zero off": (["model=llama3_1b", "train=pretrain", "parallel.zero=0"], 2, 4),
    "unfused attention": (["model=llama3_8b", "train=pretrain", "train.precision=fp32"], 4, 1),
    "qk_norm": (["model=qwen3_8b", "train=pretrain"], 16, 1),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_what_autograd_keeps(case: str) -> None:
    overrides, tp, dp = MEMORY[case]
    config = load_config(overrides)
    parts, measured = rank_memory(config, tp, dp), _measure(config, tp, dp)
    seeds = 24 * config.model.num_hidden_layers  # which the fused attention keeps for a dropout that is not used
    head = BYTES[config.train.precision] * config.train.micro_batch_size * config.train.seq_len
    head *= config.model.hidden_size  # the loss's input, which no node keeps
    head //= tp if config.parallel.sequence_parallel else 1
    assert 0 <= measured.saved - (parts["activations"] - head) <= seeds
    assert measured.state == pytest.approx(
        parts["weights"] + parts["gradients"] + parts["optimizer"], rel=1e-6, abs=1000
    )
    assert measured.peak == pytest.approx(sum(parts.values()), rel=0.03)


# -------------------------------------------------------------------------------------------------------------- traffic


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["parallel.zero=0", "train.recompute=full"],
        ["parallel.sequence_parallel=true"],
        ["parallel.sequence_parallel=true", "train.recompute=full"],
    ],
)
@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "tp"), [("llama_gqa", 1), ("llama_gqa", 4), ("llama_kv_replicated", 8), ("qwen3", 4), ("gpt2", 2)]
)
def test_collectives_are_those_of_a_step(name: str, tp: int, dp: int, precision: str, changes: list[str]) -> None:
    """By running one, of two micro-batches, with the collectives noted instead of done."""
    config, batches = load_config(changes), 2
    config.model = MODELS[name]
    config.train.seq_len, config.train.micro_batch_size, config.train.precision = 16, 2, precision
    config.train.global_batch_size = 2 * batches * dp
    mesh = _mesh(config.model, tp, dp, config.parallel.sequence_parallel)
    tokens = np.zeros((2, 17), dtype=np.int64)
    data: Any = type("Data", (), {"samples": lambda *call: tokens, "prefetch": lambda *call: None})()
    with _Sent() as sent:
        decoder = Decoder(config.model, mesh, config.train.recompute)
        optimizer = Optimizer(decoder, config.optim, mesh, DTYPES[precision], config.parallel.zero == 1)
        with patch.object(optimizer.adamw, "step"):  # not on the meta device
            Trainer(config, mesh, data, decoder, optimizer).step(1)
    expected: Counter[tuple[str, str, int]] = Counter()
    for found in collectives(config, tp, dp):
        expected[found.op, found.group, found.bytes] += found.calls
    assert sent.calls == expected


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
    assert table[3][-1] == "17.19"
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
