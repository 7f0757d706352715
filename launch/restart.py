"""After a Slurm job's ranks have ended: does the job go back into the queue? The job script asks when srun returns.

    python -m launch.restart RUN_DIR SRUN_EXIT_CODE

One process decides, once, whatever happened to the ranks: preemption, the time limit and failures of machines are tried
again, up to `cluster.max_restarts` times in a row without a new checkpoint; a mistake of the user, a loss that is no
number, a full disk, and an error that came twice at the same step are not.
"""

import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import slurm
from launch.allocation import requeued_by_slurm, slurm_name
from tptrain.config import Config, read_config
from tptrain.records.run_dir import add_event, events, newest_checkpoint
from tptrain.watch import files, verdict
from tptrain.watch.outcome import Outcome

LATE_S = 60  # until a network file system shows here what another node has written


@dataclass(frozen=True)
class Decision:
    requeue: bool
    why: str
    exclude: str | None = None  # a node to keep away from


def decide(config: Config, history: list[dict[str, Any]], ended: dict[str, Any], state: str) -> Decision:
    """What to do after an attempt ended as `ended` says (kind, step, checkpoint, message, node, error).

    `history`: the ends of earlier attempts, oldest first; `state`: what Slurm says of the job.
    """
    outcome = Outcome(ended["kind"])
    if outcome.final:
        return Decision(False, outcome.final)
    if state not in ("RUNNING", "TIMEOUT", "") and not (state == "COMPLETING" and outcome == Outcome.TIMEOUT):
        return Decision(False, f"Slurm says {state.lower()}")
    if outcome == Outcome.BUG and any(
        before["kind"] == Outcome.BUG and (before["step"], before.get("error")) == (ended["step"], ended.get("error"))
        for before in history
    ):
        return Decision(False, f"the same error came before at step {ended['step']}")
    in_a_row = 0  # tries before this one that, like this one, left no new checkpoint
    for before in reversed(history):
        if before["checkpoint"] != ended["checkpoint"]:
            break
        in_a_row += 1
    if in_a_row >= config.cluster.max_restarts:
        limit = config.cluster.max_restarts
        return Decision(False, f"{limit} restarts in a row brought no new checkpoint (cluster.max_restarts={limit})")
    return Decision(True, ended["message"], exclude=ended.get("node") if outcome.blames_node else None)


def how_it_ended(run_dir: Path, attempt: str, code: int, patience_s: float = 0) -> dict[str, Any]:
    """The end of an attempt, by what its ranks left in the run directory. `patience_s`: for a verdict, where there are
    reports but not of all ranks.
    """
    newest = newest_checkpoint(run_dir)
    base = {"event": "end", "attempt": attempt, "time": time.time(), "checkpoint": newest, "node": None}
    last = [event for event in events(run_dir) if (event["event"], event["attempt"]) == ("last", attempt)]
    if code == 0 and last:
        return base | {key: last[-1][key] for key in ("kind", "message", "step")}
    folder, deadline = files.folder_of(run_dir, attempt), time.monotonic() + patience_s
    while (judged := files.written(folder)) is None and (reports := files.read(folder)):
        world = next(iter(reports.values()))["world"]
        if len(reports) == world or time.monotonic() > deadline:  # who should have judged was killed
            judged = verdict.judge(reports, world, [])
            break
        time.sleep(0.5)
    if judged is None:
        return base | {"kind": Outcome.of_exit_code(code), "message": f"srun ended with {code}", "step": 0}
    end = base | {"kind": judged.kind, "message": judged.text, "step": judged.step, "node": judged.node}
    if judged.error is not None:  # the same error may come first on another rank the next time
        end["error"] = judged.error
    return end


def attempt_name(run_dir: Path, job: str, restart: str) -> str:
    """The ranks' name of the attempt, after their Slurm step: not the first where set-up lines have started some."""
    names = {event["attempt"] for event in events(run_dir)}
    names |= {folder.name.removeprefix("attempt-") for folder in (run_dir / "logs").glob("attempt-*")}
    parts = [re.fullmatch(rf"{re.escape(job)}\.(\d+)-{restart}", name) for name in names]
    return f"{job}.{max((int(part[1]) for part in parts if part), default=0)}-{restart}"


def main(run_dir: Path, code: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a requeue begins with it, and it must not cut off what follows
    config = read_config(run_dir / "config.yaml")
    job, name, restart = os.environ["SLURM_JOB_ID"], slurm_name(), os.environ.get("SLURM_RESTART_COUNT", "0")
    attempt = attempt_name(run_dir, job, restart)
    # A job that Slurm is ending has no time to wait.
    running = slurm.show_job(name).get("JobState") == "RUNNING"
    ended = how_it_ended(run_dir, attempt, code, LATE_S if running else 0)
    shown = slurm.show_job(name)
    if ended["kind"] in (Outcome.INFRA, Outcome.STOPPED, Outcome.GONE) and shown.get("Reason") == "TimeLimit":
        ended |= {"kind": Outcome.TIMEOUT, "message": "the time limit"}
    ends = [event for event in events(run_dir) if event["event"] == "end"]
    history = [event for event in ends if event["attempt"].split(".")[0] == job]
    decision = decide(config, history, ended, shown.get("JobState", ""))
    if requeued_by_slurm(shown):
        decision = Decision(False, "Slurm has requeued it by itself")
    excluded = _nodes_to_exclude(decision.exclude, shown) if decision.requeue and decision.exclude else None
    ended |= {"requeued": decision.requeue, "why": decision.why, "excluded": excluded}
    add_event(run_dir, ended)  # first: without a history there would be no end
    if not decision.requeue:
        if ended["kind"] != Outcome.DONE:
            print(f"not requeued: {decision.why}", flush=True)
        return
    try:
        slurm.requeue(name)
    except slurm.SlurmError as error:
        print(f"not requeued: Slurm refuses: {error}", flush=True)
        return
    if excluded:
        try:
            slurm.exclude_nodes(name, excluded)
        except slurm.SlurmError as error:
            print(error, flush=True)
    without = f", without {excluded}" if excluded else ""
    print(f"requeued{without}: {decision.why}", flush=True)


def _nodes_to_exclude(node: str, shown: dict[str, str]) -> str | None:
    """The nodes that the job must avoid already, and `node`; None where too few others are up.

    `shown`: what `slurm.show_job` returned.
    """
    before = shown.get("ExcNodeList", "(null)")
    try:
        excluded = {node} | set(slurm.hostnames(before) if before not in ("(null)", "") else ())
        left = len(slurm.nodes_up(shown.get("Partition", "")) - excluded)
    except slurm.SlurmError as error:
        print(f"{node} is not excluded: {error}", flush=True)
        return None
    needed = int(shown.get("NumNodes", "1").split("-")[0])
    if left < needed:
        print(f"{node} is not excluded: only {left} other nodes are up, and the job needs {needed}", flush=True)
        return None
    return ",".join(sorted(excluded))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
