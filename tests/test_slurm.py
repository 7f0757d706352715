"""`cluster=slurm` on a real Slurm of two nodes: the same losses, the right end in the accounting, a dead rank."""

import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.commands import TPTRAIN, losses, run, tptrain, wait_until
from tests.corpus import overrides
from tptrain.checkpoint import committed

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]

JOB = ["cluster=slurm", "cluster.nodes=2", "cluster.tasks_per_node=2", "parallel.tp=2", "checkpoint.every=5"]


def submit(*lines: str) -> str:
    """The id of the job that `launch` submitted."""
    done = tptrain("launch", *lines)
    assert done.returncode == 0, done.stdout
    return done.stdout.split("submitted Slurm job ")[1].split(",")[0]


def state(job: str) -> str:
    shown = subprocess.run(
        ["sacct", "-X", "-n", "-P", "-o", "State", "-j", job], capture_output=True, text=True, check=True
    )
    return shown.stdout.strip()


def wait_for_end(job: str) -> str:
    ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY")
    wait_until(lambda: (time.sleep(0.3), state(job).startswith(ended))[1], f"the end of job {job}")
    return state(job)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


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
    job = submit(
        *overrides(folder, "options"),
        *JOB[:1],
        "parallel.tp=1",
        "train.steps=2",
        "cluster.gpus_per_node=2",
        "cluster.tasks_per_node=1",
        "cluster.partition=high",
        "cluster.env.GREETING='two words'",
        "cluster.setup=['echo set-up says $GREETING on $(hostname)']",
        "cluster.sbatch.nodelist=n2",
        "cluster.sbatch.comment=hello",
    )
    assert wait_for_end(job) == "COMPLETED"
    log = (folder / "options" / "logs" / f"{job}_0_log.out").read_text()
    assert "set-up says two words on" in log
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    for word in ("Partition=high", "NodeList=n2", "TresPerNode=gres:gpu:2", "Comment=hello"):
        assert word in shown


def test_a_refused_resume_leaves_the_run_as_it_was(folder: Path) -> None:
    snapshot = folder / "options" / "config.yaml"
    before = snapshot.read_text()
    lines = [
        *overrides(folder, "options"),
        *JOB[:1],
        "parallel.tp=1",
        "train.steps=99",
        "cluster.sbatch.no_such_option=1",
    ]
    refused = tptrain("launch", *lines)
    assert refused.returncode == 2
    assert "Slurm refuses" in refused.stdout
    assert snapshot.read_text() == before


def test_a_failing_set_up_line_ends_the_job(folder: Path) -> None:
    lines = [*overrides(folder, "no-module"), *JOB[:1], "cluster.setup=['module load nothing']"]
    assert wait_for_end(submit(*lines)) == "FAILED"
    assert not (folder / "no-module" / "metrics.jsonl").exists()


def test_a_dead_rank_ends_the_job_and_a_second_launch_goes_on(folder: Path) -> None:
    lines = [*overrides(folder, "dead"), *JOB]
    run_dir = folder / "dead"
    job = submit(*lines)
    refused = tptrain("launch", *lines)
    assert refused.returncode == 2
    assert f"job {job} is" in refused.stdout
    wait_until(lambda: len(losses(run_dir)) >= 7, "seven steps")
    ranks = [p for p in psutil.process_iter(["cmdline"]) if f"{run_dir}/logs" in (p.info["cmdline"] or [])]
    victim = next(p for p in ranks if p.name().startswith("python") and p.environ().get("SLURM_PROCID") == "3")
    victim.send_signal(signal.SIGKILL)
    assert wait_for_end(job) == "FAILED"
    wait_until(lambda: not any(p.is_running() for p in ranks), "the end of every rank")
    assert wait_for_end(submit(*lines)) == "COMPLETED"
    assert losses(run_dir) == losses(folder / "slurm")


def test_scancel_signals_leave_a_checkpoint(folder: Path) -> None:
    """SIGUSR2 is what submitit asks Slurm to send before the time limit."""
    run_dir = folder / "signalled"
    job = submit(*overrides(folder, "signalled"), *JOB, "train.steps=5000", "checkpoint.every=0")
    wait_until(lambda: len(losses(run_dir)) >= 3, "three steps")
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    assert wait_for_end(job) == "COMPLETED"
    (saved,) = committed(run_dir / "checkpoints")
    assert saved.name == f"step-{len(losses(run_dir)):08d}"


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
