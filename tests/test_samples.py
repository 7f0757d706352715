"""Samples while a model is trained: what a checkpoint of the same step generates, at no cost to the run."""

import gc
import json
import shutil
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch.distributed as dist

from launch.runs import status
from tests.commands import losses, tptrain
from tests.corpus import overrides
from tests.directories import save_tokenizer
from tests.distributed import mesh, run_ranks, spare_garbage_collection
from tests.test_train import after
from tests.wandb_files import wandb_tables
from tptrain.checkpoint.load import load_weights
from tptrain.config import Config, UserError, load_config, write_config
from tptrain.config.schema import GenerateConfig, kv_heads
from tptrain.generate.answers import answers
from tptrain.generate.cache import Cache
from tptrain.generate.text import of_config
from tptrain.ops.choose import choose
from tptrain.ops.compiled import Compiled, compile_table, eager
from tptrain.ops.node_cache import node_cache
from tptrain.ops.table import REFERENCE
from tptrain.records.rows import last_row, read_rows
from tptrain.records.run_dir import committed, step_of
from tptrain.train.loop import train
from tptrain.train.metrics import Recorder
from tptrain.train.samples import Samples, prompts_of
from tptrain.train.stop import Stop
from tptrain.train.trainer import build_model
from tptrain.train.wandb import Wandb

PROMPTS = ["the", "a much longer prompt than the other two", "x"]
SAMPLES = [f"logging.samples={json.dumps(PROMPTS)}", "logging.samples_every=4", "logging.samples_tokens=12"]
# Weights so large that what comes next changes with each step.
LINES = ["train.steps=6", "optim.lr=3e-3", "model.initializer_range=0.3", "checkpoint.every=0"]
CASES = {
    "zero": [],
    "sequence-parallel": ["parallel.sequence_parallel=true", "train.recompute=selective", "parallel.zero=0"],
    "bf16": ["train.precision=bf16", "parallel.overlap=true"],
    "learned": [  # with biases, which sequence parallelism adds to a rank's own tokens
        "parallel.sequence_parallel=true",
        "train.recompute=full",
        "model.position_embedding=learned",
        "model.max_position_embeddings=48",  # where the longest prompt's continuation ends
        "model.norm=layernorm",
        "model.mlp_bias=true",
        "model.attention_bias=true",
        "model.tie_word_embeddings=true",
    ],
}


def _config(folder: str, name: str, *lines: str) -> Config:
    config = load_config([*overrides(Path(folder), name), *LINES, "parallel.tp=2", *lines])
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    return config


def _train(config: Config, stop_after: int = 10**9) -> None:
    parallel = config.parallel.sequence_parallel
    grid = mesh(config.parallel.tp, kv_heads(config.model), shared=True, sequence_parallel=parallel)
    assert grid.sequence_parallel == (parallel and grid.size("tp") > 1)
    spare_garbage_collection()
    train(config, grid, Stop(grid, wish=after(stop_after)) if dist.is_initialized() else None)


def _of_checkpoints(config: Config) -> dict[int, list[dict[str, str]]]:
    """By step: what `generate` answers with a checkpoint's weights, as it reads them."""
    grid, text = mesh(config.parallel.tp, kv_heads(config.model), shared=True), of_config(config, None)
    prompts, settings = [text.encode(prompt) for prompt in PROMPTS], GenerateConfig(max_new_tokens=12)
    model, store = build_model(config, grid, choose("cpu", config.train.compile, node_cache()))
    by_step = {}
    for checkpoint in committed(Path(config.run.dir) / "checkpoints"):
        load_weights(checkpoint, store)
        parts = grid.control.gather(dict(answers(model, text, prompts, settings)))
        together = {number: answer.text for part in parts for number, answer in part.items()}
        by_step[step_of(checkpoint)] = [{"prompt": p, "text": together[i]} for i, p in enumerate(PROMPTS)]
    return by_step


