"""The long exercises on a real Slurm: `scripts/test -m drill`. Minutes each, so not part of the suite."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.commands import TPTRAIN, environment, losses, wait_until
from tests.corpus import overrides
from tests.test_slurm import JOB, ask, events, in_queue, processes_of, submit, trainer, wait_for_end
from tptrain.records.rows import read_rows

pytestmark = [pytest.mark.drill, pytest.mark.slurm, pytest.mark.usefixtures("slurm"), pytest.mark.timeout(900)]

STEPS = 1000
FEW_STEPS = 400
HOUR = [*JOB, f"train.steps={STEPS}", "train.seq_len=256", "train.micro_batch_size=1", "checkpoint.every=40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drill")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[float]:
    assert wait_for_end(submit(*overrides(folder, "undisturbed"), *HOUR), 600) == "COMPLETED"
    return losses(folder / "undisturbed")


@pytest.fixture
def all_nodes() -> None:
    """Start the slurmd's that a drill killed."""
    for node in ("n1", "n2", "n3", "n4"):
        if subprocess.run(["pgrep", "-f", f"slurmd -N {node}"], capture_output=True, check=False).returncode:
            subprocess.run(["slurmd", "-N", node], check=True)

    def all_up() -> bool:
        time.sleep(1)
        return set(ask("sinfo", "-h", "-N", "-p", "low", "-o", "%t").split()) <= {"idle", "mix", "alloc"}

    wait_until(all_up, "four nodes")


def assert_whole(run_dir: Path, undisturbed: list[float]) -> None:
    assert losses(run_dir) == undisturbed
    assert not processes_of(run_dir)


@pytest.mark.usefixtures("all_nodes")
def test_the_time_limit_three_times_over(folder: Path, undisturbed: list[float]) -> None:
    """One minute, the shortest limit that Slurm has, over and over."""
    limit = [
        "cluster.time=1",
        "cluster.grace_s=30",
        "cluster.nodes=1",
        "cluster.tasks_per_node=4",
        "checkpoint.every=0",
    ]
    job = submit(*overrides(folder, "limited"), *HOUR, *limit)
    assert wait_for_end(job, 800) == "COMPLETED"
    ends = events(folder / "limited", "end")
    assert sum("time limit" in end["message"] for end in ends) >= 3
    assert ends[-1]["kind"] == "done"
    assert_whole(folder / "limited", undisturbed)


@pytest.mark.usefixtures("all_nodes")
@pytest.mark.parametrize("node", ["n1", "n2"])
@pytest.mark.parametrize("what", ["slurmd", "everything"])
def test_a_node_that_dies(folder: Path, undisturbed: list[float], node: str, what: str) -> None:
    """n1 runs the job script and rank 0. `slurmd` alone leaves its ranks running; `everything` is a power failure."""
    run_dir = folder / f"{what}-{node}"
    job = submit(*overrides(folder, run_dir.name), *HOUR)
    wait_until(lambda: len(read_rows(run_dir / "metrics.jsonl")) >= 50, "50 steps")
    subprocess.run(["pkill", "-9", "-f", f"slurmd -N {node}"], check=True)
    if what == "everything":
        first = 0 if node == "n1" else 2
        for process in [trainer(run_dir, first), trainer(run_dir, first + 1)]:
            process.parent().send_signal(signal.SIGKILL)  # type: ignore[union-attr]
        subprocess.run(["pkill", "-9", "-f", f"slurmstepd.*{node}"], check=False)
    wait_until(lambda: not in_queue(job) or len(events(run_dir, "start")) > 1, "the next attempt", timeout_s=400)
    assert wait_for_end(job, 400) == "COMPLETED"
    assert node not in events(run_dir, "start")[-1]["nodes"]
    assert_whole(run_dir, undisturbed)


@pytest.mark.usefixtures("all_nodes")
def test_the_next_attempt_may_have_another_world(folder: Path) -> None:
    """Two ranks take up, from its snapshot, a run that four began; then four again. The losses stay.

    Rounding differs, so the run ends before the model learns its few sequences by heart, in which differences grow.
    """
    run_dir = folder / "smaller"
    lines = [*HOUR, f"train.steps={FEW_STEPS}"]
    assert wait_for_end(submit(*overrides(folder, "as-large"), *lines), 600) == "COMPLETED"
    job = submit(*overrides(folder, "smaller"), *lines)
    wait_until(lambda: len(read_rows(run_dir / "metrics.jsonl")) >= 50, "50 steps")
    ask("scancel", "--signal=USR2", job)
    wait_until(lambda: ask("squeue", "-h", "-j", job, "-o", "%T") == "PENDING", "the queue")
    ask("scancel", job)
    small = subprocess.Popen(["srun", "-N1", "-n2", *TPTRAIN, "train", f"run.dir={run_dir}"], env=environment())
    wait_until(lambda: len(read_rows(run_dir / "metrics.jsonl")) >= 120, "120 steps")
    small.send_signal(signal.SIGTERM)  # on which srun kills its tasks: the checkpoint before counts
    small.wait(60)
    assert wait_for_end(submit(*overrides(folder, "smaller"), *lines), 400) == "COMPLETED"
    assert [event["dp"] for event in events(run_dir, "start")] == [2, 1, 2]
    after = losses(run_dir)
    assert len(after) == FEW_STEPS
    assert max(abs(a - b) for a, b in zip(after, losses(folder / "as-large"), strict=True)) < 2e-4
