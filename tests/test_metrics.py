"""The figures of a run, against independent counts."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import mesh
from tests.models import training
from tptrain.config import load_config
from tptrain.config.schema import OptimConfig
from tptrain.optim.schedule import learning_rate
from tptrain.records.rows import read_rows
from tptrain.train.metrics import Recorder


@pytest.mark.parametrize("model", ["tiny", "gpt2"])
def test_flops_are_those_torch_counts(model: str) -> None:
    """Three times a forward pass's matrix products (forward, input and weight gradients), and attention's share."""
    config = load_config([f"model={model}", "model.num_hidden_layers=2"]).model
    decoder = training(config, mesh(1)).model
    tokens = 64
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder.logits(decoder(torch.zeros(1, tokens, dtype=torch.long)))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    attention = 3 * 2 * 2 * config.num_hidden_layers * tokens * width  # scores and values, a multiply and an add each
    assert decoder.spec.flops_per_token(tokens) == pytest.approx(3 * products / tokens + attention)


def test_learning_rate_is_torchs_schedulers() -> None:
    steps, warmup = 50, 10
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=0.2)
    config = OptimConfig(lr=2.0, warmup_steps=warmup, min_lr_ratio=0.1)
    for step in range(warmup, steps + 1):
        assert learning_rate(config, step, steps) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [learning_rate(config, step, steps) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])
    linear = OptimConfig(lr=2.0, schedule="linear", warmup_steps=10, min_lr_ratio=0.1)
    assert [learning_rate(linear, step, 50) for step in (10, 30, 50)] == pytest.approx([2.0, 1.1, 0.2])
    constant = OptimConfig(lr=2.0, schedule="constant", warmup_steps=0)
    assert learning_rate(constant, 1, 50) == learning_rate(constant, 50, 50) == 2.0


def test_rows_past_the_checkpoint_and_a_cut_line_are_dropped_on_resume(tmp_path: Path) -> None:
    config = load_config([f"run.dir={tmp_path}", "wandb.mode=disabled"])
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0} for step in range(1, 8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "lo')
    recorder = Recorder(config, start=5)
    recorder.close()
    assert read_rows(path) == rows[:5]