def _all_cases(folder: str) -> dict[str, dict[int, list[dict[str, str]]]]:
    generated = {}
    for name, lines in CASES.items():
        _train(_config(folder, f"{name}-without", *lines))
        config = _config(folder, name, *lines, *SAMPLES, "logging.every=3", "checkpoint.every=2", "checkpoint.keep=3")
        _train(config)
        generated[name] = _of_checkpoints(config)
    stopped = _config(folder, "stopped", *SAMPLES)
    _train(stopped, stop_after=4)
    _train(stopped)
    return generated


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[int, list[dict[str, str]]]]]:
    """Runs at tp=2 x dp=2, and what their checkpoints generate."""
    folder = tmp_path_factory.mktemp("samples")
    everywhere = run_ranks(4, _all_cases, str(folder))
    assert all(each == everywhere[0] for each in everywhere)
    return folder, everywhere[0]


@pytest.mark.parametrize("case", CASES)
def test_they_are_what_the_checkpoint_of_the_step_generates(
    trained: tuple[Path, dict[str, dict[int, list[dict[str, str]]]]], case: str
) -> None:
    rows = {row["step"]: row for row in read_rows(trained[0] / case / "metrics.jsonl")}
    assert sorted(rows) == [3, 4, 6], "every third step's, and those of samples"
    before, *generated = (trained[1][case][step] for step in (2, 4, 6))
    assert [rows[step]["samples"] for step in (4, 6)] == generated
    assert "samples" not in rows[3]
    assert before not in generated, "a test of nothing: other weights generate the same"
    assert len(set(generated[0][1]["text"])) > 3, "a test of nothing: a byte over and over"
    if case == "learned":
        assert len(generated[0][1]["text"]) <= 48 - len(PROMPTS[1]) < 12


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_same_bits_without_them(trained: tuple[Path, object], case: str) -> None:
    without = losses(trained[0] / f"{case}-without")
    rows = read_rows(trained[0] / case / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [without[row["step"] - 1] for row in rows]
    assert rows[-1]["val_loss"] == read_rows(trained[0] / f"{case}-without" / "metrics.jsonl")[-1]["val_loss"]


def test_a_run_that_stops_leaves_them_out_and_goes_on_with_them(trained: tuple[Path, object]) -> None:
    rows = {row["step"]: row for row in read_rows(trained[0] / "stopped" / "metrics.jsonl")}
    whole = {row["step"]: row for row in read_rows(trained[0] / "zero" / "metrics.jsonl")}
    assert "samples" not in rows[4], "the step at which it stopped"
    assert rows[6]["samples"] == whole[6]["samples"]


# -------------------------------------------------------------------------------------------------- of one rank, here


def _alone(folder: Path, *lines: str) -> Config:
    return _config(str(folder), "run", "parallel.tp=1", "train.steps=3", *lines)


def test_0_is_after_the_last_step_only(tmp_path: Path) -> None:
    _train(_alone(tmp_path, *SAMPLES, "logging.samples_every=0"))
    assert ["samples" in row for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [False, False, True]


def test_their_time_is_no_step_time_and_their_memory_is_given_back(tmp_path: Path) -> None:
    caches: list[weakref.ref[Cache]] = []
    generate, late_s = Samples.generate, [0.0]

    def slowly(samples: Samples) -> list[dict[str, str]]:
        assert not gc.isenabled(), "a test of nothing: memory is given back at once"
        written = generate(samples)
        assert caches
        assert not any(cache() for cache in caches)
        late_s[0] += 1000
        return written

    def cache(*arguments: object) -> Cache:
        new = Cache(*arguments)  # type: ignore[arg-type]
        caches.append(weakref.ref(new))
        return new

    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late_s[0])
    with (
        patch.object(Samples, "generate", slowly),
        patch("tptrain.generate.decode.Cache", cache),
        patch("tptrain.train.loop.time", clock),
    ):
        _train(_alone(tmp_path, *SAMPLES, "logging.samples_every=1"))
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [len(row["samples"]) for row in rows] == [3, 3, 3]
    assert all(row["step_time_s"] < 500 for row in rows)


def test_wandb_has_a_table_of_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of rows that the attempt before had no time to hand over."""
    monkeypatch.setattr(Wandb, "TIMEOUT_S", 30)  # of a busy machine
    lines = [*SAMPLES, "wandb.mode=offline", "logging.samples_every=2"]
    config = _alone(tmp_path, *lines)
    _train(config)
    run, rows = tmp_path / "run", read_rows(tmp_path / "run" / "metrics.jsonl")
    of_steps = [row for row in rows if row["step"] in (2, 3)]
    tables = {row["step"]: [[row["step"], *each.values()] for each in row["samples"]] for row in of_steps}
    assert wandb_tables(run, "samples") == tables
    (run / "wandb" / "handed-over").unlink()
    (first,) = run.glob("wandb/offline-run-*")
    shutil.rmtree(first)
    recorder = Recorder(config, start=2)
    recorder.record({**rows[2], "samples": [{"prompt": "a\u2028b", "text": "\n\x85\x00é"}]})
    recorder.close()
    again = read_rows(run / "metrics.jsonl")
    assert again[:2] == rows[:2]
    assert again[2]["samples"] == [{"prompt": "a\u2028b", "text": "\n\x85\x00é"}]
    assert wandb_tables(run, "samples") == tables | {3: [[3, "a\u2028b", "\n\x85\x00é"]]}


def test_status_reads_a_row_of_many_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config([f"run.dir={tmp_path}", "wandb.mode=disabled"])
    write_config(config, tmp_path / "config.yaml")
    row = {"step": 1, "loss": float("nan"), "lr": 1.0, "grad_norm": 1.0, "tokens_per_second": 9.0, "step_time_s": 1.0}
    recorder = Recorder(config, start=0)
    recorder.record(row)
    recorder.record(row | {"step": 2, "loss": 1.5, "samples": [{"prompt": "p", "text": "t" * 30_000}]})
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "samples": [{"prompt": "' + "q" * 9000)  # still being written
    newest = last_row(tmp_path / "metrics.jsonl")
    assert newest is not None
    assert newest["step"] == 2
    capsys.readouterr()
    status([tmp_path])
    assert "2/400" in (shown := capsys.readouterr().out)
    assert "1.5000" in shown


def test_a_prompt_that_a_tokenizer_makes_too_long_or_empty_ends_the_run_at_its_start(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = ["model.vocab_size=256", f"data.tokenizer={tmp_path}/tokenizer.json"]
    config = _alone(tmp_path, *tokenizer, "model.max_position_embeddings=32", "logging.samples=[word]")
    assert len(prompts_of(config)) == 1
    mistakes = {"   ": "prompt 2 of 2: empty", "t " * 32: "prompt 2 of 2: 32 tokens, and the model has 32 positions"}
    for prompt, words in mistakes.items():
        wrong = replace(config, logging=replace(config.logging, samples=["word", prompt]))
        with pytest.raises(UserError, match=f"logging.samples, {words}"):
            _train(wrong)
    assert not read_rows(tmp_path / "run" / "metrics.jsonl")


def test_a_launch_says_so_once_before_it_packs_the_data(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    model = ["model.vocab_size=256", "model.max_position_embeddings=32", "parallel.tp=2"]
    samples = [f"data.tokenizer={tmp_path}/tokenizer.json", f"logging.samples=['{'t ' * 40}']"]
    done = tptrain("launch", *overrides(tmp_path), *model, *samples)
    assert done.returncode == 2, done.stdout
    message = "error: logging.samples, prompt 1 of 1: 40 tokens, and the model has 32 positions. Shorten it."
    assert [line for line in done.stdout.splitlines()[1:] if line] == [message]
    assert not (tmp_path / "data").exists()


def test_nothing_is_compiled_for_them() -> None:
    plain = eager(compile_table(REFERENCE))
    assert not any(isinstance(each, Compiled) for each in vars(plain).values())
    assert replace(plain, backend=REFERENCE.backend) == REFERENCE
    assert eager(REFERENCE) == REFERENCE
