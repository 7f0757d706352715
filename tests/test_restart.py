"""Whether a job goes back into the queue: the decision, and what it reads out of a run directory."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from launch import restart
from launch.restart import attempt_name, decide, how_it_ended
from tests.test_verdict import KILLED, STEP, report
from tptrain.config import Config
from tptrain.watch import files
from tptrain.watch.outcome import Outcome
from tptrain.watch.verdict import Absence, judge

ATTEMPT = "7.0-0"
FAILURES = ("bug", "device", "died", "gone", "hang", "mismatch", "infra")
RETRIED = (*FAILURES, "stopped", "timeout")


def ended(kind: str = "died", checkpoint: str | None = None, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "step": 4, "checkpoint": checkpoint, "message": f"made-up {kind}", "node": "n3"} | more


def config(max_restarts: int = 3) -> Config:
    settings = Config()
    settings.cluster.max_restarts = max_restarts
    return settings


# ------------------------------------------------------------------------------------------------------------- decide


@pytest.mark.parametrize("kind", RETRIED)
@pytest.mark.parametrize("state", ["RUNNING", ""])  # empty: Slurm does not answer
def test_failures_preemption_and_the_time_limit_are_tried_again(kind: str, state: str) -> None:
    decision = decide(config(), [], ended(kind), state)
    assert decision.requeue
    assert decision.why == f"made-up {kind}"


@pytest.mark.parametrize("kind", ["done", "user", "diverged", "disk", "cancelled"])
def test_an_end_that_another_try_would_not_change(kind: str) -> None:
    decision = decide(config(), [], ended(kind), "RUNNING")
    assert not decision.requeue
    assert decision.why
    assert decision.exclude is None


@pytest.mark.parametrize("kind", RETRIED)
@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "FAILED", "PREEMPTED"])
def test_a_job_that_slurm_ends_itself_is_left_to_it(kind: str, state: str) -> None:
    """But for a time limit that was reached: the job completes, and is to go on."""
    assert decide(config(), [], ended(kind), state).requeue == (kind == "timeout" and state == "COMPLETING")


def test_a_time_limit_is_tried_again_in_its_own_state() -> None:
    assert decide(config(), [], ended("timeout"), "TIMEOUT").requeue


@pytest.mark.parametrize("kind", [*RETRIED, "user"])
def test_only_a_machine_to_blame_is_kept_away_from(kind: str) -> None:
    decision = decide(config(), [], ended(kind), "RUNNING")
    assert decision.exclude == ("n3" if kind in ("device", "died", "gone", "hang", "mismatch") else None)
    assert decide(config(), [], ended(kind, node=None), "RUNNING").exclude is None


@pytest.mark.parametrize("checkpoint", [None, "step-00000010"])
@pytest.mark.parametrize("limit", [0, 1, 3])
def test_as_many_restarts_in_a_row_as_allowed(checkpoint: str | None, limit: int) -> None:
    history: list[dict[str, Any]] = []
    while (decision := decide(config(limit), history, ended(checkpoint=checkpoint), "RUNNING")).requeue:
        history.append(ended(checkpoint=checkpoint))
    assert len(history) == limit
    assert f"cluster.max_restarts={limit}" in decision.why


def test_a_new_checkpoint_starts_the_count_again() -> None:
    history: list[dict[str, Any]] = []
    for checkpoint, tries in (("step-00000010", 3), ("step-00000020", 2), ("step-00000030", 4)):
        for _ in range(tries):
            history.append(ended(checkpoint=checkpoint))
    assert not decide(config(3), history, ended(checkpoint="step-00000030"), "RUNNING").requeue
    assert decide(config(3), history, ended(checkpoint="step-00000040"), "RUNNING").requeue


def test_preemptions_that_each_saved_may_be_any_number() -> None:
    history = [ended("stopped", f"step-{step:08}") for step in range(10, 500, 10)]
    assert decide(config(3), history, ended("stopped", "step-00000500"), "RUNNING").requeue


# ----------------------------------------------------------------------------------------------------------- exit codes


def test_exit_codes_of_ranks() -> None:
    """What scripts and the job script see: 0, 2 and 4 are of these outcomes, and 1 is every other's."""
    codes = {outcome.value: outcome.exit_code for outcome in Outcome if outcome.exit_code != 1}
    assert codes == {"done": 0, "stopped": 0, "cancelled": 0, "user": 2, "disk": 4}


