"""`launch` on this machine, end to end: what it leaves behind, what it survives, and how it goes on."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from launch.local import Follower, defers_sigterm, supervisors
from launch.run_dir import record_job
from tests.commands import (
    finish,
    losses,
    on_a_terminal,
    ranks_of,
    rows_in,
    run,
    start_launch,
    tptrain,
    trainer_of,
    wait_until,
)
from tests.corpus import overrides
from tests.wandb_files import wandb_rows, wandb_tables
from tptrain.checkpoint.commit import damage, read_commit
from tptrain.config import load_config
from tptrain.ops.choose import COMPILERS
from tptrain.records.rows import read_rows
from tptrain.records.run_dir import COMMIT, committed, step_of

TP2 = ["parallel.tp=2", "checkpoint.every=5"]
LONGER = 100  # steps, so that a run is not at its end before it notices what happens to it
FINISHED = [
    "wandb.mode=offline",
    "checkpoint.every=4",
    "checkpoint.keep=4",
    "cluster.env.GREETING='two words'",
    "cluster.setup=['export NUMBER=7', 'echo greeting $GREETING $NUMBER']",
    "logging.samples=['two words', the]",
    "logging.samples_every=8",
    "logging.samples_tokens=20",
]


def launch_lines(folder: Path, *changes: str, name: str = "run") -> list[str]:
    return [*overrides(folder, name), *TP2, *changes]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 20 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("launch")
    done = tptrain("launch", *launch_lines(folder, *FINISHED), HF_TOKEN="hf_secret-1", WANDB_API_KEY="5ec2e7" * 7)
    assert done.returncode == 0, done.stdout
    (folder / "output").write_text(done.stdout)
    return folder


def test_leaves_committed_sharded_checkpoints(finished: Path) -> None:
    checkpoints = committed(finished / "run" / "checkpoints")
    assert [step_of(path) for path in checkpoints] == [8, 12, 16, 20]  # keep=4
    for path in checkpoints:
        commit = read_commit(path)
        assert not isinstance(commit, str)
        assert (commit.tp, commit.world, commit.samples) == (2, 2, commit.step * 8)
        assert {"__0_0.distcp", "__1_0.distcp", "index.json", "config.yaml"} == set(commit.files)
        assert not any(damage(path / name, *entry) for name, entry in commit.files.items())


def test_start_up_is_shown_by_phase(finished: Path) -> None:
    match = re.search(r"^started in ([\d.]+) s: (.*)$", (finished / "output").read_text(), re.MULTILINE)
    assert match
    parts = dict(part.rsplit(" ", 1) for part in match[2].split(", "))
    assert list(parts) == ["launch", "imports", "rendezvous", "data and model", "first step"]
    seconds = [float(value) for value in parts.values()]
    assert min(seconds) >= 0
    assert sum(seconds) == pytest.approx(float(match[1]), abs=0.3)


def test_wandb_and_metrics_tell_the_same(finished: Path) -> None:
    rows = {row["step"]: row for row in read_rows(finished / "run" / "metrics.jsonl")}
    logged = wandb_rows(finished / "run")
    assert len(rows) == 20
    assert {step: row["loss"] for step, row in rows.items()} == {step: row["loss"] for step, row in logged.items()}
    assert "val_loss" in rows[20]
    assert rows[20]["val_loss"] == logged[20]["val_loss"]
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_time_s", "memory_gb"}
    assert all(keys <= row.keys() for row in rows.values())


def test_samples_are_what_generate_answers_with_the_run(finished: Path) -> None:
    """Of ranks at tp=2 and their checkpoint on one; also in wandb's files."""
    rows = read_rows(finished / "run" / "metrics.jsonl")
    samples = {row["step"]: row["samples"] for row in rows if "samples" in row}
    assert list(samples) == [8, 16, 20]
    logged = {step: [[step, *each.values()] for each in texts] for step, texts in samples.items()}
    assert wandb_tables(finished / "run", "samples") == logged
    prompts = finished / "prompts"
    prompts.write_text("two words\nthe\n")
    done = tptrain("generate", str(finished / "run"), f"prompt_file={prompts}", "max_new_tokens=20", "format=json")
    assert done.returncode == 0, done.stdout
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [{key: answer[key] for key in ("prompt", "text")} for answer in answers] == samples[20]


