"""Whole runs of the trainer on real ranks: the topology does not change the loss, nor does a resume."""

import gc
import json
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xxhash

from tests.commands import losses
from tests.corpus import overrides
from tests.distributed import gather_global, mesh, run_ranks, spare_garbage_collection
from tptrain.config import load_config
from tptrain.config.schema import kv_heads
from tptrain.nn.parameter import initial_values, parameter, parameters, sharding
from tptrain.ops.compiled import compile_table
from tptrain.ops.table import REFERENCE, Operations
from tptrain.records.rows import read_rows
from tptrain.records.run_dir import committed, step_of
from tptrain.train import loop
from tptrain.train.loop import train
from tptrain.train.stop import Stop
from tptrain.train.trainer import Trainer, build, initialise

FROZEN = Path(__file__).parent / "frozen"
TOLERANCE = 2e-5  # nats, over 50 float32 steps, against losses recorded on another machine
AGREEMENT = 5e-6  # nats, between topologies on one machine; 1e-6 was measured
MODELS = {
    "kv_replicated": ["train.steps=50"],  # 2 KV heads: replicated at tp=4
    "gpt2_like": [
        "train.steps=50",
        "model.position_embedding=learned",
        "model.norm=layernorm",
        "model.hidden_act=gelu_new",
        "model.gated_ffn=false",
        "model.attention_bias=true",
        "model.mlp_bias=true",
        "model.tie_word_embeddings=true",
        "model.num_key_value_heads=4",
        "train.micro_batch_size=1",
    ],
}
TOPOLOGIES = {"tp1": (1, 1), "tp2": (2, 2), "tp4": (4, 4), "tp2_dp2": (4, 2), "dp4": (4, 1)}  # world, tp


def after(steps: int, rank: int = 0) -> Callable[[], str | None]:
    """What a `Stop` asks: one rank is signalled in the given step."""
    calls = iter(range(1, 10**9))
    return lambda: "SIGTERM" if dist.get_rank() == rank and next(calls) >= steps else None


def run_here(lines: list[str], tp: int, stop_after: int = 10**9, ops: Operations | None = None) -> None:
    """Train on the ranks this is called on, which meet in shared memory, as those of a launch on one machine do."""
    config = load_config([*lines, f"parallel.tp={tp}"])
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    grid = mesh(tp, kv_heads(config.model), shared=True)
    spare_garbage_collection()
    train(config, grid, Stop(grid, wish=after(stop_after)), ops)


def step_0_digest(lines: list[str], tp: int) -> dict[str, str]:
    """A checksum of each global tensor as initialised."""
    config = load_config([*lines, f"parallel.tp={tp}"])
    grid = mesh(tp, kv_heads(config.model), shared=True)
    trainer = build(config, grid, REFERENCE)
    initialise(trainer)
    whole = {name: gather_global(p.detach(), p.sharding, grid) for name, p in parameters(trainer.model)}
    return {name: xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest() for name, tensor in whole.items()}


def _all_topologies(folder: str, world: int) -> dict[str, dict[str, str]]:
    digests = {}
    for model, changes in MODELS.items():
        for topology, (ranks, tp) in TOPOLOGIES.items():
            if ranks == world:
                lines = [*overrides(Path(folder), f"{model}-{topology}"), *changes]
                run_here(lines, tp)
                digests[f"{model}-{topology}"] = step_0_digest(lines, tp)
    return digests


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("topologies")
    digests: dict[str, dict[str, str]] = {}
    for world in (1, 2, 4):
        digests |= run_ranks(world, _all_topologies, str(folder), world)[0]
    return folder, digests


@pytest.mark.parametrize("model", MODELS)
def test_weights_at_step_0_are_the_same_bits(trained: tuple[Path, dict[str, dict[str, str]]], model: str) -> None:
    digests = [trained[1][f"{model}-{topology}"] for topology in TOPOLOGIES]
    assert all(digest == digests[0] for digest in digests)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("model", MODELS)
def test_loss_does_not_depend_on_the_topology(trained: tuple[Path, object], model: str, topology: str) -> None:
    """All topologies against the frozen losses, recorded once at tp=1 on one thread (see tests/frozen/README.md)."""
    frozen = json.loads((FROZEN / f"{model}.json").read_text())
    measured = losses(trained[0] / f"{model}-{topology}")
    assert len(measured) == len(frozen) == 50
    assert measured[-1] < measured[0] - 1
    assert max(abs(a - b) for a, b in zip(measured, frozen, strict=True)) < TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_topologies_agree_with_each_other(trained: tuple[Path, object], model: str) -> None:
    runs = [losses(trained[0] / f"{model}-{topology}") for topology in TOPOLOGIES]
    assert max(max(step) - min(step) for step in zip(*runs, strict=True)) < AGREEMENT


