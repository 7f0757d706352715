"""The daily commands: what runs there are and how they stand, their logs, and how to stop one."""

import contextlib
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from launch import slurm
from launch.local import Tail, ask_to_stop, supervisors
from launch.run_dir import read_job
from tptrain.config import Config, UserError, read_config
from tptrain.records.rows import last_row
from tptrain.records.run_dir import COMMIT, events, newest_checkpoint
from tptrain.watch.outcome import Outcome

ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "RESIZING", "STOPPED", "SIGNALING")
ASK_S = 10  # between two questions to Slurm while a log is followed
CANCEL_S = 60  # beyond the grace period, for a job to leave the queue


@dataclass(frozen=True)
class State:
    """How a run's last job stands."""

    word: str  # Slurm's, in lower case, or ours: `stopped` means that it waits in the one, and has ended in the other
    reason: str = ""
    alive: bool = False  # it waits or runs


def _slurm_state(word: str, reason: str = "") -> State:
    return State(word.lower(), reason, alive=word in ALIVE)


SILENT = State("unknown", "Slurm does not answer")


def check_not_running(run: Path) -> None:
    """Raises UserError where the run's last job still waits or runs, or where that cannot be known."""
    job = read_job(run)
    if not job:
        return
    state = states([run])[run]
    if state == SILENT:
        raise UserError(f"run.dir={run}: whether its job {job['id']} still runs is unknown: {state.reason}.")
    if state.alive:
        raise UserError(
            f"run.dir={run}: its job {job['id']} is {state.word}. Wait for it, or stop it first: "
            f"`python -m tptrain cancel {run}`."
        )


def find(name: str) -> Path:
    """A run by its directory or by its name below runs/. Raises UserError."""
    for folder in (Path(name), Path("runs") / name):
        if (folder / "config.yaml").exists():
            return folder.absolute()
    raise UserError(f"{name}: no run of that name or directory (it has no config.yaml). `status` lists the runs.")


def find_checkpoint(name: str) -> Path:
    """A checkpoint by its directory, or a run's newest one. Raises UserError."""
    if (Path(name) / COMMIT).exists():
        return Path(name).absolute()
    folder = Path(name).absolute()
    run = folder if newest_checkpoint(folder) else find(name)  # `import` leaves a checkpoint and no run
    newest = newest_checkpoint(run)
    if newest is None:
        raise UserError(f"{name}: has no checkpoint yet.")
    return run / "checkpoints" / newest


