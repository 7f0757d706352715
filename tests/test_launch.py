"""`launch` on this machine, end to end: what it leaves behind, what it survives, and how it goes on."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
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
from tests.wandb_files import wandb_rows
from tptrain.checkpoint.commit import damage, read_commit
from tptrain.config import load_config
from tptrain.records.run_dir import COMMIT, committed, step_of
from tptrain.train.metrics import read_rows

TP2 = ["parallel.tp=2", "checkpoint.every=5"]


def launch_lines(folder: Path, *changes: str, name: str = "run") -> list[str]:
    return [*overrides(folder, name), *TP2, *changes]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 20 steps that nothing disturbed: the measure for those that are."""
    folder = tmp_path_factory.mktemp("launch")
    done = tptrain(
        "launch", *launch_lines(folder, "wandb.mode=offline"), HF_TOKEN="hf_secret-1", WANDB_API_KEY="5ec2e7" * 7
    )
    assert done.returncode == 0, done.stdout
    (folder / "output").write_text(done.stdout)
    return folder


def test_leaves_committed_sharded_checkpoints(finished: Path) -> None:
    checkpoints = committed(finished / "run" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000015", "step-00000020"]  # keep=2
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


def test_console_tells_progress_and_what_is_next(finished: Path) -> None:
    output = (finished / "output").read_text()
    assert re.search(r"step 20/20  loss \d\.\d{4}  .* tok/s  eta 0:00:00", output)
    assert "wandb sync" in output
    assert f"{finished}/run/checkpoints" in output


def test_on_a_terminal_rows_are_a_bar_and_validations_are_lines(finished: Path) -> None:
    """Also of a run that goes on: the rows it has before are not shown again."""
    for start, steps in ((0, 10), (10, 20)):
        changes = f"train.steps={steps}", "train.eval_every=5", "optim=constant"
        shown = on_a_terminal("launch", *launch_lines(finished, *changes, name="terminal"))
        lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown)]
        bar = rf" {steps}/{steps} \[.*, loss \d\.\d{{4}}, lr .*, grad_norm .* tok/s\]"
        assert any(re.search(bar, line) for line in lines), shown
        rows = [line for line in lines if line.startswith("step ")]
        assert [int(row[5:].split("/")[0]) for row in rows] == [start + 5, start + 10], shown
        assert all("val_loss" in row for row in rows)
        assert sum(line.startswith("started in") for line in lines) == 1
    log = max((finished / "terminal" / "logs").glob("*_0_log.out"), key=lambda path: path.stat().st_mtime)
    assert log.read_text().count("\nstep ") == 10