def _bf16(folder: str) -> list[dict[str, torch.dtype]]:
    """Dtypes of what persists; the losses are in the run directories."""
    dtypes = []
    for name, tp in (("tp1", 1), ("tp2", 2)):
        lines = [*overrides(Path(folder), name), "train.precision=bf16", "model.qk_norm=true"]
        run_here(lines, tp)
        trainer = build(load_config([*lines, f"parallel.tp={tp}"]), mesh(tp, 2), REFERENCE)
        initialise(trainer)
        block = trainer.optimizer.state.blocks[0]
        kept = {"weight": block.weights, "gradient": block.grads, "master": block.master}
        kept |= {"moment": block.moments["exp_avg"], "logits": _logits(trainer)}
        dtypes.append({name: tensor.dtype for name, tensor in kept.items()})
    run_here([*overrides(Path(folder), "fp32"), "model.qk_norm=true"], 1)
    return dtypes


def _logits(trainer: Trainer) -> torch.Tensor:
    inputs, _ = trainer.to_device(trainer.data.samples(0, 2))
    return trainer.model.logits(trainer.model(inputs))


class _Cycle:
    """Only the collector frees it."""

    def __init__(self) -> None:
        self.own = self


def test_garbage_is_collected_after_the_same_steps_on_all_ranks() -> None:
    gone: list[int] = []
    with closing(loop._collecting_garbage(range(1, 250))) as steps:
        for step in steps:
            assert not gc.isenabled()
            for number in [step] if step in (40, 150) else []:
                weakref.finalize(_Cycle(), gone.append, number)
            assert gone == [40] * (step > 100) + [150] * (step > 200)
    assert gc.isenabled()