def test_compiled_code_is_not_left_with_the_run_and_what_computes_is_said_once(finished: Path) -> None:
    """The folder of the run and of its data may lie on a network file system."""
    assert (finished / "output").read_text().count("computing with ") == 1
    assert list(finished.rglob("*.so")) == []


def test_console_tells_progress_and_what_is_next(finished: Path) -> None:
    output = (finished / "output").read_text()
    assert re.search(r"step 20/20  loss \d\.\d{4}  .* tok/s  eta 0:00:00", output)
    assert "wandb sync" in output
    assert f"{finished}/run/checkpoints" in output


@pytest.fixture(scope="module")
def on_terminals(finished: Path) -> list[str]:
    """What a run of 10 steps showed on a terminal, and what it showed when it went on to 20."""
    lines = launch_lines(finished, "train.eval_every=5", "optim=constant", "wandb.mode=offline", name="terminal")
    return [on_a_terminal("launch", *lines, f"train.steps={steps}") for steps in (10, 20)]


def test_on_a_terminal_rows_are_a_bar_and_validations_are_lines(finished: Path, on_terminals: list[str]) -> None:
    """Also of a run that goes on: the rows it has before are not shown again."""
    for start, steps, shown in zip((0, 10), (10, 20), on_terminals, strict=True):
        lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown)]
        bar = rf" {steps}/{steps} \[.*, loss \d\.\d{{4}}, lr .*, grad_norm .* tok/s\]"
        assert any(re.search(bar, line) for line in lines), shown
        rows = [line for line in lines if line.startswith("step ")]
        assert [int(row[5:].split("/")[0]) for row in rows] == [start + 5, start + 10], shown
        assert all("val_loss" in row for row in rows)
        assert sum(line.startswith("started in") for line in lines) == 1
    log = max((finished / "terminal" / "logs").glob("*_0_log.out"), key=lambda path: path.stat().st_mtime)
    assert log.read_text().count("\nstep ") == 10


@pytest.mark.usefixtures("on_terminals")
def test_a_resumed_run_goes_on_in_the_same_wandb_run(finished: Path) -> None:
    files = sorted((finished / "terminal").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "both attempts carry one run id"
    assert set(wandb_rows(finished / "terminal")) == set(range(1, 21))


def test_no_secret_is_written(finished: Path) -> None:
    files = [path for path in (finished / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert b"hf_secret-1" not in content, path
        assert b"5ec2e7" * 7 not in content, path


def test_again_is_done_already(finished: Path) -> None:
    before = sorted((finished / "run").rglob("*"))
    again = tptrain("launch", *launch_lines(finished, *FINISHED))
    assert again.returncode == 0
    assert "already finished: step 20" in again.stdout
    new = set((finished / "run").rglob("*")) - set(before)
    assert all(path.parent.name == "logs" for path in new), new


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS["cpu"])), reason="no C++ compiler here")
def test_where_one_rank_has_no_compiler_all_compute_with_pytorch(finished: Path, tmp_path: Path) -> None:
    alone = f"export PATH={tmp_path} TMPDIR={tmp_path}"  # where there is neither a compiler nor what one has compiled
    script = f'[ "$RANK" = 1 ] && {alone}; exec {sys.executable} -m tptrain train "$@"'
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"]
    done = run(*torchrun, "bash", "-c", script, "bash", *launch_lines(finished, "train.steps=2", name="mixed"))
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if "computing with " in line]
    assert len(lines) == 1
    if "C kernels" in (finished / "output").read_text():  # with a processor that they are for
        assert re.search("computing with PyTorch: alone .* would take .*C kernels.*, and .* PyTorch", lines[0]), lines
    assert losses(finished / "mixed") == pytest.approx(losses(finished / "run")[:2], abs=1e-5)


