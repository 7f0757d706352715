"""Writing checkpoints, in the background."""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tptrain.checkpoint.commit import CheckpointError, Commit, body_digest, reason
from tptrain.checkpoint.files import measure, sync
from tptrain.checkpoint.host_copy import HostCopy
from tptrain.checkpoint.index import INDEX
from tptrain.checkpoint.layout import State, rng_state, training_state
from tptrain.config import Config, UserError, write_config
from tptrain.config.load import write_atomically
from tptrain.models.cost import STAGING_BYTES
from tptrain.optim.adamw import Optimizer
from tptrain.parallel.mesh import Mesh
from tptrain.records.run_dir import COMMIT, committed, step_folder, step_folders, step_of


class Saver:
    """Writes checkpoints in the background, after copying the state to host memory there: the next forward and backward
    pass go on meanwhile, and only the next update of the weights waits for the copy.

    Every rank makes one. The writing ranks talk over a group of their own, so training's collectives are not disturbed.
    """

    def __init__(self, folder: Path, optimizer: Optimizer, config: Config, data: str, mesh: Mesh) -> None:
        self.folder, self.optimizer, self.config, self.data, self.mesh = folder, optimizer, config, data, mesh
        self.copied = threading.Event()  # not set while the state is copied
        self.copied.set()
        self.host_copy: HostCopy | None = None  # made by the first save
        self.thread: threading.Thread | None = None
        self.problem: BaseException | None = None
        self.seconds = 0.0  # the last one took, from the copy to the marker

    @property
    def needs_s(self) -> float:
        """Seconds until a save that begins now is committed, as far as the last one tells."""
        return self.seconds * (2 if self.thread is not None and self.thread.is_alive() else 1)

    def save(self, step: int, exports: bool = False) -> None:
        """Begin to write and commit the state after `step` steps, once the save before it is finished.

        Every rank calls it. `exports`: the model is then also written as a Hugging Face directory. Raises what `finish`
        raises.
        """
        self.finish()
        samples = step * self.config.train.global_batch_size
        commit = Commit(step, samples, self.mesh.world, self.mesh.size("tp"), self.data, self.optimizer.updates, {})
        stream = torch.cuda.Stream() if self.mesh.device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        self.copied.clear()
        arguments = commit, rng_state(self.mesh), stream, exports
        self.thread = threading.Thread(target=self._work, args=arguments, daemon=True)
        self.thread.start()

    def wait_for_copy(self) -> None:
        """To be called before the weights change: the state that is being saved has been copied."""
        self.copied.wait()

    def finish(self) -> None:
        """Wait for the save under way. Raises CheckpointError, on every rank, where any rank could not write."""
        if self.thread is not None:
            while self.thread.is_alive():
                self.thread.join(1)  # so that a signal's handler runs meanwhile
            self.thread = None
        if self.problem is not None:
            problem, self.problem = self.problem, None
            raise problem

    def _work(self, commit: Commit, rng: dict[str, Tensor], stream: torch.cuda.Stream | None, exports: bool) -> None:
        began = time.perf_counter()
        if stream is not None:
            torch.cuda.set_device(self.mesh.device)  # a thread begins with the first GPU, whichever is the rank's
        try:
            try:
                copies = self._copy(stream)
            finally:
                self.copied.set()
            state = training_state(self.optimizer.state, copies) | rng
            write_checkpoint(self.folder, state, commit, self.config, self.mesh)
            if self.mesh.is_main:
                _prune(self.folder, commit.step, self.config.checkpoint.keep)
            self.mesh.saving.gather(None)
        except BaseException as error:
            self.problem = error
        self.seconds = time.perf_counter() - began
        if exports and self.mesh.is_main and self.problem is None:
            self._export(commit.step)

    def _export(self, step: int) -> None:
        """Beside the checkpoints. Where it fails the checkpoint is there all the same, and training goes on."""
        from tptrain.checkpoint.export import export

        checkpoint, target = step_folder(self.folder, step), step_folder(self.folder.parent / "exports", step)
        try:
            if not target.exists():  # an attempt that had come this far before it was stopped has written it
                export(checkpoint, target, verify=False)
            for old in step_folders(target.parent)[: -self.config.checkpoint.keep]:
                shutil.rmtree(old, ignore_errors=True)
        except (OSError, UserError) as error:
            print(f"warning: {checkpoint.name} was not exported: {error}", flush=True)

    def _copy(self, stream: torch.cuda.Stream | None) -> list[dict[str, Tensor]]:
        """This rank's state on the host."""
        if self.host_copy is None:
            pinned = None if stream is None else torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
            self.host_copy = HostCopy(self.optimizer.state, pinned)
        with torch.cuda.stream(stream):
            return self.host_copy.renew(stream.synchronize if stream is not None else lambda: None)


def write_checkpoint(folder: Path, state: State, commit: Commit, config: Config, mesh: Mesh) -> None:
    """Write and commit `folder`/step-...; every rank calls it with its part of the state.

    Raises CheckpointError, on every rank, where any could not write; what was written is then removed.
    """
    target = step_folder(folder, commit.step)

    def on_main(work: Callable[[], None]) -> None:
        _agreed(work if mesh.is_main else lambda: None, target, mesh)

    try:
        on_main(lambda: _make_empty(target))
        for part in _agreed(lambda: _write_shards(target, state, mesh), target, mesh):
            commit.files.update(part)
        on_main(lambda: _commit(target, commit, config))
    except CheckpointError:
        if mesh.is_main:
            shutil.rmtree(target, ignore_errors=True)
        mesh.saving.gather(None)
        raise


def _agreed(work: Callable[[], Any], target: Path, mesh: Mesh) -> list[Any]:
    """Run `work` on every rank, for its value on each; where it fails on one, raise the same CheckpointError on all."""
    value = problem = None
    try:
        value = work()
    except (OSError, CheckpointError) as error:
        problem = reason(error)
    values, problems = zip(*mesh.saving.gather((value, problem)), strict=True)
    if any(problems):
        raise CheckpointError(f"checkpoint {target.name} was not saved: {next(filter(None, problems))}")
    return list(values)


def _make_empty(target: Path) -> None:
    """Take away what an attempt left that died before it committed, or a damaged checkpoint of the same step."""
    if target.exists():
        (target / COMMIT).unlink(missing_ok=True)
        shutil.rmtree(target)
    target.mkdir(parents=True)


def _write_shards(target: Path, state: State, mesh: Mesh) -> dict[str, list[Any]]:
    """Returns name, size and checksum of the file that this rank wrote."""
    from tptrain.checkpoint.torch_dcp import write

    return write(target, state, mesh.saving)


def _commit(target: Path, commit: Commit, config: Config) -> None:
    for name, (length, _) in commit.files.items():
        if not (target / name).exists() or (target / name).stat().st_size != length:
            raise OSError(f"rank 0 does not see {name}: run.dir must be on a file system that all nodes share")
    write_config(config, target / "config.yaml")
    for name in (INDEX, "config.yaml"):
        sync(target / name)
        commit.files[name] = measure(target / name)
    sync(target)
    body = asdict(commit)
    write_atomically(target / COMMIT, json.dumps({"commit": body, "xxh3_128": body_digest(body)}, indent=1))
    sync(target)
    sync(target.parent)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Delete the oldest. The marker goes first, so that a folder half deleted counts for nothing.

    Later steps than this one were found damaged when the run resumed: they neither count nor go.
    """
    good = [path for path in committed(folder) if step_of(path) <= step]
    with contextlib.suppress(OSError):  # one checkpoint too many is no reason to stop
        for old in good[:-keep]:
            (old / COMMIT).unlink()
    for path in step_folders(folder):
        if not (path / COMMIT).exists():
            shutil.rmtree(path, ignore_errors=True)