def test_weights_do_not_depend_on_how_many_threads_draw_them(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = mesh(1, 1)
    p = parameter(grid, sharding(grid, (1300, 1100)), std=0.02)
    alone = initial_values("w", p, 3)
    assert not torch.equal(alone[:512, :512], alone[512:1024, :512]), "each tile has numbers of its own"
    three, right = threading.Barrier(3), torch.randn

    def together(*arguments: Any, **options: Any) -> torch.Tensor:
        three.wait(10)  # until as many threads are here; of nine tiles
        return right(*arguments, **options)

    monkeypatch.setattr(torch, "randn", together)
    assert torch.equal(initial_values("w", p, 3, threads=3), alone)


def _noted(folder: str) -> tuple[list[list[int]], list[bool]]:
    """Of a run, and of the same one made longer: by how many threads each parameter was drawn, and whether garbage was
    collected in each step of both.
    """
    threads: list[int] = []
    by_run, collecting = [], []
    right, step = initial_values, Trainer.step

    def values(name: str, p: Any, seed: int, count: int = 1) -> torch.Tensor:
        threads.append(count)
        return right(name, p, seed, count)

    def noted(trainer: Trainer, *arguments: Any) -> Any:
        collecting.append(gc.isenabled())
        return step(trainer, *arguments)

    with (
        patch("tptrain.train.trainer.initial_values", values),
        patch.object(os, "sched_getaffinity", lambda process: {0, 3, 5}),
        patch.object(Trainer, "step", noted),
    ):
        for steps in (2, 4):
            run_here([*overrides(Path(folder)), "optim=constant", "checkpoint.every=0", f"train.steps={steps}"], 1)
            by_run.append(threads[:])
            threads.clear()
    return by_run, collecting


def test_weights_are_drawn_by_all_cores_but_not_on_resume_and_steps_collect_no_garbage(tmp_path: Path) -> None:
    ((by_run, collecting),) = run_ranks(1, _noted, str(tmp_path))
    assert set(by_run[0]) == {3}
    assert by_run[1] == []
    assert collecting == [False] * 4


def _saved_by_cost(folder: str) -> list[int]:
    """The steps after which a run of five saves, where a checkpoint of this model is due every two."""
    lines = [*overrides(Path(folder)), "train.steps=5", "checkpoint.keep=9"]
    with patch("tptrain.models.cost.OFTEN", 2):
        run_here(lines, 1)
    return [step_of(path) for path in committed(Path(folder) / "run" / "checkpoints")]


def test_a_run_saves_as_often_as_the_cost_of_its_checkpoints_allows(tmp_path: Path) -> None:
    assert run_ranks(1, _saved_by_cost, str(tmp_path)) == [[2, 4, 5]]


def test_token_batches_go_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for pinning and for the copy: no GPU is here."""
    calls: list[object] = []

    def pin(ids: torch.Tensor) -> torch.Tensor:
        calls.append("pinned")
        return ids

    def to(ids: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        calls.append((device, non_blocking))
        return ids

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    gpu = torch.device("cuda", 1)
    rank: Any = SimpleNamespace(mesh=SimpleNamespace(device=gpu))
    inputs, targets = Trainer.to_device(rank, np.arange(6).reshape(2, 3))
    assert calls == ["pinned", (gpu, True)]
    assert (inputs.tolist(), targets.tolist()) == ([[0, 1], [3, 4]], [1, 2, 4, 5])


def test_bf16_computes_in_bf16_and_keeps_float32_masters(tmp_path: Path) -> None:
    for dtypes in run_ranks(2, _bf16, str(tmp_path))[0]:
        rounded = {"weight": torch.bfloat16, "logits": torch.bfloat16}
        assert dtypes == rounded | dict.fromkeys(("gradient", "master", "moment"), torch.float32)
    tp1, tp2, fp32 = (losses(tmp_path / name) for name in ("tp1", "tp2", "fp32"))
    assert max(abs(a - b) for a, b in zip(tp1, fp32, strict=True)) < 0.02
    assert max(abs(a - b) for a, b in zip(tp1, tp2, strict=True)) < 0.01
    assert tp1 != fp32


def _compiled(folder: str) -> None:
    """With shapes that differ: heads and layers, a last chunk of logits, a last batch of a validation."""
    lines = ["model.qk_norm=true", "train.eval_every=3", "train.eval_sequences=5", "parallel.sequence_parallel=true"]
    lines += ["train.recompute=selective", "train.steps=6"]
    for kind in ("none", "auto"):
        run_here([*overrides(Path(folder), kind), *lines, f"train.compile={kind}"], 2)
    # by torch.compile, as on CUDA, not in C
    run_here([*overrides(Path(folder), "elementwise"), *lines], 2, ops=compile_table(REFERENCE))


def test_compiled_computes_the_same(tmp_path: Path) -> None:
    run_ranks(2, _compiled, str(tmp_path))
    eager, *others = (read_rows(tmp_path / kind / "metrics.jsonl") for kind in ("none", "auto", "elementwise"))
    for compiled in others:
        assert len(eager) == len(compiled) == 6
        for ours, theirs in zip(compiled, eager, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
            assert ours.get("val_loss") == pytest.approx(theirs.get("val_loss"), abs=1e-5)


# --------------------------------------------------------------------------------------------------------------- resume


def _resume(folder: str, world: int) -> None:
    """At world 4: a run never stopped, one stopped after 8 steps, and the latter copied for other topologies."""
    main = torch.distributed.get_rank() == 0
    base = Path(folder)
    if world == 4:
        run_here(overrides(base, "never-stopped"), 2)
        run_here(overrides(base, "stopped"), 2, stop_after=8)
        if main:
            assert len(read_rows(base / "stopped" / "metrics.jsonl")) == 8
            for copy in ("tp4", "dp4", "tp1", "tp2"):
                shutil.copytree(base / "stopped", base / copy)
        torch.distributed.barrier()
        run_here(overrides(base, "stopped"), 2)
        run_here(overrides(base, "tp4"), 4)
        run_here(overrides(base, "dp4"), 1)
        run_here(overrides(base, "chain"), 4, stop_after=7)
        run_here(overrides(base, "chain"), 2, stop_after=6)
    else:
        run_here(overrides(base, f"tp{world}"), world)
        if world == 1:
            run_here(overrides(base, "chain"), 1)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    for world in (4, 1, 2):
        run_ranks(world, _resume, str(folder), world)
    return folder


def test_resumed_at_the_same_topology_is_the_same_bits(resumed: Path) -> None:
    assert len(losses(resumed / "stopped")) == 20
    assert losses(resumed / "stopped") == losses(resumed / "never-stopped")


@pytest.mark.parametrize("topology", ["tp4", "dp4", "tp1", "tp2", "chain"])
def test_resumed_at_another_topology_is_the_same_run(resumed: Path, topology: str) -> None:
    """Losses of other samples would differ by 0.1 nats and more. The chain: tp4, then tp2 x dp2, then tp1."""
    never_stopped, measured = losses(resumed / "never-stopped"), losses(resumed / topology)
    assert len(measured) == 20
    assert max(abs(a - b) for a, b in zip(measured, never_stopped, strict=True)) < TOLERANCE


FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint-0.1.0"
OLD_RUN = ["model.num_hidden_layers=1", "model.hidden_size=16", "model.num_attention_heads=4", "train.steps=6"]
OLD_RUN += ["model.num_key_value_heads=1", "model.intermediate_size=32", "model.qk_norm=true"]
OLD_RUN += ["model.attention_bias=true", "train.precision=bf16"]


def _go_on(folder: str, tp: int) -> None:
    run_here([*overrides(Path(folder), "old"), *OLD_RUN], tp)


@pytest.mark.parametrize(("world", "tp", "most"), [(4, 2, 2e-4), (2, 1, 5e-3), (4, 4, 5e-3)])
def test_a_checkpoint_of_version_0_1_0_goes_on(tmp_path: Path, world: int, tp: int, most: float) -> None:
    """Saved after 3 of 6 steps by version 0.1.0 at tp=2 x dp=2, with ZeRO-1 and a KV head on both ranks."""
    shutil.copytree(FIXTURE / "checkpoints", tmp_path / "old" / "checkpoints")
    run_ranks(world, _go_on, str(tmp_path), tp)
    expected = json.loads((FIXTURE / "losses.json").read_text())[3:]
    rows = read_rows(tmp_path / "old" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 5, 6]
    assert [row["loss"] for row in rows] == pytest.approx(expected, abs=most)
