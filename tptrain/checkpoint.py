"""Sharded checkpoints: one file a rank, written by `torch.distributed.checkpoint`, counted only once committed.

A checkpoint is a folder `step-00000100/` with `__<rank>_0.distcp` (tensors), `.metadata` (torch's index),
`config.yaml`, and `commit.json`: step, topology and the size and checksum of every file. `commit.json` is written last,
after all bytes are durable, so its presence means that the checkpoint is whole; its checksums mean that it still is.
Local slices are viewed as DTensors for the call, which lets torch load them at any other legal topology.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tptrain.config import Config, write_config
from tptrain.config.load import write_atomically
from tptrain.layers import ShardSpec, parameters
from tptrain.mesh import Mesh

COMMIT = "commit.json"


class CheckpointError(Exception):
    """A checkpoint could not be written. Earlier ones are untouched."""


@dataclass(frozen=True)
class Commit:
    """What `commit.json` says."""

    step: int
    samples: int  # training sequences consumed: the position in the data
    world: int
    tp: int
    data: str  # digest of the packed tokens
    updates: int  # of the weights: fewer than steps where train.on_nan=skip left some out
    files: dict[str, list[Any]]  # name -> [bytes, xxh3_128 hex]


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first. Says nothing of whether their bytes are still good."""
    return [path for path in _step_folders(folder) if (path / COMMIT).exists()]