def test_no_secret_is_written(finished: Path) -> None:
    files = [path for path in (finished / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert b"hf_secret-1" not in content, path
        assert b"5ec2e7" * 7 not in content, path


def test_again_is_done_already(finished: Path) -> None:
    before = sorted((finished / "run").rglob("*"))
    again = tptrain("launch", *launch_lines(finished, "wandb.mode=offline"))
    assert again.returncode == 0
    assert "already finished: step 20" in again.stdout
    new = set((finished / "run").rglob("*")) - set(before)
    assert all(path.parent.name == "logs" for path in new), new


def test_train_under_torchrun(finished: Path) -> None:
    """The same job, started by torchrun: bit for bit the losses of `launch`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = run(*torchrun, "-m", "tptrain", "train", *launch_lines(finished, name="torchrun"))
    assert done.returncode == 0, done.stdout
    assert losses(finished / "torchrun") == losses(finished / "run")


def test_ctrl_c_saves_and_the_next_launch_goes_on(finished: Path) -> None:
    longer = "checkpoint.every=0", "train.steps=100"  # so that it is not at its end before it hears of the signal
    lines = launch_lines(finished, *longer, name="ctrl-c")
    launch = start_launch(*lines)
    wait_until(lambda: rows_in(finished / "ctrl-c") >= 3, "three steps", launch)
    os.killpg(launch.pid, signal.SIGINT)  # a terminal signals the whole foreground group
    output = finish(launch)
    assert launch.returncode == 1
    assert "stopped at step" in output
    assert "Traceback" not in output
    (saved,) = committed(finished / "ctrl-c" / "checkpoints")
    steps = len(losses(finished / "ctrl-c"))
    assert 3 <= steps < 100
    assert saved.name == f"step-{steps:08d}"
    again = tptrain("launch", *lines)
    assert again.returncode == 0, again.stdout
    assert f"resuming from {saved.name}" in again.stdout
    undisturbed = tptrain("launch", *launch_lines(finished, *longer, name="undisturbed"))
    assert undisturbed.returncode == 0, undisturbed.stdout
    assert losses(finished / "ctrl-c") == losses(finished / "undisturbed")


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


@pytest.mark.parametrize("moment", ["training", "saving"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_and_the_rerun_goes_on(finished: Path, rank: int, moment: str) -> None:
    run_dir = finished / f"killed-{rank}-{moment}"
    every = "checkpoint.every=1" if moment == "saving" else "checkpoint.every=5"
    lines = launch_lines(finished, every, name=run_dir.name)
    launch = start_launch(*lines)
    folder = run_dir / "checkpoints"
    wait_until(lambda: rows_in(run_dir) >= 7 and len(committed(folder)) > 0, "seven steps and a checkpoint", launch)
    victim = trainer_of(ranks_of(launch)[rank])
    if moment == "saving":
        wait_until(lambda: any(not (path / COMMIT).exists() for path in folder.glob("step-*")), "a save", launch)
    victim.kill()
    output = finish(launch)
    assert launch.returncode == 1
    assert re.search(rf"verdict: rank {rank} on .* was killed by SIGKILL", output)
    newest = committed(run_dir / "checkpoints")[-1].name
    assert f"the newest committed checkpoint is {newest}" in output
    again = tptrain("launch", *lines)
    assert again.returncode == 0, again.stdout
    assert f"resuming from {newest}" in again.stdout
    assert losses(run_dir) == losses(finished / "run")


@pytest.mark.parametrize("moment", ["training", "start-up"])
def test_ranks_whose_controller_is_killed_stop_as_on_a_sigterm(finished: Path, moment: str) -> None:
    run_dir = finished / f"orphans-{moment}"
    lines = launch_lines(finished, "train.steps=5000", "checkpoint.every=1000", name=run_dir.name)
    launch = start_launch(*lines)
    if moment == "training":
        wait_until(lambda: rows_in(run_dir) >= 3, "three steps", launch)
    else:
        wait_until(lambda: len(ranks_of(launch)) == 2, "two ranks", launch)
    (controller,) = psutil.Process(launch.pid).children()
    ranks = controller.children(recursive=True)
    controller.send_signal(signal.SIGKILL if moment == "training" else signal.SIGUSR2)
    output = finish(launch)
    assert launch.returncode == 1, output
    assert f"error: the process that started the ranks (pid {controller.pid}) was killed" in output
    assert not psutil.wait_procs(ranks, timeout=5)[1], "ranks are left"
    if moment == "training":
        newest = committed(run_dir / "checkpoints")[-1].name
        assert f"the newest committed checkpoint is {newest}" in output
        assert step_of(run_dir / "checkpoints" / newest) == len(losses(run_dir))
    else:
        assert "before the first step: nothing was trained" in output


@pytest.mark.parametrize("moment", ["training", "start-up"])
def test_a_sigterm_to_the_controller_reaches_the_ranks(finished: Path, moment: str) -> None:
    run_dir = finished / f"passed-on-{moment}"
    launch = start_launch(*launch_lines(finished, "train.steps=5000", name=run_dir.name))
    if moment == "training":
        wait_until(lambda: rows_in(run_dir) >= 3, "three steps", launch)
    else:
        wait_until(lambda: sum(defers_sigterm(each.pid) for each in ranks_of(launch)) == 2, "two ranks", launch)
    (controller,) = psutil.Process(launch.pid).children()
    controller.terminate()
    output = finish(launch)
    assert launch.returncode == (0 if moment == "training" else 1), output
    assert ("saved; launch again" if moment == "training" else "before the first step: nothing was trained") in output
    assert "killed" not in output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_supervisor_killed_in_start_up_is_named(finished: Path, rank: int) -> None:
    run_dir = finished / f"start-up-{rank}"
    launch = start_launch(*launch_lines(finished, "train.steps=5000", name=run_dir.name))

    def connected() -> bool:
        """Supervisors to that of rank 0, and trainers, which import torch before, to the store."""
        ranks = ranks_of(launch)
        both = [process for each in ranks if each.children() for process in (each, trainer_of(each))]
        ends = [psutil.Process(each.pid).net_connections("tcp") for each in both]
        return len(ends) == 4 and all(any(end.status == "ESTABLISHED" for end in each) for each in ends)

    wait_until(connected, "connections", launch)
    ranks_of(launch)[rank].kill()
    output = finish(launch)
    assert launch.returncode == 1
    assert re.search(rf"(verdict|error): rank {rank} on \S+ does not answer: its processes are gone", output), output
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


@pytest.mark.parametrize("harm", ["truncated", "bit-flipped", "no marker"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(finished: Path, harm: str) -> None:
    run_dir = finished / f"damaged-{harm.replace(' ', '-')}"
    shutil.copytree(finished / "run", run_dir)
    newest = run_dir / "checkpoints" / "step-00000020"
    file = newest / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    if harm == "truncated":
        file.write_bytes(content[:-1])
    elif harm == "bit-flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        (newest / COMMIT).unlink()
    again = tptrain("launch", *launch_lines(finished, "train.steps=21", "wandb.mode=disabled", name=run_dir.name))
    assert again.returncode == 0, again.stdout
    assert "step-00000020" in again.stdout
    if harm != "no marker":
        assert "__1_0.distcp" in again.stdout
    assert "resuming from step-00000015" in again.stdout
    assert len(losses(run_dir)) == 21


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_stops_with_a_message_and_harms_nothing(finished: Path) -> None:
    """Something else fills it up once the run has begun: before, the run would be refused."""
    one = sum(file.stat().st_size for file in (finished / "run/checkpoints/step-00000020").iterdir())
    disk, filler = finished / "disk", finished / "disk" / "filler"
    longer = "checkpoint.keep=99", "train.steps=100"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        lines = [*launch_lines(finished, *longer), f"run.dir={disk}/run"]
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
        undisturbed = tptrain("launch", *launch_lines(finished, *longer, "checkpoint.every=0", name="no-disk"))
        assert undisturbed.returncode == 0, undisturbed.stdout
        assert losses(disk / "run") == losses(finished / "no-disk")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_silent_wandb_server_does_not_stop_training(finished: Path) -> None:
    """A server that takes connections and never answers: the run is logged offline instead."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        server = f"http://127.0.0.1:{silent.getsockname()[1]}"
        lines = launch_lines(finished, "wandb.mode=auto", name="wandb-silent")
        done = tptrain("launch", *lines, WANDB_API_KEY="5ec2e7" * 7, WANDB_BASE_URL=server)
    assert done.returncode == 0, done.stdout
    assert "wandb is out of reach" in done.stdout
    assert set(wandb_rows(finished / "wandb-silent")) == set(range(1, 21))


def test_a_resumed_run_goes_on_in_the_same_wandb_run(finished: Path) -> None:
    folder = finished / "wandb-resumed"
    for steps in (10, 20):
        lines = launch_lines(finished, "wandb.mode=offline", f"train.steps={steps}", "optim=constant", name=folder.name)
        assert tptrain("launch", *lines).returncode == 0
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "both attempts carry one run id"
    assert set(wandb_rows(folder)) == set(range(1, 21))


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(finished: Path) -> None:
    done = tptrain("launch", *launch_lines(finished, "optim=constant", "optim.lr=1e30", name="diverged"))
    assert done.returncode == 1
    assert "gradient norm nan" in done.stdout
    assert "Traceback" not in done.stdout
    assert committed(finished / "diverged" / "checkpoints") == []


def test_set_up_lines_and_variables_reach_local_ranks(finished: Path) -> None:
    setup = "cluster.setup=['export NUMBER=7', 'echo greeting $GREETING $NUMBER']"
    lines = launch_lines(finished, "train.steps=1", "cluster.env.GREETING='two words'", setup, name="setup")
    done = tptrain("launch", *lines)
    assert done.returncode == 0, done.stdout
    assert "greeting two words 7" in done.stdout
    broken = tptrain("launch", *lines, "cluster.setup=['false']", "train.steps=2")
    assert broken.returncode == 1
    assert "rank 0 was killed or crashed" in broken.stdout


def test_a_second_launch_into_a_run_that_goes_on_is_refused(finished: Path) -> None:
    lines = launch_lines(finished, "train.steps=100000", "checkpoint.every=0", name="twice")
    launch = start_launch(*lines)
    wait_until(lambda: rows_in(finished / "twice") >= 1, "a step", launch)
    before = (finished / "twice" / "config.yaml").read_text()
    refused = tptrain("launch", *lines, "logging.every=2")
    assert refused.returncode == 2
    assert "is running. Wait for it, or stop it first" in refused.stdout
    assert (finished / "twice" / "config.yaml").read_text() == before
    os.killpg(launch.pid, signal.SIGINT)
    assert "stopped at step" in finish(launch)


def test_a_run_whose_data_changed_behind_its_name_is_not_resumed(finished: Path, tmp_path: Path) -> None:
    lines = [*launch_lines(tmp_path, "optim=constant"), "train.steps=2"]
    assert tptrain("launch", *lines).returncode == 0
    corpus = tmp_path / "corpus.jsonl"
    os.utime(corpus)  # touched, but the same: packed again, and the run goes on
    again = tptrain("launch", *lines, "train.steps=3")
    assert "resuming from step-00000002" in again.stdout
    with corpus.open("a") as file:
        file.write('{"text": "one more document"}\n')
    changed = tptrain("launch", *lines, "train.steps=4")
    assert changed.returncode == 2, changed.stdout
    assert "its data has changed" in changed.stdout