def test_train_under_torchrun(finished: Path) -> None:
    """The same job, started by torchrun: bit for bit the losses of `launch`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = run(*torchrun, "-m", "tptrain", "train", *launch_lines(finished, name="torchrun"))
    assert done.returncode == 0, done.stdout
    assert losses(finished / "torchrun") == losses(finished / "run")
    checkpoints = committed(finished / "torchrun" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000015", "step-00000020"]  # keep=2, the default


# ----------------------------------------------------------------------------------------------------------- disturbed


Measure = Callable[[int], list[float]]


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> Measure:
    """The losses of that many steps at a constant rate, of a run that nothing disturbed."""
    runs: list[list[float]] = []

    def first(steps: int) -> list[float]:
        if not runs or len(runs[-1]) < steps:
            name = f"undisturbed-{steps}"
            changes = "optim=constant", "checkpoint.every=0", f"train.steps={steps}"
            done = tptrain("launch", *launch_lines(finished, *changes, name=name))
            assert done.returncode == 0, done.stdout
            runs.append(losses(finished / name))
        return runs[-1][:steps]

    return first


@dataclass(frozen=True)
class Ending:
    """How a launch ended that was disturbed in its training, and what it left."""

    output: str
    code: int
    pid: int  # of the controller
    saved: str  # the name of the newest committed checkpoint
    steps: int  # in metrics.jsonl


@dataclass(frozen=True)
class Disturbed:
    refused: subprocess.CompletedProcess[str]  # another launch into the run while it went on
    untouched: bool  # whether that one left the run's config as it was
    endings: dict[str, Ending]
    last: str  # the output of the launch that went on to the end
    losses: list[float]


KILLED = {f"rank {rank} killed while {moment}": (rank, moment) for moment in ("training", "saving") for rank in (0, 1)}
DISTURBANCES = {  # and the spacing of checkpoints in the launch that is disturbed so; 0: only at its end
    "Ctrl-C": 0,
    "controller killed": 0,
    "SIGTERM to the controller": 0,
    **{name: 1 if moment == "saving" else 5 for name, (_, moment) in KILLED.items()},
}


@pytest.fixture(scope="module")
def disturbed(finished: Path) -> Disturbed:
    """One run that is disturbed in each way in turn, each time in the launch that goes on after the one before."""
    run_dir, endings = finished / "disturbed", {}
    refused, untouched, lines = None, False, []
    for name, every in DISTURBANCES.items():
        changes = "optim=constant", f"train.steps={rows_in(run_dir) + LONGER}", f"checkpoint.every={every}"
        lines = launch_lines(finished, *changes, name="disturbed")
        launch = start_launch(*lines)
        if not endings:
            wait_for_ranks(launch)
            before = (run_dir / "config.yaml").read_text()
            refused = tptrain("launch", *lines, "logging.every=2")
            untouched = (run_dir / "config.yaml").read_text() == before
        endings[name] = disturb(launch, name, run_dir)
    assert refused is not None
    last = tptrain("launch", *lines)
    assert last.returncode == 0, last.stdout
    return Disturbed(refused, untouched, endings, last.stdout, losses(run_dir))


def wait_for_ranks(launch: subprocess.Popen[str]) -> None:
    wait_until(lambda: len(ranks_of(launch)) == 2, "two ranks", launch)


def disturb(launch: subprocess.Popen[str], name: str, run_dir: Path) -> Ending:
    """The end of a launch that is disturbed after some steps of its own."""
    folder = run_dir / "checkpoints"
    steps, saved = rows_in(run_dir), step_of(committed(folder)[-1]) if committed(folder) else 0
    wait_until(lambda: rows_in(run_dir) >= steps + 3, "three more steps", launch)
    (controller,) = psutil.Process(launch.pid).children()
    ranks = controller.children(recursive=True)
    if name == "Ctrl-C":
        os.killpg(launch.pid, signal.SIGINT)  # a terminal signals the whole foreground group
    elif name == "controller killed":
        controller.kill()
    elif name == "SIGTERM to the controller":
        controller.terminate()
    else:
        rank, moment = KILLED[name]
        victim = trainer_of(ranks_of(launch)[rank])
        wait_until(lambda: step_of(committed(folder)[-1]) > saved, "a checkpoint", launch)
        if moment == "saving":
            wait_until(lambda: any(not (path / COMMIT).exists() for path in folder.glob("step-*")), "a save", launch)
        victim.kill()
    output = finish(launch)
    assert not psutil.wait_procs(ranks, timeout=5)[1], f"{name}: ranks are left"
    return Ending(output, launch.returncode, controller.pid, committed(folder)[-1].name, rows_in(run_dir))


def test_a_run_that_is_disturbed_over_and_over_is_as_one_that_is_not(
    disturbed: Disturbed, undisturbed: Measure
) -> None:
    """Whatever ended a launch, the next one goes on from the newest committed checkpoint."""
    endings = list(disturbed.endings.values())
    outputs = [*(ending.output for ending in endings[1:]), disturbed.last]
    for ending, output in zip(endings, outputs, strict=True):
        assert f"resuming from {ending.saved}" in output
    assert disturbed.losses == undisturbed(max(len(disturbed.losses), LONGER))[: len(disturbed.losses)]


def test_ctrl_c_saves(disturbed: Disturbed) -> None:
    ending = disturbed.endings["Ctrl-C"]
    assert ending.code == 1
    assert "stopped at step" in ending.output
    assert "Traceback" not in ending.output
    assert ending.saved == f"step-{ending.steps:08d}"


def test_ranks_whose_controller_is_killed_stop_as_on_a_sigterm(disturbed: Disturbed) -> None:
    ending = disturbed.endings["controller killed"]
    assert ending.code == 1, ending.output
    assert f"error: the process that started the ranks (pid {ending.pid}) was killed" in ending.output
    assert f"the newest committed checkpoint is {ending.saved}" in ending.output
    assert ending.saved == f"step-{ending.steps:08d}"


def test_a_sigterm_to_the_controller_reaches_the_ranks(disturbed: Disturbed) -> None:
    ending = disturbed.endings["SIGTERM to the controller"]
    assert ending.code == 0, ending.output
    assert "saved; launch again" in ending.output
    assert "killed" not in ending.output


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_rank_ends_the_run_and_is_named(disturbed: Disturbed, name: str) -> None:
    ending, (rank, _) = disturbed.endings[name], KILLED[name]
    assert ending.code == 1
    assert re.search(rf"verdict: rank {rank} on .* was killed by SIGKILL", ending.output)
    assert f"the newest committed checkpoint is {ending.saved}" in ending.output


def test_a_second_launch_into_a_run_that_goes_on_is_refused(disturbed: Disturbed) -> None:
    assert disturbed.refused.returncode == 2
    assert "is running. Wait for it, or stop it first" in disturbed.refused.stdout
    assert disturbed.untouched


# ---------------------------------------------------------------------------------------------- disturbed at the start


@pytest.mark.parametrize("pause_s", [0, 0.4])  # no rank is there yet; ranks do not listen yet
def test_ctrl_c_while_the_ranks_start(finished: Path, pause_s: float) -> None:
    launch = start_launch(*launch_lines(finished, "train.steps=5000", name=f"early-{pause_s}"))
    assert launch.stdout is not None
    while not launch.stdout.readline().startswith("job "):
        assert launch.poll() is None
    time.sleep(pause_s)
    os.killpg(launch.pid, signal.SIGINT)
    assert "SIGTERM before the first step: nothing was trained" in finish(launch)
    assert launch.returncode == 1


def test_ranks_whose_controller_is_killed_at_the_start_stop(finished: Path) -> None:
    launch = start_launch(*launch_lines(finished, "train.steps=5000", name="orphans"))
    wait_for_ranks(launch)
    (controller,) = psutil.Process(launch.pid).children()
    ranks = controller.children(recursive=True)
    controller.send_signal(signal.SIGUSR2)
    output = finish(launch)
    assert launch.returncode == 1, output
    assert f"error: the process that started the ranks (pid {controller.pid}) was killed" in output
    assert not psutil.wait_procs(ranks, timeout=5)[1], "ranks are left"
    assert "before the first step: nothing was trained" in output


def test_a_sigterm_to_the_controller_at_the_start_reaches_the_ranks(finished: Path) -> None:
    launch = start_launch(*launch_lines(finished, "train.steps=5000", name="passed-on"))
    wait_until(lambda: sum(defers_sigterm(each.pid) for each in ranks_of(launch)) == 2, "two ranks", launch)
    (controller,) = psutil.Process(launch.pid).children()
    controller.terminate()
    output = finish(launch)
    assert launch.returncode == 1, output
    assert "before the first step: nothing was trained" in output
    assert "killed" not in output


@pytest.fixture(scope="module")
def silent_server(finished: Path) -> Iterator[Future[subprocess.CompletedProcess[str]]]:
    """A launch whose wandb server takes connections and never answers: most of its time it waits for time-outs."""
    with socket.socket() as silent, ThreadPoolExecutor(1) as thread:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        server = f"http://127.0.0.1:{silent.getsockname()[1]}"
        lines = launch_lines(finished, "wandb.mode=auto", name="wandb-silent")
        yield thread.submit(tptrain, "launch", *lines, WANDB_API_KEY="5ec2e7" * 7, WANDB_BASE_URL=server)


@pytest.mark.usefixtures("silent_server")  # which waits beside this test, that waits too
def test_a_supervisor_killed_in_start_up_is_named(finished: Path) -> None:
    """That of rank 0 in one launch, of rank 1 in another: both wait for what does not come, side by side."""

    def connected(launch: subprocess.Popen[str]) -> bool:
        """Supervisors to that of rank 0, and trainers, which import torch before, to the store."""
        ranks = ranks_of(launch)
        both = [process for each in ranks if each.children() for process in (each, trainer_of(each))]
        ends = [psutil.Process(each.pid).net_connections("tcp") for each in both]
        return len(ends) == 4 and all(any(end.status == "ESTABLISHED" for end in each) for each in ends)

    launches = []
    for rank in (0, 1):
        launch = start_launch(*launch_lines(finished, "train.steps=5000", name=f"start-up-{rank}"))
        wait_until(partial(connected, launch), "connections", launch)
        ranks_of(launch)[rank].kill()
        launches.append(launch)
    for rank, launch in enumerate(launches):
        output = finish(launch)
        assert launch.returncode == 1
        pattern = rf"(verdict|error): rank {rank} on \S+ does not answer: its processes are gone"
        assert re.search(pattern, output), output
        assert f"rank {1 - rank} " not in output


def test_of_ranks_that_were_killed_the_one_that_ended_before_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A supervisor that was killed before it could connect: the launcher ends the others, and nobody left a report."""
    sleep = f"{sys.executable} -c 'import time; time.sleep(60)' submitit.core._submit"
    controller = subprocess.Popen(["bash", "-c", f"SUBMITIT_LOCAL_GLOBALID=0 SUBMITIT_LOCAL_JOB_ID=$$ {sleep} & wait"])
    config = load_config([*launch_lines(tmp_path), "cluster.tasks_per_node=2"])
    (tmp_path / "run" / "logs").mkdir(parents=True)
    record_job(tmp_path / "run", attempt="local.1-0")
    follower = Follower(config, Mock(job_id=str(controller.pid)), [])
    wait_until(lambda: len(supervisors(follower.job)) == 1, "rank 0")
    follower._kill()
    assert controller.wait(60) is not None
    assert follower.follow() == 1
    assert "error: rank 1 was killed or crashed" in capfd.readouterr().err


