"""Samples while a model of Transformers is trained: as in test_samples.py, at tp=2."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.corpus import overrides
from tests.distributed import mesh, run_ranks, spare_garbage_collection
from tests.test_engine_life import answered_here
from tptrain.checkpoint.load import load_weights
from tptrain.config import Config, UserError, load_config
from tptrain.config.schema import GenerateConfig
from tptrain.generate.answers import answers
from tptrain.generate.text import of_config
from tptrain.models import sizes
from tptrain.ops.table import REFERENCE
from tptrain.records.rows import read_rows
from tptrain.records.run_dir import committed, step_of
from tptrain.train.loop import train
from tptrain.train.trainer import build_model

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")

# The second one with linear attention.
FAMILIES = {"mixtral": ["train.recompute=full"], "qwen3_next": ["train.precision=bf16"]}
PROMPTS = ["the", "a much longer prompt"]
NEW = 20
Samples = list[dict[str, str]]


def _config(folder: Path, family: str, *lines: str) -> Config:
    own = [line for line in overrides(folder, family) if not line.startswith("model.")]
    own += ["model=hf", f"model.path={folder}/models/{family}", "model.engine=transformers", "data.tokenizer=bytes"]
    own += ["train.steps=4", "parallel.tp=2", "optim.lr=1e-2", "checkpoint.every=2", *FAMILIES[family], *lines]
    config = load_config(own)
    with answered_here():
        sizes.settle_engine(config)
    (Path(config.run.dir) / "model").mkdir(parents=True)
    return config


def _train(config: Config) -> None:
    spare_garbage_collection()
    train(config, mesh(2, sizes.sizes(config.model).kv_heads, shared=True), ops=REFERENCE)


def _of_checkpoints(config: Config) -> dict[int, Samples]:
    """By step: what `generate` answers with a checkpoint's weights."""
    grid, text = mesh(2, sizes.sizes(config.model).kv_heads, shared=True), of_config(config, None)
    model, store = build_model(replace(config, train=replace(config.train, recompute="none")), grid, REFERENCE)
    by_step = {}
    for checkpoint in committed(Path(config.run.dir) / "checkpoints"):
        load_weights(checkpoint, store)
        ids = [text.encode(prompt) for prompt in PROMPTS]
        texts = dict(answers(model, text, ids, GenerateConfig(max_new_tokens=NEW)))
        by_step[step_of(checkpoint)] = [{"prompt": p, "text": texts[i].text} for i, p in enumerate(PROMPTS)]
    return by_step


def _on_ranks(configs: dict[str, tuple[Config, Config]]) -> tuple[dict[str, dict[int, Samples]], str]:
    generated, refusal = {}, ""
    for family, (without, config) in configs.items():
        _train(without)
        _train(config)
        generated[family] = _of_checkpoints(config)

    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("generate: the cache of X cannot be cut by parallel.tp=2 (sizes). Use parallel.tp=1.")

    config = configs["mixtral"][1]
    again = replace(config, run=replace(config.run, dir=f"{config.run.dir}-refused"))
    with patch("tptrain.generate.transformers.generate", refuse):
        try:
            _train(again)
        except UserError as error:
            refusal = f"{error}"
    return generated, refusal


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[int, Samples]], str]:
    from tests import zoo

    folder = tmp_path_factory.mktemp("samples")
    configs = {}
    for family in FAMILIES:
        if not zoo.missing(family):
            model, generator = zoo.model(family, vocab_size=300), torch.Generator().manual_seed(0)
            with torch.no_grad():  # so large that what comes next changes with each step
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=generator), alpha=0.3 if p.dim() > 1 else 0.0)
            model.save_pretrained(folder / "models" / family)
            samples = [f"logging.samples={PROMPTS}", "logging.samples_every=2", f"logging.samples_tokens={NEW}"]
            base = folder / f"{family}-without"
            without = _config(folder, family, f"run.dir={base}")
            configs[family] = without, _config(folder, family, *samples)
    (generated, refusal), other = run_ranks(2, _on_ranks, configs)
    assert (generated, refusal) == other
    return folder, generated, refusal


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_what_the_checkpoint_generates_and_cost_the_run_nothing(family: str, trained: Any) -> None:
    from tests import zoo

    zoo.skip_where_missing(family)
    folder, generated, _ = trained
    rows = read_rows(folder / family / "metrics.jsonl")
    without = read_rows(folder / f"{family}-without" / "metrics.jsonl")
    assert {row["step"]: row["samples"] for row in rows if "samples" in row} == generated[family]
    assert sorted(generated[family]) == [2, 4]
    assert generated[family][2] != generated[family][4], "a test of nothing: other weights generate the same"
    assert [row["loss"] for row in rows] == [row["loss"] for row in without]
    assert rows[-1]["val_loss"] == without[-1]["val_loss"]


def test_a_cache_that_cannot_be_cut_is_a_mistake_before_the_first_step(trained: Any) -> None:
    folder, _, refusal = trained
    cannot = "logging.samples: the cache of X cannot be cut by parallel.tp=2 (sizes)"
    assert refusal == f"{cannot}. Use parallel.tp=1, or leave it out."
    assert not read_rows(folder / "mixtral-refused" / "metrics.jsonl")
