"""`cluster=slurm` on a real Slurm of four nodes: the same losses as here, and what a disturbed run comes to."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.commands import TIMEOUT_S, TPTRAIN, losses, rows_in, run, tptrain, wait_until
from tests.corpus import overrides
from tests.test_slurm_client import HOSTLISTS
from tests.wandb_files import wandb_rows
from tptrain.records.run_dir import committed, newest_checkpoint

# The time-out holds for the fixtures too, one of which is a job with five disturbances.
pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm"), pytest.mark.timeout(600)]

JOB = ["cluster=slurm", "cluster.nodes=2", "cluster.tasks_per_node=2", "parallel.tp=2", "checkpoint.every=5"]
STEPS = 120
LONG = [*JOB, f"train.steps={STEPS}", "train.seq_len=64", "optim=constant", "wandb.mode=offline", "watchdog.step_s=6"]


def submit(*lines: str) -> str:
    """The id of the job that `launch` submitted."""
    done = tptrain("launch", *lines)
    assert done.returncode == 0, done.stdout
    return done.stdout.split("submitted Slurm job ")[1].split(",")[0]


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def state(job: str) -> str:
    return ask("sacct", "-X", "-n", "-P", "-o", "State", "-j", job)


def wait_for_end(job: str, timeout_s: float = TIMEOUT_S) -> str:
    """The job's last state."""
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY")

    wait_until(lambda: not in_queue(job) and state(job).startswith(ended), f"the end of job {job}", timeout_s=timeout_s)
    return state(job)


_waiting_since: dict[str, float] = {}


def in_queue(job: str) -> bool:
    """Whether the job waits or runs. Slurm holds a requeued job back for two minutes: here, for three seconds.

    Not less: Slurm revokes a job's credential when it ends, and a start in the same second would be killed by it.
    """
    time.sleep(0.3)
    shown = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T %r"], capture_output=True, text=True, check=False)
    waits = shown.stdout.strip() == "PENDING BeginTime"
    since = _waiting_since.setdefault(job, time.monotonic()) if waits else _waiting_since.pop(job, 0)
    if waits and time.monotonic() - since > 3:
        ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    return bool(shown.stdout.strip()) or (shown.returncode != 0 and "Invalid job id" not in shown.stderr)


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "logs" / "attempts.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def processes_of(run_dir: Path) -> list[psutil.Process]:
    supervisors = []
    for process in psutil.process_iter():
        try:
            if f"{run_dir}/logs" in process.cmdline() and process.name().startswith("python"):
                supervisors.append(process)
        except psutil.Error:
            continue
    return supervisors


def trainer(run_dir: Path, rank: int) -> psutil.Process:
    """The process that trains, not the supervisor above it."""
    of_rank = [p for p in processes_of(run_dir) if p.environ().get("SLURM_PROCID") == str(rank)]
    return next(process for process in of_rank if process.parent() in of_rank)


