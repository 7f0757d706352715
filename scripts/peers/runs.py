"""Runs one contestant once, in processes of its own, and brings back what it measured. Imports no torch."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .cells import Job, Machine, Model
from .roster import Entry
from .settings import overrides

SCRIPTS = Path(__file__).resolve().parent.parent
ROOT = SCRIPTS.parent


class Failed(Exception):
    """A contestant gave no result; the text is the last lines of its log, or says what happened."""


@dataclass(frozen=True)
class Place:
    """Where a cell's runs happen."""

    work: Path  # logs, run directories, compiled code; one for each cell
    cache_dir: Path  # tptrain's packed tokens
    machine: Machine
    inputs: Path  # config.json, model.safetensors, tokens.npy
    timeout_s: float


def prepare(model: Model, steps: int, place: Place) -> None:
    """Weights and batches for a model. Raises Failed."""
    command = [sys.executable, "-m", "peers.inputs", model.name, str(steps), str(place.cache_dir), str(place.inputs)]
    _run([command], [_environment(place, "inputs")], place.work / "inputs.log", place.timeout_s)


def run(entry: Entry, model: Model, precision: str, steps: int, name: str, place: Place) -> dict[str, Any]:
    """{losses, seconds, first_step_s, memory_gb} of `steps` training steps. Raises Failed."""
    if entry.kind != "peer":
        return _run_ours(entry, model, precision, steps, name, place)
    return _run_ranks(entry.module, entry, model, precision, steps, name, place)


def communication(entry: Entry, model: Model, precision: str, place: Place) -> float | None:
    """The share of a step in collectives, from a profiled run; None where it cannot be had."""
    if entry.kind == "reference":
        return 0.0
    module = "ours_profiled" if entry.kind == "ours" else entry.module
    try:
        return _run_ranks(module, entry, model, precision, 0, f"{entry.key}-profile", place)["communication"]
    except Failed:
        return None


def busy() -> float:
    """The share of this machine's cores that other work is using now."""
    return psutil.cpu_percent(interval=0.5) / 100


def gemm_limit(model: Model, precision: str, name: str, place: Place) -> float:
    """Seconds that a step's matrix products take alone, on as many processes as there are ranks. Raises Failed."""
    device, ranks = place.machine.device, place.machine.ranks
    results = [place.work / f"{name}-{rank}.json" for rank in range(ranks)]
    command = [sys.executable, "-m", "peers.limit", model.name, precision, device, str(ranks)]
    commands = [[*command, str(result)] for result in results]
    _run(commands, [_environment(place, name)] * ranks, place.work / f"{name}.log", place.timeout_s)
    return max(json.loads(result.read_text()) for result in results)


def _run_ranks(
    module: str, entry: Entry, model: Model, precision: str, steps: int, name: str, place: Place
) -> dict[str, Any]:
    job_file, result = place.work / f"{name}.job.json", place.work / f"{name}.json"
    result.unlink(missing_ok=True)
    settings = [*_settings(entry, model, precision, place), *entry.overrides]
    inputs, profile, ranks = str(place.inputs), steps == 0, place.machine.ranks
    job = Job(module, entry.options, model, precision, steps, place.machine, settings, inputs, str(result), profile)
    job.write(job_file)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environments = [
        _environment(place, entry.key)
        | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(ranks)
    ]
    began = time.time()
    command = [sys.executable, "-m", "peers.rank", str(job_file)]
    _run([command] * ranks, environments, place.work / f"{name}.log", place.timeout_s)
    report = json.loads(result.read_text())
    if not profile:
        report["first_step_s"] = report.pop("first_step_at") - began
    return report


def _settings(entry: Entry, model: Model, precision: str, place: Place) -> list[str]:
    """tptrain's settings for a cell; a family's model comes from its directory."""
    directory = place.inputs if model.family and entry.key != "scratch" else None
    return overrides(model, precision, place.cache_dir, place.machine.device, directory)


def _run_ours(entry: Entry, model: Model, precision: str, steps: int, name: str, place: Place) -> dict[str, Any]:
    """Through the real command line; the figures are those of its metrics.jsonl."""
    folder = place.work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    alone, ranks = entry.kind == "reference", place.machine.ranks
    command = [sys.executable, "-m", "tptrain", "launch", "cluster=local"]
    command += _settings(entry, model, precision, place)
    command += [f"parallel.tp={1 if alone else ranks}", f"cluster.env.OMP_NUM_THREADS={ranks if alone else 1}"]
    command += [f"train.steps={steps}", f"run.dir={folder}", f"run.name={name}", *entry.overrides]
    metrics, first = folder / "metrics.jsonl", 0.0
    began = time.time()

    def watch() -> None:
        nonlocal first
        if not first and metrics.exists() and metrics.stat().st_size:
            first = time.time()

    _run([command], [_environment(place, entry.key)], place.work / f"{name}.log", place.timeout_s, watch)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the last step's is always written
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    if len(rows) != steps:
        raise Failed(f"{metrics} has {len(rows)} rows, not {steps}")
    return {
        "losses": [row["loss"] for row in rows],
        "seconds": [row["step_time_s"] for row in rows],
        "first_step_s": first - began,
        "memory_gb": max(row["memory_gb"] for row in rows),
        "mfu": [row["mfu"] for row in rows if "mfu" in row],
    }


def _environment(place: Place, key: str) -> dict[str, str]:
    """One thread each; compiled code is kept for the later rounds, but none is there at the first."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(SCRIPTS),
        "TORCHINDUCTOR_CACHE_DIR": str(place.work / "inductor" / key),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _run(
    commands: list[list[str]],
    environments: list[dict[str, str]],
    log: Path,
    timeout_s: float,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Run the commands side by side to their end; none is left behind. Raises Failed."""
    deadline = time.monotonic() + timeout_s
    with log.open("w") as file:
        processes = [
            subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
            for command, env in zip(commands, environments, strict=True)
        ]
        try:
            while any(process.poll() is None for process in processes):
                watch()
                if any(process.poll() for process in processes):
                    break  # the others would wait for it
                if time.monotonic() > deadline:
                    raise Failed(f"no end after {timeout_s:.0f} s")
                time.sleep(0.05)
            watch()
        finally:
            for process in processes:
                _end(process)
    if any(process.returncode for process in processes):
        raise Failed(last_lines(log))


def _end(process: subprocess.Popen) -> None:
    """Kill what is still there of a process and of its children."""
    if process.poll() is not None:
        return
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    process.terminate()  # tptrain's launcher stops its ranks on it
    psutil.wait_procs(family, timeout=10)
    for member in family:
        if member.is_running():
            member.kill()
    process.wait()


def last_lines(log: Path, count: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-count:])