# ------------------------------------------------------------------------------------------------------- how it ended


def write(
    run_dir: Path, reports: Iterable[dict[str, Any]] = (), *events: dict[str, Any], attempt: str = ATTEMPT
) -> None:
    folder = run_dir / "logs" / f"attempt-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    for one in reports:
        (folder / f"rank-{one['rank']:05d}.json").write_text(json.dumps(one))
    with (run_dir / "logs" / "attempts.jsonl").open("a") as file:
        for event in events:
            file.write(json.dumps({"attempt": attempt} | event) + "\n")


def save(run_dir: Path, step: int, committed: bool = True) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08}"
    folder.mkdir(parents=True)
    if committed:
        (folder / "commit.json").write_text("{}")


def test_a_good_end_is_told_by_rank_0s_last_word(tmp_path: Path) -> None:
    last = {"event": "last", "kind": "done", "message": "step 20", "step": 20}
    write(tmp_path, [], last | {"attempt": "7.0-1", "step": 10, "kind": "stopped"}, last)
    save(tmp_path, 20)
    save(tmp_path, 30, committed=False)
    got = how_it_ended(tmp_path, ATTEMPT, 0)
    assert (got["kind"], got["step"], got["checkpoint"], got["node"]) == ("done", 20, "step-00000020", None)
    assert (got["event"], got["attempt"]) == ("end", ATTEMPT)
    other = how_it_ended(tmp_path, "7.0-1", 0)
    assert (other["kind"], other["step"]) == ("stopped", 10)
    assert decide(config(), [], other, "RUNNING").requeue


@pytest.mark.parametrize(("code", "kind"), [(0, "done"), (2, "user"), (1, "infra"), (137, "infra")])
def test_without_a_word_the_exit_code_tells(tmp_path: Path, code: int, kind: str) -> None:
    """Nothing of the run directory need be there."""
    got = how_it_ended(tmp_path, ATTEMPT, code)
    assert (got["kind"], got["step"], got["checkpoint"], got["node"]) == (kind, 0, None, None)


@pytest.mark.parametrize("seen", [(), (0,), (0, 1, 3)])
def test_the_supervisors_verdict_counts_whatever_files_are_to_be_seen(tmp_path: Path, seen: tuple[int, ...]) -> None:
    """Those of other nodes may appear a minute late, and a rank without one is not gone for that."""
    reports = {rank: report(rank, STEP + "E" * (rank != 3), "infra" if rank != 2 else "device") for rank in range(4)}
    write(tmp_path, [reports[rank] for rank in seen], {"event": "start", "nodes": ["n0", "n0", "n1", "n1"]})
    files.write(files.folder_of(tmp_path, ATTEMPT), judge(reports, 4, []), 4, stands_in=False)
    got = how_it_ended(tmp_path, ATTEMPT, 1)
    assert (got["kind"], got["node"], got["step"], got["error"]) == ("device", "n1", 1, "made-up device")
    assert decide(config(), [], got, "RUNNING").exclude == "n1"