def _step_folders(folder: Path) -> list[Path]:
    """Oldest first, committed or not. A folder of any other name is not ours."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of)


# --------------------------------------------------------------------------------------------------------------- saving


def save(
    folder: Path,
    step: int,
    samples: int,
    data: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Config,
    mesh: Mesh,
) -> None:
    """Write and commit the state after `step` steps, then delete all but the newest `checkpoint.keep`.

    Every rank calls it. Raises CheckpointError, on every rank, where any rank could not write, and removes what was.
    """
    target = step_folder(folder, step)
    updates = int(next(iter(optimizer.state.values()))["step"].item())

    def on_main(work: Callable[[], None]) -> None:
        _agreed(work if mesh.is_main else lambda: None, target, mesh)

    def measure() -> dict[str, list[Any]]:
        return {file.name: _measure(file) for file in target.glob(f"__{mesh.rank}_*.distcp")}

    try:
        on_main(lambda: _make_empty(target))
        _agreed(lambda: _write(target, _state(model, optimizer, mesh) | _rng_state(mesh), mesh), target, mesh)
        files = {name: entry for part in _agreed(measure, target, mesh) for name, entry in part.items()}
        on_main(lambda: _commit(target, Commit(step, samples, mesh.world, mesh.tp, data, updates, files), config))
    except CheckpointError:
        if mesh.is_main:
            shutil.rmtree(target, ignore_errors=True)
        mesh.barrier()
        raise
    if mesh.is_main:
        _prune(folder, step, config.checkpoint.keep)
    mesh.barrier()


def _agreed(work: Callable[[], Any], target: Path, mesh: Mesh) -> list[Any]:
    """Run `work` on every rank, for its value on each; where it fails on one, raise the same CheckpointError on all."""
    value = problem = None
    try:
        value = work()
    except (OSError, CheckpointException) as error:
        problem = _plain(error)
    values, problems = zip(*mesh.gather((value, problem)), strict=True)
    if any(problems):
        raise CheckpointError(f"checkpoint {target.name} was not saved: {next(filter(None, problems))}")
    return list(values)


def _plain(error: BaseException) -> str:
    """One sentence out of an OSError or torch's bundle of every rank's exceptions."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else [(error, None)]
    for failure, _ in failures:
        # torch's zip writer reports a full disk as a RuntimeError of its own
        if getattr(failure, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "file write failed" in str(failure):
            return "no space left on the device. Free some, or lower checkpoint.keep, and launch again"
    return "; ".join(f"{type(failure).__name__}: {failure}" for failure, _ in failures)


def _make_empty(target: Path) -> None:
    """Take away what an attempt left that died before it committed, or a damaged checkpoint of the same step."""
    if target.exists():
        (target / COMMIT).unlink(missing_ok=True)
        shutil.rmtree(target)
    target.mkdir(parents=True)


def _write(target: Path, state: dict[str, Any], mesh: Mesh) -> None:
    writer = FileSystemWriter(target, single_file_per_rank=True, sync_files=True)
    with _quiet():
        state_dict_saver.save(
            state,
            storage_writer=writer,
            process_group=mesh.control and mesh.control.process_group,
            no_dist=mesh.control is None,
        )


def _commit(target: Path, commit: Commit, config: Config) -> None:
    for name, (length, _) in commit.files.items():
        if not (target / name).exists() or (target / name).stat().st_size != length:
            raise OSError(f"rank 0 does not see {name}: run.dir must be on a file system that all nodes share")
    write_config(config, target / "config.yaml")
    for name in (".metadata", "config.yaml"):
        _sync(target / name)
        commit.files[name] = _measure(target / name)
    _sync(target)
    body = asdict(commit)
    write_atomically(target / COMMIT, json.dumps({"commit": body, "xxh3_128": _digest(body)}, indent=1))
    _sync(target)
    _sync(target.parent)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Delete the oldest. The marker goes first, so that a folder half deleted counts for nothing.

    Later steps than this one were found damaged when the run resumed: they neither count nor go.
    """
    good = [path for path in committed(folder) if step_of(path) <= step]
    with contextlib.suppress(OSError):  # one checkpoint too many is no reason to stop
        for old in good[:-keep]:
            (old / COMMIT).unlink()
    for path in _step_folders(folder):
        if not (path / COMMIT).exists():
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _measure(file: Path) -> list[Any]:
    digest, length = xxhash.xxh3_128(), 0
    with file.open("rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
            length += len(block)
    return [length, digest.hexdigest()]


def _digest(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- loading


def load_newest(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: Mesh,
    say: Callable[[str], None],
) -> Commit | None:
    """Load the newest checkpoint that is committed and undamaged, at whatever topology it was saved.

    Every rank calls it; `say` gets a line on each checkpoint that is passed over. None where there is no good one.
    """
    candidates = mesh.main_first(lambda: committed(folder))
    unfinished = [path for path in _step_folders(folder) if not (path / COMMIT).exists()]
    if unfinished:
        say(f"warning: ignoring {', '.join(path.name for path in unfinished)}: never committed (a save was cut off)")
    for path in reversed(candidates):
        commit = mesh.main_first(partial(read_commit, path))
        if isinstance(commit, str):
            problem = commit
        else:  # each rank reads a part of the files
            names = sorted(commit.files)[mesh.rank :: mesh.world]
            problems = (damage(path / name, *commit.files[name]) for name in names)
            found = mesh.gather(next((problem for problem in problems if problem), None))
            problem = next((problem for problem in found if problem), None)
        if problem is None:
            assert isinstance(commit, Commit)
            _read(path, model, optimizer, mesh, commit)
            return commit
        say(f"warning: checkpoint {path.name} is damaged and is not used: {problem}")
    if candidates:
        raise CheckpointError(f"none of the {len(candidates)} checkpoints in {folder} is whole; see the lines above")
    return None


def read_commit(path: Path) -> Commit | str:
    """The commit marker of a checkpoint, or what is wrong with it."""
    try:
        content = json.loads((path / COMMIT).read_text())
        body = content["commit"]
        if content["xxh3_128"] != _digest(body):
            return f"{COMMIT}: its checksum differs from the one written in it"
        return Commit(**body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{COMMIT}: unreadable ({type(error).__name__}: {error})"


def damage(file: Path, length: int, digest: str) -> str | None:
    """What is wrong with a file of a checkpoint, or None."""
    try:
        if (actual := file.stat().st_size) != length:
            return f"{file.name}: {actual} bytes instead of {length}"
        if (found := _measure(file)[1]) != digest:
            return f"{file.name}: checksum {found} instead of {digest}"
    except FileNotFoundError:
        return f"{file.name}: missing"
    except OSError as error:
        return f"{file.name}: unreadable ({error.strerror})"
    return None


def _read(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, commit: Commit) -> None:
    state: dict[str, Any] = _state(model, optimizer, mesh)
    same_ranks = commit.world == mesh.world
    rng = _rng_state(mesh) if same_ranks else {}
    with _quiet():
        reader = FileSystemReader(path)
        state_dict_loader.load(
            state | rng,
            storage_reader=reader,
            process_group=mesh.control and mesh.control.process_group,
            no_dist=mesh.control is None,
        )
    for p in (p for _, p in parameters(model)):
        optimizer.state[p]["step"].fill_(commit.updates)
    if same_ranks:  # at another world size there is no such thing as "the" state of a rank: keep the seeded one
        torch.set_rng_state(rng[f"rng/{mesh.rank}/cpu"])
        if mesh.device.type == "cuda":
            torch.cuda.set_rng_state(rng[f"rng/{mesh.rank}/cuda"], mesh.device)


# ---------------------------------------------------------------------------------------------------------------- state


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> dict[str, Any]:
    """Views of the parameters and moments: what dcp writes from and loads into, in place."""
    state: dict[str, Any] = {}
    for name, p in parameters(model):
        state[f"model/{name}"] = _view(p.detach(), p.spec, mesh)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"optim/{name}/{moment}"] = _view(optimizer.state[p][moment], p.spec, mesh)
    return state


def _rng_state(mesh: Mesh) -> dict[str, Tensor]:
    state = {f"rng/{mesh.rank}/cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        state[f"rng/{mesh.rank}/cuda"] = torch.cuda.get_rng_state(mesh.device)
    return state


def _view(local: Tensor, spec: ShardSpec, mesh: Mesh) -> Tensor:
    """A slice as a DTensor over a (dp, slice, replica) grid. dcp writes each slice once, whichever ranks hold it."""
    if mesh.control is None:
        return local
    grid = torch.arange(mesh.world).view(mesh.dp, spec.slices, spec.replicas)
    # Without process groups: the view only tells dcp which part of the global tensor this is.
    device_mesh = DeviceMesh(local.device.type, grid, mesh_dim_names=("dp", "slice", "replica"), _init_backend=False)
    stride = torch.empty(spec.shape, device="meta").stride()
    return DTensor.from_local(
        local,
        device_mesh,
        [Replicate(), Shard(spec.dim), Replicate()],
        run_check=False,
        shape=torch.Size(spec.shape),
        stride=stride,
    )


def _over(mesh: Mesh) -> dict[str, Any]:
    """torch's arguments for the ranks that save or load together."""
    return {"process_group": mesh.control.process_group} if mesh.control else {"no_dist": True}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.distributed.checkpoint warns of its own internals on every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield
