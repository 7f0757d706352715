"""Which checkpoints count, which are kept, and which is loaded: one rank, no process group."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock, patch

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from tests.distributed import mesh
from tests.models import training
from tptrain.checkpoint import save
from tptrain.checkpoint.commit import CheckpointError
from tptrain.checkpoint.host_copy import HostCopy
from tptrain.checkpoint.layout import flat
from tptrain.checkpoint.load import load_newest
from tptrain.config import Config, load_config
from tptrain.optim.state import MOMENTS
from tptrain.records.run_dir import COMMIT, committed, step_folder

DTYPE = torch.bfloat16  # the masters and moments are float32


class Run:
    """A model whose weights say which step it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Config = load_config(["model.num_hidden_layers=1", f"run.dir={folder}", "checkpoint.keep=2"])
        self.mesh = mesh(1)
        self.optimizer = training(self.config.model, self.mesh, dtype=DTYPE).optimizer
        self.saver = save.Saver(folder, self.optimizer, self.config, "data", self.mesh)
        self.lines: list[str] = []

    def tensors(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Every master and moment, and by what its value differs from the step's number."""
        for block in self.optimizer.state.blocks:
            for piece in block.pieces:
                yield block.master[piece.place], 1
                for moment in MOMENTS:
                    yield block.moments[moment][piece.place], 0.5

    def fill(self, step: int) -> None:
        for tensor, factor in self.tensors():
            tensor.fill_(step * factor)
        self.optimizer.updates = step

    def save(self, step: int) -> None:
        self.fill(step)
        self.saver.save(step)
        self.saver.finish()

    def load(self) -> int | None:
        """The step that was loaded, as the weights and moments tell it."""
        self.lines.clear()
        commit = load_newest(self.folder, self.optimizer, self.mesh, self.lines.append)
        if commit is None:
            return None
        for tensor, factor in self.tensors():
            assert (tensor == commit.step * factor).all()
        assert self.optimizer.updates == commit.step
        assert commit.samples == commit.step * 8
        return commit.step

    def steps(self) -> list[int]:
        return [int(path.name[5:]) for path in committed(self.folder)]

    def damage(self, step: int, name: str = "__0_0.distcp") -> None:
        file = step_folder(self.folder, step) / name
        content = bytearray(file.read_bytes())
        content[len(content) // 3] ^= 4
        file.write_bytes(content)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "checkpoints")


def test_what_was_saved_on_cpus_is_gone_on_with_on_gpus(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's random state is wanted and not there; a stand-in, as no GPU is here."""
    run.save(5)
    before, of_gpu = torch.get_rng_state(), torch.zeros(16, dtype=torch.uint8)
    torch.rand(3)
    state = {"rng/0/cpu": torch.get_rng_state(), "rng/0/cuda": of_gpu}
    monkeypatch.setattr("tptrain.checkpoint.load.rng_state", lambda mesh: state)
    assert run.load() == 5
    assert (torch.get_rng_state() == before).all()


def test_the_newest_are_kept_and_the_newest_is_loaded(run: Run) -> None:
    assert run.load() is None
    for step in (5, 10, 15):
        run.save(step)
    assert run.steps() == [10, 15]
    assert run.load() == 15
    assert run.lines == []


@pytest.mark.parametrize("name", ["__0_0.distcp", "index.json", "config.yaml", COMMIT])
def test_a_flipped_bit_in_any_file_is_noticed_and_named(run: Run, name: str) -> None:
    run.save(5)
    run.save(10)
    run.damage(10, name)
    assert run.load() == 5
    assert "step-00000010 is damaged" in run.lines[0]
    assert name in run.lines[0]


def test_a_missing_file_is_named(run: Run) -> None:
    run.save(5)
    run.save(10)
    (step_folder(run.folder, 10) / "__0_0.distcp").unlink()
    assert run.load() == 5
    assert "__0_0.distcp: missing" in run.lines[0]


def test_a_damaged_later_step_neither_counts_as_kept_nor_stays(run: Run) -> None:
    for step in (5, 10, 15):
        run.save(step)
    run.damage(15)
    assert run.load() == 10
    run.save(12)
    assert run.steps() == [10, 12, 15]
    assert run.load() == 12, "the damaged one is passed over again"
    run.save(15)
    assert run.load() == 15
    assert run.steps() == [12, 15]


def test_what_was_never_committed_does_not_count(run: Run) -> None:
    run.save(5)
    run.save(10)
    (step_folder(run.folder, 10) / COMMIT).unlink()
    assert run.load() == 5
    assert "step-00000010" in run.lines[0]
    run.save(11)
    assert run.steps() == [5, 11]
    assert not step_folder(run.folder, 10).exists()


def test_none_whole_is_an_error_and_not_a_fresh_start(run: Run) -> None:
    run.save(5)
    run.damage(5)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        run.load()


def test_commit_tells_the_position_in_the_data(run: Run) -> None:
    run.save(5)
    content = json.loads((step_folder(run.folder, 5) / COMMIT).read_text())["commit"]
    assert (content["step"], content["samples"], content["world"], content["tp"]) == (5, 40, 1, 1)


# ---------------------------------------------------------------------------------------------------- in the background


def test_training_goes_on_while_a_save_is_written(run: Run) -> None:
    gate, right = threading.Event(), save._write_shards

    def slow(*arguments: Any) -> Any:
        assert gate.wait(60)
        return right(*arguments)

    with patch.object(save, "_write_shards", slow):
        run.fill(5)
        run.saver.save(5)  # returns although nothing is written
        assert run.steps() == []
        run.saver.wait_for_copy()
        run.fill(6)  # what is written is what was there when it had been copied
        gate.set()
        run.saver.finish()
    assert run.steps() == [5]
    assert run.load() == 5


def test_the_weights_do_not_change_before_they_are_copied(run: Run) -> None:
    gate, right = threading.Event(), save.Saver._copy

    def slow(saver: save.Saver, stream: None) -> Any:
        assert gate.wait(60)
        return right(saver, stream)

    with patch.object(save.Saver, "_copy", slow):
        run.fill(5)
        run.saver.save(5)
        update = threading.Thread(target=lambda: (run.saver.wait_for_copy(), run.fill(6)))
        update.start()
        update.join(0.3)
        assert update.is_alive()
        gate.set()
        update.join(60)
        run.saver.finish()
    assert run.load() == 5


class Pinned(torch.Tensor):
    """A stand-in for page-locked memory: what is copied into it is there when `arrive` has been called, not before."""

    under_way: ClassVar[list[Callable[[], None]]] = []
    places: ClassVar[set[int]] = set()  # the memory that was copied into

    def copy_(self, other: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert non_blocking
        assert not self.under_way, "the part before has been waited for"
        memory = self.as_subclass(torch.Tensor)
        self.places.add(memory.untyped_storage().data_ptr())
        self.under_way.append(lambda: (memory.copy_(other), None)[1])
        return self

    @classmethod
    def arrive(cls) -> None:
        cls.under_way.pop()()


def test_a_state_reaches_the_host_through_little_pinned_memory(run: Run) -> None:
    """The buffer is smaller than a block, so each tensor comes in parts; the last one is cut."""
    pinned = torch.zeros(4 * 100_003, dtype=torch.uint8).as_subclass(Pinned)
    copy = HostCopy(run.optimizer.state, pinned)
    assert max(len(tensor) for block in copy.tensors for tensor in block.values()) > 100_003
    for _ in range(2):
        for tensor, _ in run.tensors():
            tensor.normal_()
        renewed = copy.renew(Pinned.arrive)
        for block, now in zip(renewed, flat(run.optimizer.state), strict=True):
            assert list(block) == list(now)
            assert all((block[kind] == now[kind]).all() for kind in now)
        assert renewed[0]["model"].data_ptr() == copy.tensors[0]["model"].data_ptr(), "the memory is that of the first"
    assert Pinned.places == {pinned.untyped_storage().data_ptr()}


def test_a_rank_saves_from_its_own_gpu_through_one_small_pinned_buffer(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state lies on the CPU, torch.cuda is a stand-in that notes the calls, and pinned memory is ordinary."""
    calls: list[tuple[str, object, bool]] = []  # the last: in the thread that saves
    main, right = threading.current_thread(), torch.empty
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)

    def note(name: str, value: object) -> None:
        calls.append((name, value, threading.current_thread() is not main))

    def empty(*size: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            note("pinned", size)
        return right(*size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: note("device", device))
    monkeypatch.setattr(save, "rng_state", lambda mesh: {})
    gpu = torch.device("cuda", 3)
    run.saver.mesh = replace(run.mesh, device=gpu)
    for step in (5, 10):
        run.save(step)
    assert calls == [("device", gpu, True), ("pinned", (256 * 2**20,), True), ("device", gpu, True)]
    assert run.load() == 10


def test_a_save_waits_for_no_gpu_once_its_state_is_on_the_host(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """That CUDA is there is a stand-in: torch would then take a loader that waits for the GPU at each large tensor."""
    with_cuda = vars(torch) | {"cuda": SimpleNamespace(is_available=lambda: True)}
    monkeypatch.setattr(filesystem, "torch", SimpleNamespace(**with_cuda))
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", Mock(side_effect=AssertionError("it may wait for a GPU")))
    run.save(5)
    monkeypatch.undo()
    assert run.load() == 5


def test_a_save_waits_for_the_one_before(run: Run) -> None:
    order, right = [], save._write_shards

    def noted(target: Path, *arguments: Any) -> Any:
        order.append(f"begin {target.name[-1]}")
        measured = right(target, *arguments)
        order.append(f"end {target.name[-1]}")
        return measured

    with patch.object(save, "_write_shards", noted):
        for step in (1, 2, 3):
            run.fill(step)
            run.saver.save(step)
        run.saver.finish()
    assert order == ["begin 1", "end 1", "begin 2", "end 2", "begin 3", "end 3"]
    assert run.load() == 3


@pytest.mark.parametrize("when", ["at the next save", "at the end"])
def test_a_save_that_fails_in_the_background_is_told(run: Run, when: str) -> None:
    run.save(5)
    with patch.object(save, "_write_shards", side_effect=OSError(28, "No space left on device")):
        run.saver.save(6)
        run.saver.thread.join()  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="step-00000006 was not saved: no space left"):
        run.saver.save(7) if when == "at the next save" else run.saver.finish()
    assert run.steps() == [5]
    run.save(8)
    assert run.load() == 8