def all_runs(root: Path) -> list[Path]:
    """Run directories below a folder, a sweep's among them, the last launched last."""
    folders = [path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/config.yaml")]
    return sorted((path.absolute() for path in folders), key=lambda path: (path / "config.yaml").stat().st_mtime)


# --------------------------------------------------------------------------------------------------------------- states


def states(runs: list[Path]) -> dict[Path, State]:
    """The state of every run's last job: one `squeue`, and one `sacct` where Slurm keeps accounts."""
    jobs = {run: read_job(run) for run in runs}
    ids = {job["id"] for job in jobs.values() if job.get("kind") == "slurm"}
    try:
        by_slurm = _slurm_states(ids) if ids else {}
    except slurm.SlurmError:
        by_slurm = dict.fromkeys(ids, SILENT)
    return {run: _state(run, job, by_slurm) for run, job in jobs.items()}


def _state(run: Path, job: dict[str, Any], by_slurm: dict[str, State]) -> State:
    ended = [event for event in events(run) if event["event"] in ("last", "end")]
    outcome = Outcome(ended[-1]["kind"]) if ended else None
    if job.get("kind") == "slurm" and job["id"] in by_slurm:
        state = by_slurm[job["id"]]
        if state.word == "completed" and outcome is not None and outcome.early:
            return State(outcome, ended[-1]["message"])
        return state
    if job.get("kind") == "local":
        if (controller := _controller(job)) is not None:
            return State("running", f"process {controller.pid}", alive=True)
        if not ended or ended[-1]["attempt"] != job.get("attempt"):  # it had no time to say how it ended
            alive = bool(supervisors(job["id"]))
            return State("running", "stopping", alive=True) if alive else State("failed", "killed")
    if outcome is None:
        return State("unknown" if job else "not launched")
    if outcome == Outcome.DONE:
        return State("completed")
    return State(outcome if outcome.early else "failed", ended[-1]["message"])


def _slurm_states(ids: set[str]) -> dict[str, State]:
    """By job id, without the jobs that Slurm has forgotten. Raises SlurmError where it does not answer."""
    queue = slurm.queued(ids)
    by_id = {job: _slurm_state(word) for job, word in slurm.accounted(ids).items()}
    by_id |= {job: _slurm_state(word, reason) for job, (word, reason) in queue.items()}
    for job in ids - by_id.keys():  # no accounting: Slurm itself remembers an ended job for some minutes
        if word := slurm.show_job(job).get("JobState"):
            by_id[job] = _slurm_state(word)
    return by_id


def _controller(job: dict[str, Any]) -> psutil.Process | None:
    """The process that runs a local job, if it lives; its id may be another's by now."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(int(job["id"]))
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        if alive and "submitit" in " ".join(process.cmdline()):
            return process
    return None


# --------------------------------------------------------------------------------------------------------------- status


def status(runs: list[Path]) -> None:
    """Print the table."""
    by_run = states(runs)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("run", "job", "state", "step", "loss", "tokens/s", "eta", "restarts", "checkpoint"):
        table.add_column(name, justify="right" if name in ("step", "loss", "tokens/s", "eta", "restarts") else "left")
    for run in runs:
        try:
            table.add_row(*_cells(run, read_config(run / "config.yaml"), by_run[run]))
        except UserError:  # damaged, or of another version
            table.add_row(run.name, "", "config.yaml is unreadable")
    width = None if sys.stdout.isatty() else 160
    Console(width=width, soft_wrap=True).print(table if runs else "no runs here; `launch` makes one below runs/")


def _cells(run: Path, config: Config, state: State) -> list[str]:
    row = last_row(run / "metrics.jsonl")
    left = (config.train.steps - row["step"]) * row.get("step_time_s", 0) if row else 0
    starts = [event for event in events(run) if event["event"] == "start"]
    job = read_job(run).get("id", "")
    word = state.word + (f" ({state.reason})" if state.reason else "")
    return [
        config.run.name or run.name,
        job,
        word if len(word) < 60 else word[:57] + "...",
        f"{row['step'] if row else 0}/{config.train.steps}",
        f"{row['loss']:.4f}" if row and row.get("loss") is not None else "",
        f"{row['tokens_per_second']:,.0f}" if row and "tokens_per_second" in row else "",
        str(timedelta(seconds=round(left))) if row and state.word == "running" else "",
        str(max(0, len(starts) - 1)),
        newest_checkpoint(run) or "",
    ]


# ----------------------------------------------------------------------------------------------------------------- logs


def logs(run: Path, rank: int, follow: bool) -> None:
    """Print the log of a rank of the run's last job; with `follow`, go on until the job ends. Raises UserError."""
    job = read_job(run)
    if not job:
        raise UserError(f"{run}: was not launched by `launch`, so its output went to whoever started it.")
    path = Path(f"{job['logs']}_{rank}_log.out")
    tail, wait_announced, checked_at = Tail(path), False, 0.0
    while True:
        for line in tail.lines():
            print(line, flush=True)
        if not follow:
            break
        time.sleep(0.5)
        if time.monotonic() - checked_at < ASK_S:
            continue
        checked_at, state = time.monotonic(), states([run])[run]
        if not state.alive and state != SILENT:
            for line in tail.lines():
                print(line, flush=True)
            print(f"-- {state.word}", file=sys.stderr)
            return
        if not path.exists() and not wait_announced:
            print(f"-- {state.word}{f' ({state.reason})' if state.reason else ''}; waiting for {path}", file=sys.stderr)
            wait_announced = True
    if not path.exists():
        ranks = sorted(run.glob("logs/*_log.out"))
        raise UserError(f"--rank={rank}: no log yet at {path}. There are {len(ranks)} logs in {path.parent}.")


# --------------------------------------------------------------------------------------------------------------- cancel


def cancel(run: Path) -> int:
    """Stop a run for good, with a checkpoint where it was training. Returns the exit code."""
    job, state = read_job(run), states([run])[run]
    if state == SILENT:
        raise UserError(f"{run}: {state.reason}, so its job {job['id']} cannot be cancelled now.")
    if not state.alive:
        raise UserError(f"{run}: nothing to cancel, its last job is {state.word}.")
    if job["kind"] == "local":
        _cancel_local(job)
    elif state.word == "running" and slurm.has_steps(job["id"]):
        _cancel_slurm(job["id"], run)
    else:  # it waits, is suspended, or its ranks have not started: there is nothing to save
        slurm.cancel(job["id"])
    newest = newest_checkpoint(run)
    print(f"cancelled; {f'checkpoint {newest}' if newest else 'no checkpoint yet'}. `launch` again goes on from there")
    return 0


def _cancel_slurm(job: str, run: Path) -> None:
    """SIGINT to the ranks: they save, and end; the job script sees that it was the user. Then, if need be, force."""
    print(f"asking job {job} to save and stop ...", flush=True)
    slurm.cancel(job, signal="INT")
    deadline = time.monotonic() + read_config(run / "config.yaml").cluster.grace_s + CANCEL_S
    while states([run])[run].word in ("running", "completing"):
        if time.monotonic() > deadline:
            print(f"it did not; scancel {job}", flush=True)
            break
        time.sleep(1)
    if states([run])[run].alive:  # it hangs, or somebody requeued it in between
        slurm.cancel(job)


def _cancel_local(job: dict[str, Any]) -> None:
    """Ask the ranks to stop, and wait for them and for their controller, which may be gone already."""

    def alive() -> list[psutil.Process]:
        return [*supervisors(job["id"]), *filter(None, [_controller(job)])]

    if not alive():
        return
    print(f"asking process {job['id']} to save and stop ...", flush=True)
    signalled: set[int] = set()
    deadline = time.monotonic() + 2 * CANCEL_S
    while (processes := alive()) and time.monotonic() < deadline:
        ask_to_stop(job["id"], signalled)
        psutil.wait_procs(processes, timeout=0.5)
    if processes:
        print("they did not; killing them", flush=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