def test_a_controller_killed_before_there_is_a_rank_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = load_config([*launch_lines(tmp_path), "cluster.tasks_per_node=2"])
    (tmp_path / "run" / "logs").mkdir(parents=True)
    record_job(tmp_path / "run", attempt="local.1-0")
    with subprocess.Popen(["sleep", "60"]) as controller:
        controller.send_signal(signal.SIGUSR2)
        assert Follower(config, Mock(job_id=str(controller.pid)), []).follow() == 1
    error = capfd.readouterr().err
    assert f"error: the process that started the ranks (pid {controller.pid}) was killed" in error
    assert "rank 0" not in error


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(finished: Path) -> None:
    """The newest has lost its end, the one before has a flipped bit, the one before that has no marker."""
    run_dir = finished / "damaged"
    shutil.copytree(finished / "run", run_dir)
    unmarked, flipped, truncated = committed(run_dir / "checkpoints")[1:]
    (unmarked / COMMIT).unlink()
    file = flipped / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    file = truncated / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    again = tptrain("launch", *launch_lines(finished, "train.steps=21", "checkpoint.keep=4", name=run_dir.name))
    assert again.returncode == 0, again.stdout
    assert re.search(rf"{truncated.name} is damaged.*__1_0\.distcp", again.stdout), again.stdout
    assert re.search(rf"{flipped.name} is damaged.*__0_0\.distcp", again.stdout), again.stdout
    assert unmarked.name in again.stdout
    assert "resuming from step-00000008" in again.stdout
    assert len(losses(run_dir)) == 21


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_stops_with_a_message_and_harms_nothing(finished: Path, undisturbed: Measure) -> None:
    """Something else fills it up once the run has begun: before, the run would be refused."""
    one = sum(file.stat().st_size for file in (finished / "run/checkpoints/step-00000020").iterdir())
    disk, filler = finished / "disk", finished / "disk" / "filler"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        changes = "optim=constant", f"train.steps={LONGER}", "checkpoint.keep=99"
        lines = [*launch_lines(finished, *changes), f"run.dir={disk}/run"]
        launch = start_launch(*lines)
        wait_until(lambda: len(committed(disk / "run" / "checkpoints")) >= 2, "two checkpoints", launch)
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # a save takes its part meanwhile
            while shutil.disk_usage(disk).free > one // 2:
                file.write(bytes(2**16))
        output = finish(launch)
        assert launch.returncode == 1, output
        assert "no space left" in output
        left = committed(disk / "run" / "checkpoints")
        assert 2 <= len(left) < 20
        assert [step_of(path) for path in left] == [5 * (i + 1) for i in range(len(left))]
        for path in left:
            commit = read_commit(path)
            assert not isinstance(commit, str)
            assert not any(damage(path / name, *entry) for name, entry in commit.files.items())
        refused = tptrain("launch", *lines)
        assert refused.returncode == 2, refused.stdout
        assert "With checkpoint.keep=99 those to come need" in refused.stdout
        filler.unlink()
        again = tptrain("launch", *lines)
        assert again.returncode == 0, again.stdout
        assert f"resuming from {left[-1].name}" in again.stdout
        assert losses(disk / "run") == undisturbed(LONGER)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_silent_wandb_server_does_not_stop_training(finished: Path, silent_server: Future[Any]) -> None:
    """The run is logged offline instead."""
    done = silent_server.result()
    assert done.returncode == 0, done.stdout
    assert "wandb is out of reach" in done.stdout
    assert set(wandb_rows(finished / "wandb-silent")) == set(range(1, 21))


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(finished: Path) -> None:
    done = tptrain("launch", *launch_lines(finished, "optim=constant", "optim.lr=1e30", name="diverged"))
    assert done.returncode == 1
    assert "gradient norm nan" in done.stdout
    assert "Traceback" not in done.stdout
    assert committed(finished / "diverged" / "checkpoints") == []


def test_set_up_lines_and_variables_reach_local_ranks(finished: Path) -> None:
    assert "greeting two words 7" in (finished / "output").read_text()
    broken = tptrain("launch", *launch_lines(finished, "cluster.setup=['false']", name="broken"))
    assert broken.returncode == 1
    assert "rank 0 was killed or crashed" in broken.stdout


def test_a_run_whose_data_changed_behind_its_name_is_not_resumed(finished: Path) -> None:
    shutil.copytree(finished / "run", finished / "same-data")
    lines = launch_lines(finished, name="same-data")
    corpus = finished / "corpus.jsonl"
    before = corpus.read_text()
    os.utime(corpus)  # touched, but the same: packed again, and the run goes on
    again = tptrain("launch", *lines, "train.steps=21")
    assert "resuming from step-00000020" in again.stdout
    try:
        corpus.write_text(before + '{"text": "one more document"}\n')
        changed = tptrain("launch", *lines, "train.steps=22")
    finally:
        corpus.write_text(before)
    assert changed.returncode == 2, changed.stdout
    assert "its data has changed" in changed.stdout