def test_a_verdict_that_another_node_wrote_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the supervisor of rank 0 was killed, and its stand-in judged: here its files are seen 45 s late."""
    now, reports = [0.0], {rank: report(rank, STEP + "E", "infra") for rank in (1, 2, 3)}
    write(tmp_path, [reports[1]], {"event": "start", "nodes": ["n0", "n0", "n1", "n1"]})
    judged = judge(reports, 4, ["n0", "n0", "n1", "n1"], {0: Absence.ENDED})

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if now[0] == 45:
            files.write(files.folder_of(tmp_path, ATTEMPT), judged, 3, stands_in=True)

    monkeypatch.setattr(restart, "time", Mock(monotonic=lambda: now[0], sleep=sleep, time=time.time))
    got = how_it_ended(tmp_path, ATTEMPT, 1, restart.LATE_S)
    assert (got["kind"], got["node"], now[0]) == ("gone", "n0", 45)
    assert decide(config(), [], got, "RUNNING").exclude == "n0"


@pytest.mark.parametrize(("state", "patience_s"), [("RUNNING", restart.LATE_S), ("COMPLETING", 0), ("", 0)])
def test_a_job_that_slurm_ends_waits_for_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, patience_s: float
) -> None:
    asked = Mock(return_value=ended("user"))
    monkeypatch.setattr(restart, "how_it_ended", asked)
    monkeypatch.setattr(restart, "signal", Mock())
    monkeypatch.setattr(restart, "read_config", lambda path: config())
    monkeypatch.setattr(restart.slurm, "show_job", lambda name: {"JobState": state})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    restart.main(tmp_path, 1)
    assert asked.call_args.args == (tmp_path, ATTEMPT, 1, patience_s)


def test_files_alone_do_not_call_a_rank_gone(tmp_path: Path) -> None:
    """As where the supervisor that judges was killed."""
    reports = [report(rank, STEP + "E", "infra") for rank in (0, 1, 2)]
    write(tmp_path, reports, {"event": "start", "nodes": ["n0", "n0", "n1", "n1"]})
    got = how_it_ended(tmp_path, ATTEMPT, 1)
    assert (got["kind"], got["node"], got["step"]) == ("infra", None, 1)
    assert "rank 3 left no report" in got["message"]
    assert decide(config(), [], got, "RUNNING").requeue


def test_of_two_verdicts_the_one_of_more_reports_stays_or_else_rank_0s(tmp_path: Path) -> None:
    """Where the network falls into two parts, both may judge."""
    judged = {stands_in: judge({0: report(0, kind="bug", step=int(stands_in))}, 1, []) for stands_in in (True, False)}
    for first, second, stays in [
        ((4, True), (4, False), False),
        ((4, False), (4, True), False),
        ((12, True), (4, False), True),
        ((4, False), (12, True), True),
    ]:
        (tmp_path / "verdict.json").unlink(missing_ok=True)
        for count, stands_in in (first, second):
            files.write(tmp_path, judged[stands_in], count, stands_in)
        assert files.written(tmp_path) == judged[stays]


def test_a_last_word_does_not_hide_a_failure_after_it(tmp_path: Path) -> None:
    last = {"event": "last", "kind": "done", "message": "step 20", "step": 20}
    write(tmp_path, [report(0, STEP, **KILLED, world=1)], last)
    assert how_it_ended(tmp_path, ATTEMPT, 1)["kind"] == "died"


def test_another_attempts_reports_are_not_this_ones(tmp_path: Path) -> None:
    write(tmp_path, [report(0, STEP, "bug", world=1)], attempt="7.0-1")
    assert how_it_ended(tmp_path, ATTEMPT, 1)["kind"] == "infra"


# ------------------------------------------------------------------------------------------------ the same error again


def test_the_attempt_is_that_of_the_ranks_step_whatever_steps_ran_before_it(tmp_path: Path) -> None:
    assert attempt_name(tmp_path, "7", "1") == "7.0-1", "nothing is there yet"
    write(tmp_path, [report(0, STEP, "bug", world=1)], attempt="7.2-1")  # two lines of cluster.setup call srun
    write(tmp_path, [report(0, STEP, "bug", world=1)], attempt="7.3-0")
    write(tmp_path, [], {"event": "start", "nodes": ["a"]}, attempt="71.9-1")
    assert attempt_name(tmp_path, "7", "1") == "7.2-1"


def attempt_with_error(run_dir: Path, attempt: str, first: int, step: int, message: str) -> dict[str, Any]:
    """How an attempt ended whose two ranks, on two nodes, raised the same error, one a moment before the other."""
    both = [
        report(rank, kind="bug", tp=1, world=2, step=step, message=message, time=100.0 + (rank != first))
        for rank in (0, 1)
    ]
    write(run_dir, both, attempt=attempt)
    return how_it_ended(run_dir, attempt, 1)


@pytest.mark.parametrize(
    ("again", "requeued"),
    [
        ({"first": 0, "step": 7, "message": "KeyError: 'x'"}, False),
        ({"first": 1, "step": 7, "message": "KeyError: 'x'"}, False),  # first on another rank and node: the same
        ({"first": 0, "step": 8, "message": "KeyError: 'x'"}, True),
        ({"first": 0, "step": 7, "message": "KeyError: 'y'"}, True),
    ],
)
def test_an_error_that_came_twice_at_the_same_step_is_final(tmp_path: Path, again: Any, requeued: bool) -> None:
    before = attempt_with_error(tmp_path, "7.0-0", 0, 7, "KeyError: 'x'")
    assert decide(config(), [], before, "RUNNING").requeue
    between = ended("stopped")
    now = attempt_with_error(tmp_path, "7.0-1", **again)
    decision = decide(config(), [before, between], now, "RUNNING")
    assert decision.requeue == requeued, decision.why
    assert requeued or "step 7" in decision.why
