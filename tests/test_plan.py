"""The closed forms of `plan`, held to the model itself, built on torch's meta device: full shapes, no memory."""

import math
import subprocess
import sys
from collections import Counter
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.meta import Sent, measure, meta_mesh
from tests.reference import CASES
from tptrain.config import Config, UserError, load_config
from tptrain.config.load import config_dir
from tptrain.config.sizes import (
    BYTES,
    checkpoint_bytes,
    collectives,
    gradient_buckets,
    parameter_count,
    parameter_shapes,
    rank_memory,
)
from tptrain.layers import parameters
from tptrain.model import Decoder
from tptrain.optim import Optimizer
from tptrain.plan import plan, ring_seconds, tp_degrees
from tptrain.train import DTYPES, Trainer

GROUPS = sorted(file.stem for file in (config_dir() / "model").glob("*.yaml"))
MODELS = {name: case.ours for name, case in CASES.items()}
MODELS |= {name: load_config([f"model={name}"]).model for name in GROUPS}
SHAPES = [(name, tp) for name, model in MODELS.items() for tp in tp_degrees(Config(model=model))[0] if tp <= 16]


# ----------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("name", "tp"), SHAPES)
def test_parameters_are_those_of_the_model(name: str, tp: int, sequence_parallel: bool) -> None:
    model = MODELS[name]
    mesh = meta_mesh(model, tp, 2, sequence_parallel)
    decoder = Decoder(model, mesh)
    shapes = list(parameter_shapes(model, tp, sequence_parallel))
    assert [(shape.name, shape.shape, shape.replicas, shape.partial_grad) for shape in shapes] == [
        (found, p.spec.shape, p.spec.replicas, p.spec.partial_grad) for found, p in parameters(decoder)
    ]
    buckets = Optimizer(decoder, Config().optim, mesh, torch.float32, zero=False).buckets
    assert sum(shape.local(tp) for shape in shapes) == sum(p.numel() for _, p in parameters(decoder))
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
    mesh = meta_mesh(MODELS[name], 1)
    optimizer = Optimizer(Decoder(MODELS[name], mesh), Config().optim, mesh, torch.float32, zero=False)
    size = sum(piece.place.stop - piece.place.start for bucket in optimizer.buckets for piece in bucket.pieces)
    kept = [t for b in optimizer.buckets for t in (b.master, *optimizer.adamw.state[b.master].values()) if t.dim()]
    assert checkpoint_bytes(MODELS[name]) == 4 * 3 * size
    assert len(kept) == 3 * len(optimizer.buckets)


# --------------------------------------------------------------------------------------------------------------- memory


MEMORY = {  # overrides, tp, dp
    "tiny": (["train.micro_batch_size=2"], 1, 1),
    "kv heads replicated": (["train.micro_batch_size=2", "train.precision=bf16"], 8, 1),
    "padding of the vocabulary": (["model=gpt2"], 2, 1),
    "layer norm": (["model=gpt2", "train.precision=bf16"], 4, 2),
    "tied": (["model=llama3_1b", "train=pretrain"], 4, 2),
    "8b": (["model=llama3_8b", "train=pretrain"], 8, 4),
    "8b, sequence parallel": (["model=llama3_8b", "train=pretrain", "parallel.sequence_parallel=true"], 8, 1),
    "selective recomputation": (["model=llama3_8b", "train=pretrain", "train.recompute=selective"], 8, 1),
    "overlap": (["model=llama3_8b", "train=pretrain", "train.micro_batch_size=2", "parallel.overlap=true"], 8, 1),
    "full recomputation": (["model=llama3_8b", "train=pretrain", "train.recompute=full"], 8, 1),
    "full recomputation, sequence parallel": (
        ["model=llama3_8b", "train=pretrain", "train.recompute=full", "parallel.sequence_parallel=true"],
        4,
        1,
    ),
    "zero off": (["model=llama3_1b", "train=pretrain", "parallel.zero=0"], 2, 4),
    "unfused attention": (["model=llama3_8b", "train=pretrain", "train.precision=fp32"], 4, 1),
    "qk_norm": (["model=qwen3_8b", "train=pretrain"], 16, 1),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_what_autograd_keeps(case: str) -> None:
    overrides, tp, dp = MEMORY[case]
    config = load_config(overrides)
    parts, measured = rank_memory(config, tp, dp), measure(config, tp, dp)
    seeds = 24 * config.model.num_hidden_layers  # which the fused attention keeps for a dropout that is not used
    seeds *= 2 if config.parallel.overlap else 1
    head = BYTES[config.train.precision] * config.train.micro_batch_size * config.train.seq_len
    head *= config.model.hidden_size  # the loss's input, which no node keeps
    head //= tp if config.parallel.sequence_parallel else 1
    if config.train.recompute != "full":  # then autograd keeps little, and makes the rest at other times
        assert 0 <= measured.saved - (parts["activations"] - head) <= seeds
    assert measured.state == pytest.approx(
        parts["weights"] + parts["gradients"] + parts["optimizer"], rel=1e-6, abs=1000
    )
    assert measured.peak == pytest.approx(sum(parts.values()), rel=0.05)


# -------------------------------------------------------------------------------------------------------------- traffic


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["parallel.zero=0", "train.recompute=full"],
        ["parallel.sequence_parallel=true"],
        ["parallel.sequence_parallel=true", "train.recompute=full"],
        ["parallel.overlap=true", "train.recompute=selective"],
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
    mesh = meta_mesh(config.model, tp, dp, config.parallel.sequence_parallel)
    tokens = np.zeros((2, 17), dtype=np.int64)
    data: Any = type("Data", (), {"samples": lambda *call: tokens, "prefetch": lambda *call: None})()
    with Sent() as sent:
        decoder = Decoder(config.model, mesh, config.train.recompute, config.parallel.overlap)
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
