"""A rank's device: what was asked for, or an error that says why it cannot be had; memory that is too small."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.commands import tptrain
from tests.corpus import overrides, write_corpus
from tptrain.config import Config, UserError
from tptrain.run import device, rank, rendezvous
from tptrain.run.device import check_cores, gpu_request, near_cores, pick_device
from tptrain.watch.black_box import BlackBox
from tptrain.watch.outcome import DEVICE_FAULTS, Outcome


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _asking(gpus: int | None) -> Config:
    config = Config()
    config.cluster.gpus_per_node = gpus
    return config


@pytest.mark.parametrize(
    ("gpus", "environment", "expected"),
    [
        (None, {}, None),
        (2, {}, "cluster.gpus_per_node=2"),
        *(
            (None, {name: "4"}, f"{name}=4")
            for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK")
        ),
        (None, {"SLURM_GPUS_PER_SOCKET": "h100:4"}, "SLURM_GPUS_PER_SOCKET=h100:4"),
        (None, {"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1"),
        (None, {"SLURM_STEP_GPUS": "3"}, "SLURM_STEP_GPUS=3"),
        (None, {"SLURM_GPUS_ON_NODE": "0"}, None),
    ],
)
def test_who_asks_for_gpus(gpus: int | None, environment: dict[str, str], expected: str | None) -> None:
    assert gpu_request(_asking(gpus), environment) == expected


@pytest.mark.usefixtures("no_gpu")
def test_gpus_that_are_not_there_are_no_reason_to_train_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    with pytest.raises(UserError, match=r"SLURM_GPUS_PER_TASK=1 asks for GPUs, and torch sees none on"):
        pick_device(_asking(None), 0, 1)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"gpus_per_node=2 asks for GPUs, and torch sees none on .*built without CUDA"):
        pick_device(_asking(2), 0, 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"its driver is older than torch .* built for CUDA 13.0"):
        pick_device(_asking(2), 0, 1)
    config = _asking(None)
    config.train.device = "cuda"
    with pytest.raises(UserError, match=r"train.device=cuda: torch sees no GPU"):
        pick_device(config, 0, 1)


def test_launch_says_so(tmp_path: Path) -> None:
    """Whole: no GPU is here, or as many as two are not."""
    write_corpus(tmp_path)
    lines = [line for line in overrides(tmp_path, "gpus") if line != "train.device=cpu"]
    result = tptrain("launch", *lines, "parallel.tp=2", "cluster.gpus_per_node=2", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2, result.stdout
    assert result.stdout.count("cluster.gpus_per_node=2 asks for GPUs") == 1, result.stdout
    assert "Traceback" not in result.stdout
    lines = [*overrides(tmp_path, "cpu"), "parallel.tp=2", "cluster.gpus_per_node=2", "train.steps=1"]
    result = tptrain("launch", *lines)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("training on the CPU, as train.device=cpu says") == 1


def test_a_rank_with_a_gpu_needs_cores() -> None:
    check_cores(Config(), 4)
    with pytest.raises(UserError, match=r"may use 1 cores, and needs 4 .* Set cluster.cpus_per_task=4"):
        check_cores(Config(), 1)
    config = Config()
    config.cluster.cpus_per_task = 2  # the user's word
    check_cores(config, 2)


@pytest.mark.parametrize(
    ("local", "expected"),
    [("0-3,8-11\n", {2, 3, 8}), ("40-47\n", {2, 3, 4, 8}), ("\n", {2, 3, 4, 8}), (None, {2, 3, 4, 8})],
)
def test_a_rank_keeps_to_cores_near_its_gpu(tmp_path: Path, local: str | None, expected: set[int]) -> None:
    (tmp_path / "0000:1b:00.0").mkdir()
    if local is not None:
        (tmp_path / "0000:1b:00.0" / "local_cpulist").write_text(local)
    assert near_cores("0000:1b:00.0", {2, 3, 4, 8}, tmp_path) == expected


def test_a_rank_takes_its_gpu_and_keeps_to_cores_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a node with two GPUs; torch.cuda and the machine are stand-ins, as no GPU is here."""
    taken: list[object] = []
    cores, near = {0, 1, 2, 3, 8, 9, 10, 11}, {8, 9, 10, 11}
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {torch.device("cuda", 1): gpu}.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, to: taken.append(to))
    monkeypatch.setattr(device, "near_cores", lambda address, allowed: {"0000:1b:00.0": allowed & near}[address])
    assert pick_device(_asking(2), 1, 2) == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1), near]
    cores -= {0, 1, 2, 3, 11}
    with pytest.raises(UserError, match=r"may use 3 cores, and needs 4"):
        pick_device(_asking(2), 1, 2)


TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB of which 1.25 GiB is free. "
    "Process 4711 has 3.00 GiB memory in use. Including non-PyTorch memory, this process has 74.80 GiB memory in use."
)


def ending_of(error: Exception, monkeypatch: pytest.MonkeyPatch) -> tuple[Outcome | None, str]:
    """What the black box of a rank of two holds that this ended, and the exit code is of."""

    def meet(config: Config, box: BlackBox) -> None:
        raise error

    monkeypatch.setattr(rendezvous, "meet", meet)
    config, box = Config(), BlackBox()
    config.parallel.tp = 2
    code = rank.run(config, box, None, "a")
    outcome, message = box.ending()
    assert outcome is not None
    assert code == outcome.exit_code
    return outcome, message


def test_out_of_memory_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, _ = ending_of(torch.OutOfMemoryError(TEXT), monkeypatch)
    assert outcome == Outcome.USER
    assert outcome.final
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory after step 0: Tried to allocate 2.00 GiB. GPU 0 has a total")
    assert "4711" not in message, "it would never be the same error twice"
    for change in ("train.micro_batch_size=4", "train.recompute=selective", "parallel.sequence_parallel=true"):
        assert change in message


@pytest.mark.parametrize(
    ("error", "figures"),
    [
        (MemoryError("Unable to allocate 8.00 GiB for an array"), "Unable to allocate 8.00 GiB for an array"),
        (RuntimeError("CUDA error: out of memory\nFor debugging consider passing"), ""),  # of pinned memory
        (RuntimeError("NCCL error in: a.cpp:1\nLast error:\nCuda failure 2 'out of memory'"), "NCCL error in: a.cpp:1"),
        (
            RuntimeError("err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "9 bytes",
        ),
    ],
)
def test_memory_that_others_than_the_gpus_allocator_lack(
    error: Exception, figures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, message = ending_of(error, monkeypatch)
    assert outcome == Outcome.USER
    assert message.startswith("out of memory after step 0")
    assert figures in message


@pytest.mark.parametrize("fault", DEVICE_FAULTS)
def test_an_error_that_names_the_device_is_the_devices(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where NCCL passes it on."""
    for text in (f"CUDA error: {fault}\nCompile with `TORCH_USE_CUDA_DSA`", f"NCCL error\nCUDA error: {fault}"):
        outcome, message = ending_of(RuntimeError(text), monkeypatch)
        assert (outcome, message) == (Outcome.DEVICE, f"the device failed: CUDA error: {fault}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUDA error: an illegal memory access was encountered", Outcome.BUG),
        ("CUDA error: device-side assert triggered", Outcome.BUG),
        ("CUDA error: unspecified launch failure", Outcome.INFRA),
        ("NCCL communicator was aborted on rank 1", Outcome.INFRA),
    ],
)
def test_an_error_that_may_be_a_kernels_or_a_peers_is_not(
    text: str, expected: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, _ = ending_of(RuntimeError(text), monkeypatch)
    assert outcome == expected
    assert not expected.blames_node


def test_what_comes_after_a_failed_device_does_not_hide_it() -> None:
    box = BlackBox()
    box.end(Outcome.DEVICE, "the device failed")
    box.end(Outcome.INFRA, "lost another rank")
    assert box.ending() == (Outcome.DEVICE, "the device failed")