@pytest.fixture(autouse=True)
def _nodes_are_idle() -> None:
    """A node that the last test's job is leaving would move this one's ranks to others than it names."""
    wait_until(lambda: set(ask("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split()) == {"idle"}, "idle nodes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[float]:
    """Losses of the long run that nothing disturbs."""
    assert wait_for_end(submit(*overrides(folder, "undisturbed"), *LONG)) == "COMPLETED"
    supervisors = losses(folder / "undisturbed")
    assert len(supervisors) == STEPS
    return supervisors


def start_long(folder: Path, name: str, *changes: str, steps: int = 12) -> tuple[str, Path]:
    """A long run that has come some way; its job and directory."""
    run_dir = folder / name
    job = submit(*overrides(folder, name), *LONG, *changes)
    wait_until(lambda: len(losses(run_dir)) >= steps, f"{steps} steps")
    return job, run_dir


def assert_as_if_nothing_happened(run_dir: Path, undisturbed: list[float]) -> None:
    assert losses(run_dir) == undisturbed
    logged = wandb_rows(run_dir)
    assert sorted(logged) == list(range(1, STEPS + 1))
    assert len({file.name for file in run_dir.glob("wandb/offline-run-*/*.wandb")}) == 1, "one wandb run"
    assert not processes_of(run_dir)


# ------------------------------------------------------------------------------------------------------------- running


def test_same_losses_as_on_this_machine(folder: Path) -> None:
    job = submit(*overrides(folder, "slurm"), *JOB, "cluster.cpus_per_task=1", "cluster.time=10", "cluster.mem=1G")
    assert wait_for_end(job) == "COMPLETED"
    local = tptrain(
        "launch", *overrides(folder, "local"), "parallel.tp=2", "cluster.tasks_per_node=4", "checkpoint.every=5"
    )
    assert local.returncode == 0, local.stdout
    assert len(losses(folder / "slurm")) == 20
    assert losses(folder / "slurm") == losses(folder / "local")
    names = [path.name for path in committed(folder / "slurm" / "checkpoints")]
    assert names == ["step-00000015", "step-00000020"]


def test_options_set_up_lines_and_variables_reach_the_job(folder: Path) -> None:
    lines = [
        *overrides(folder, "options"),
        *JOB[:1],
        "parallel.tp=1",
        "train.steps=2",
        "optim.warmup_steps=0",  # else a warning precedes the script
        "cluster.gpus_per_node=2",
        "cluster.tasks_per_node=1",
        "cluster.partition=high",
        "cluster.grace_s=77",
        "cluster.env.GREETING='two words'",
        "cluster.setup=['echo set-up says $GREETING on $(hostname)','srun -n1 true']",  # a step before the ranks'
        "cluster.sbatch.nodelist=n2",
        "cluster.sbatch.comment=hello",
    ]
    dry = tptrain("launch", *lines, "cluster.dry_run=true")
    assert dry.returncode == 0
    assert not (folder / "options").exists()
    job = submit(*lines)
    assert (folder / "options" / "logs" / f"{job}_submission.sh").read_text().strip() == dry.stdout.strip()
    assert "--signal=USR2@77" in dry.stdout
    assert wait_for_end(job) == "COMPLETED"
    log = (folder / "options" / "logs" / f"{job}_0_log.out").read_text()
    assert "set-up says two words on" in log
    shown = ask("scontrol", "show", "job", job)
    # A node here has 8 cores, 20,000 MB and 8 GPUs: of these the job asks for two.
    words = "Partition=high", "NodeList=n2", "TresPerNode=gres:gpu:2", "Comment=hello", "Requeue=1", "CPUs/Task=4"
    for word in (*words, "MinMemoryNode=5000M"):
        assert word in shown
    (end,) = events(folder / "options", "end")
    assert (end["attempt"], end["kind"]) == (f"{job}.1-0", "done")


def test_a_refused_resume_leaves_the_run_as_it_was(folder: Path) -> None:
    snapshot = folder / "options" / "config.yaml"
    before = snapshot.read_text()
    lines = [
        *overrides(folder, "options"),
        *JOB[:1],
        "parallel.tp=1",
        "train.steps=99",
        "optim.warmup_steps=0",
        "cluster.sbatch.no_such_option=1",
    ]
    refused = tptrain("launch", *lines)
    assert refused.returncode == 2
    assert "Slurm refuses" in refused.stdout
    assert snapshot.read_text() == before


@pytest.mark.parametrize("names", HOSTLISTS)
def test_lists_of_nodes_are_read_as_slurm_reads_them(names: str) -> None:
    assert ask("scontrol", "show", "hostnames", names).split() == HOSTLISTS[names]


def test_a_failing_set_up_line_ends_the_job(folder: Path) -> None:
    lines = [*overrides(folder, "no-module"), *JOB[:1], "cluster.setup=['module load nothing']"]
    assert wait_for_end(submit(*lines)) == "FAILED"
    assert not (folder / "no-module" / "metrics.jsonl").exists()


def test_train_under_a_bare_srun(folder: Path) -> None:
    lines = [*overrides(folder, "srun"), "parallel.tp=2", "checkpoint.every=5"]
    done = run("srun", "--nodes=2", "--ntasks-per-node=2", *TPTRAIN, "train", *lines)
    assert done.returncode == 0, done.stdout
    assert losses(folder / "srun") == losses(folder / "slurm")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("cluster.partition=gpus", ["cluster.partition=gpus", "high, low"]),
        ("cluster.nodes=9", ["Slurm refuses"]),
        ("cluster.sbatch.no_such_option=1", ["Slurm refuses", "no-such-option"]),
    ],
)
def test_what_slurm_would_refuse_is_a_users_error(folder: Path, change: str, words: list[str]) -> None:
    refused = tptrain("launch", *overrides(folder, "refused"), *JOB, "train.global_batch_size=72", change)
    assert refused.returncode == 2, refused.stdout
    assert refused.stdout.count("\n") == 1
    for word in words:
        assert word in refused.stdout
    assert not (folder / "refused").exists()


# ------------------------------------------------------------------------------------------------------------ disturbed


@dataclass(frozen=True)
class Disturbed:
    run_dir: Path
    refused: subprocess.CompletedProcess[str]  # another launch into the run, while its job waits or runs
    job: str
    starts: list[dict]
    ends: dict[str, dict]  # by what was done to the run; one more start follows each


@pytest.fixture(scope="module")
def disturbed(folder: Path) -> Disturbed:
    """A long run that is disturbed in each way in turn, each time after it has gone on to a new checkpoint."""
    run_dir, lines = folder / "disturbed", [*overrides(folder, "disturbed"), *LONG, "cluster.max_restarts=1"]
    job = submit(*lines)
    refused = tptrain("launch", *lines)
    wait_until(lambda: rows_in(run_dir) >= 5, "five steps")
    # The time limit's signal is what Slurm is asked to send before the limit. The real limit is in test_drill.py.
    signal_of_the_limit = partial(ask, "scancel", "--signal=USR2", job)
    others: list[str] = []

    def preempt() -> None:
        command = "sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"
        others.append(ask(*command))

    disturbances: dict[str, Callable[[], object]] = {
        "limit": signal_of_the_limit,
        "limit again": signal_of_the_limit,
        "preempted": preempt,
        "killed": lambda: trainer(run_dir, 3).send_signal(signal.SIGKILL),
        "stopped": lambda: trainer(run_dir, 1).send_signal(signal.SIGSTOP),
    }
    for count, disturb in enumerate(disturbances.values(), start=1):
        disturb()
        wait_until(lambda n=count: in_queue(job) and len(events(run_dir, "end")) == n, f"end {count}")
        saved = events(run_dir, "end")[-1]["checkpoint"]
        if count < len(disturbances):
            wait_until(lambda name=saved: in_queue(job) and newest_checkpoint(run_dir) > name, "a new checkpoint")
    assert wait_for_end(job) == "COMPLETED"
    assert [wait_for_end(other) for other in others] == ["COMPLETED"]
    ends = events(run_dir, "end")
    assert len(ends) == len(disturbances) + 1
    return Disturbed(
        run_dir, refused, job, events(run_dir, "start"), dict(zip([*disturbances, "undisturbed"], ends, strict=True))
    )


def test_a_run_killed_stopped_preempted_and_at_its_limit_is_as_if_undisturbed(
    disturbed: Disturbed, undisturbed: list[float]
) -> None:
    assert disturbed.ends["undisturbed"]["kind"] == "done"
    assert_as_if_nothing_happened(disturbed.run_dir, undisturbed)


def test_a_killed_rank_is_named_and_its_node_left_out(disturbed: Disturbed) -> None:
    end, nodes, next_nodes = disturbed.ends["killed"], disturbed.starts[3]["nodes"], disturbed.starts[4]["nodes"]
    assert f"rank 3 on {nodes[3]} was killed by SIGKILL" in end["message"]
    assert (end["requeued"], end["excluded"]) == (True, nodes[3])
    assert nodes[3] not in next_nodes


def test_a_stopped_rank_is_noticed_and_named(disturbed: Disturbed) -> None:
    end, nodes, next_nodes = disturbed.ends["stopped"], disturbed.starts[4]["nodes"], disturbed.starts[5]["nodes"]
    assert f"rank 1 on {nodes[1]} was stopped (SIGSTOP)" in end["message"]
    assert nodes[1] not in next_nodes


def test_preempted_by_a_higher_partition(disturbed: Disturbed) -> None:
    end = disturbed.ends["preempted"]
    assert (end["kind"], end["message"], end["requeued"]) == ("stopped", "preempted", True)
    assert end["checkpoint"] == f"step-{end['step']:08d}"


def test_the_time_limits_signal_requeues(disturbed: Disturbed) -> None:
    """More often than cluster.max_restarts allows of failures."""
    for name in ("limit", "limit again"):
        end = disturbed.ends[name]
        assert end["kind"] == "stopped"
        assert "time limit" in end["message"]
        assert end["checkpoint"] == f"step-{end['step']:08d}"


def test_a_second_launch_into_a_run_whose_job_runs_is_refused(disturbed: Disturbed) -> None:
    assert disturbed.refused.returncode == 2
    assert f"job {disturbed.job} is" in disturbed.refused.stdout


def test_cancel_leaves_a_checkpoint_and_no_process(folder: Path) -> None:
    job, run_dir = start_long(folder, "cancelled", "train.steps=5000", "checkpoint.every=0")
    done = tptrain("cancel", str(run_dir))
    assert done.returncode == 0, done.stdout
    (saved,) = committed(run_dir / "checkpoints")
    assert saved.name in done.stdout
    assert saved.name == f"step-{len(losses(run_dir)):08d}"
    assert not processes_of(run_dir)
    assert not in_queue(job)
    (end,) = events(run_dir, "end")
    assert (end["kind"], end["requeued"]) == ("cancelled", False)
    again = tptrain("cancel", str(run_dir))
    assert again.returncode == 2
    assert "nothing to cancel" in again.stdout
    assert "cancelled" in tptrain("status", str(run_dir)).stdout
    assert f"stopped at step {int(saved.name[5:])} (interrupted)" in tptrain("logs", str(run_dir)).stdout


def test_status_without_accounting(folder: Path, tmp_path: Path) -> None:
    """A cluster that has no sacct; and one that does not answer at all, of which nothing must be claimed."""
    for command in ("squeue", "scontrol"):
        (tmp_path / command).symlink_to(shutil.which(command) or "")
    table = tptrain("status", str(folder / "slurm"), str(folder / "cancelled"), PATH=str(tmp_path)).stdout
    assert "completed" in table
    assert "cancelled" in table
    assert "20/20" in table
    (tmp_path / "squeue").unlink()
    (tmp_path / "scontrol").unlink()
    silent = tptrain("status", str(folder / "slurm"), PATH=str(tmp_path))
    assert "Slurm does not answer" in silent.stdout


def test_a_loss_that_is_no_number_is_not_tried_again(folder: Path) -> None:
    job = submit(*overrides(folder, "diverged"), *JOB, "optim=constant", "optim.lr=1e30")
    assert wait_for_end(job) == "FAILED"
    (end,) = events(folder / "diverged", "end")
    assert (end["kind"], end["requeued"]) == ("diverged", False)


def test_a_sweep_of_four_is_one_job_array(folder: Path) -> None:
    lines = [line for line in overrides(folder, "sweep") if not line.startswith("train.steps")]
    sweep = ["-m", "optim.lr=1e-3,2e-3", "train.seed=1,2", "train.steps=8", "wandb.mode=offline"]
    done = tptrain("launch", *lines, "cluster=slurm", "cluster.tasks_per_node=2", "parallel.tp=2", *sweep)
    assert done.returncode == 0, done.stdout
    array = done.stdout.split("job array ")[1].split(" ")[0]
    assert "of 4 runs" in done.stdout
    wait_until(lambda: (time.sleep(0.3), state(array).split() == ["COMPLETED"] * 4)[1], "four ends")
    assert sorted(ask("sacct", "-X", "-n", "-P", "-o", "JobID", "-j", array).split()) == [
        f"{array}_{index}" for index in range(4)
    ]
    runs = [folder / "sweep" / str(index) for index in range(4)]
    assert len({tuple(losses(run_dir)) for run_dir in runs}) == 4
    for index, run_dir in enumerate(runs):
        config = (run_dir / "config.yaml").read_text()
        assert "group: sweep" in config
        assert f"name: sweep-{index}" in config
        assert len(wandb_rows(run_dir)) == 8
    table = tptrain("status", *map(str, runs)).stdout
    assert table.count("completed") == 4
    assert f"{array}_3" in table


# ------------------------------------------------------------------------------------------------------------ preflight


FAULTS = {
    "a world of one": (["env", "RANK=0", "WORLD_SIZE=1"], "", [], "Slurm says that this is rank 0 of 2"),
    "ranks missing": (
        [],
        "[ $SLURM_PROCID = 1 ] && sleep 60",
        ["watchdog.rendezvous_s=3"],
        "rank 1 of 2 did not come in 3 s",
    ),
    "rank 0 missing": (
        [],
        "[ $SLURM_PROCID = 0 ] && sleep 60",
        ["watchdog.rendezvous_s=3"],
        "rank 1 on n1 cannot reach rank 0 at n1:",
    ),
    "mixed versions": ([], "[ $SLURM_PROCID = 1 ] && export PYTHONPATH=OTHER", [], "mixed versions of torch: "),
    "a folder that is not shared": (
        [],
        "cd OTHER/$SLURM_PROCID",
        ["run.dir=/proc/self/cwd/run"],
        "rank 1 on n1 does not see what rank 0 on n1 wrote there",
    ),
    "a full disk": (
        [],
        "",
        ["model.num_hidden_layers=100000", "model.hidden_size=4096", "model.intermediate_size=16384"],
        "one checkpoint of tiny takes",
    ),
    "a TP group over nodes": (["-N2"], "", [], "the TP group of ranks 0 to 1 spans the nodes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_preflight_finds_each_fault_in_one_message(folder: Path, tmp_path: Path, fault: str) -> None:
    before, shell, changes, words = FAULTS[fault]
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
    # What one rank imports at its start: another torch, as far as its version tells.
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.__version__ = '2.0.1'\n")
    lines = [*overrides(folder, "faulty"), "parallel.tp=2", *changes]
    command = " ".join(f"'{word}'" for word in [*TPTRAIN, "train", *lines])
    nodes = ["-N2", "--ntasks-per-node=1"] if before == ["-N2"] else ["-N1"]
    prefix = [] if before == ["-N2"] else before
    script = f"{shell.replace('OTHER', str(tmp_path))}\nexec {command}"
    done = run(*prefix, "srun", "-K1", *nodes, "-n2", "bash", "-c", script)
    assert done.returncode != 0
    errors = [
        line for line in done.stdout.splitlines() if "error: " in line and not line.startswith(("srun", "slurmst"))
    ]
    assert len(errors) == 1, done.stdout
    assert words in errors[0]
    assert not (folder / "faulty").exists()
