"""`cluster=local`: one process a rank on this machine, through submitit, followed live."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import submitit
from submitit.core.utils import pickle_load
from tqdm import tqdm

from launch.job import Entry, command_time, run_rank, shell_lines
from launch.place import free_port
from launch.run_dir import read_job, record_job
from tptrain.config import Config
from tptrain.config.validate import minutes
from tptrain.records.rows import describe, figures, parse_row
from tptrain.records.run_dir import newest_checkpoint
from tptrain.watch import files, verdict

GRACE_S = 20  # between the first rank's exit and the end of the others
A_YEAR_MIN = 60 * 24 * 365
STOP_S = 120  # for a checkpoint after Ctrl-C
STOPPING = "Ctrl-C: stopping after this step, with a checkpoint (again: at once, without)"


def submit(config: Config, entry: Entry) -> submitit.Job[int]:
    """Start one process a rank. Ctrl-C in the terminal does not reach them: `follow` passes it on."""
    cluster = config.cluster
    run_dir = Path(config.run.dir)
    executor = submitit.LocalExecutor(run_dir / "logs", python=_python(config))
    executor.update_parameters(
        tasks_per_node=cluster.tasks_per_node,
        timeout_min=(cluster.time and minutes(cluster.time)) or A_YEAR_MIN,
        stderr_to_stdout=True,
    )
    name = f"local.{time.time_ns():x}"
    variables = {
        "TPTRAIN_JOB": name,
        "MASTER_PORT": str(free_port()),
        # submitit's local executor hides the GPUs it was not told of: give the ranks what this process sees.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES"),
        **{key: cluster.env[key] for key in ("MASTER_PORT", "CUDA_VISIBLE_DEVICES") if key in cluster.env},
    }
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the children inherit
    try:
        job = executor.submit(run_rank, entry, str(run_dir), variables, command_time())
    finally:
        signal.signal(signal.SIGINT, before)
    record_job(run_dir, kind="local", id=job.job_id, logs=str(run_dir / "logs" / job.job_id), attempt=f"{name}-0")
    return job


def _python(config: Config) -> str:
    """The command that starts a rank's Python: the shell lines run first, in the same process."""
    python = f"{shlex.quote(sys.executable)} -u -m launch.local_rank"
    lines = shell_lines(config)
    if not lines:
        return python
    script = "\n".join(["set -e", *lines, f'exec {python} "$@"'])
    return f"bash -c {shlex.quote(script)} bash"


@contextlib.contextmanager
def interrupts() -> Iterator[list[float]]:
    """The times (monotonic clock) of Ctrl-C from now on. As an exception it would end this process and no rank."""
    presses: list[float] = []
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as it is for `launch ... &` in a script
        signal.signal(signal.SIGINT, lambda *_: presses.append(time.monotonic()))
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)


class Follower:
    """Shows a local job's progress until its end, and ends what is left of it."""

    def __init__(self, config: Config, job: submitit.Job[int], presses: list[float]) -> None:
        self.run_dir = Path(config.run.dir)
        self.ranks = config.cluster.tasks_per_node or 1
        self.job = job.job_id  # the pid of the controller
        self.prefix = str(self.run_dir / "logs" / self.job)
        self.controller = psutil.Process(int(self.job))
        self.steps = config.train.steps
        self.log = Tail(Path(f"{self.prefix}_0_log.out"))
        self.metrics = Tail(self.run_dir / "metrics.jsonl")
        self.metrics.lines()  # of earlier attempts: this one's trainer replaces the file
        self.row_lines: set[str] = set()  # lines that the log will have for rows that the bar has shown
        self.presses = presses  # of Ctrl-C, see `interrupts`
        self.verdict_shown = False  # in rank 0's log
        self.lost_at = 0.0  # when the controller was seen to be gone before its ranks, by the monotonic clock
        self.crashed: set[int] = set()  # ranks that had ended without a result before the others were killed
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, unit="step", desc=config.run.name, dynamic_ncols=True)

    def follow(self) -> int:
        """Returns the job's exit code: 0 done, 2 for a user's mistake, 1 for anything else, Ctrl-C included."""
        checked_at = short_since = 0.0
        handled = 0  # of the presses
        signalled: set[int] = set()  # pids of the ranks that were sent a signal for the first Ctrl-C
        while self._alive():
            self._show()
            if len(self.presses) > handled:
                handled += 1
                self._say(STOPPING if handled == 1 else "stopping at once")
                if handled > 1:
                    self._kill()
            if handled and len(signalled) < self.ranks:
                ask_to_stop(self.job, signalled)
            now = time.monotonic()
            if now - checked_at > 1:  # not each time: it reads all of /proc, on cores that the ranks want
                checked_at = now
                short_since = (short_since or now) if len(self._running()) < self.ranks else 0.0
            asked = self.presses[:1] + ([self.lost_at] if self.lost_at else [])
            if (short_since and now - short_since > GRACE_S) or (asked and now - min(asked) > STOP_S):
                self._kill()
            time.sleep(0.1)
        self._show()
        if self.bar is not None:
            self.bar.close()
        code = 1 if self.lost_at or self.presses else self._exit_code()
        if code not in (0, 2) and not self.presses:
            self._explain()
        return code

    def _alive(self) -> bool:
        """Whether the controller lives; or ranks, where it was killed: each of them then gets a SIGTERM."""
        if self.controller.is_running() and self.controller.status() != psutil.STATUS_ZOMBIE:
            return True
        orphans = self._orphans()
        if orphans and not self.lost_at:
            self.lost_at = time.monotonic()
            self._say(f"{self._lost()}: the ranks stop after this step, with a checkpoint")
        if not self.lost_at and self._unfinished() and was_killed(int(self.job)):  # before there was a rank
            self.lost_at = time.monotonic()
        return orphans

    def _orphans(self) -> bool:
        """Whether ranks live on. One that is just starting another program shows no command for an instant."""
        deadline = time.monotonic() + 1
        while self._unfinished():
            if self._running():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return False

    def _unfinished(self) -> bool:
        """Whether a rank has not ended by itself, or not yet."""
        return any(self._result(rank) is None for rank in range(self.ranks))

    def _lost(self) -> str:
        return f"the process that started the ranks (pid {self.job}) was killed"

    def _running(self) -> list[psutil.Process]:
        """The ranks that live, by their supervisors."""
        return supervisors(self.job)

    def _kill(self) -> None:
        running = self._running()
        with contextlib.suppress(psutil.Error):
            alive = {int(rank.environ()["SUBMITIT_LOCAL_GLOBALID"]) for rank in running}
            ended = set(range(self.ranks)) - alive
            self.crashed = self.crashed or {rank for rank in ended if self._result(rank) is None}
        for rank in running:
            with contextlib.suppress(psutil.Error):
                rank.kill()

    def _show(self) -> None:
        lines = self.log.lines()  # before the metrics: a row is in that file before its line is in the log
        if self.bar is not None:
            self._advance(self.bar)
        for line in lines:
            self.verdict_shown = self.verdict_shown or line.startswith("verdict:")
            if line not in self.row_lines:
                self._say(line)
            self.row_lines.discard(line)

    def _advance(self, bar: tqdm) -> None:
        """Move the bar to the newest row of metrics.jsonl. Only rows with a validation are lines as well."""
        rows = [row for line in self.metrics.lines() if (row := parse_row(line)) is not None]
        self.row_lines |= {describe(row, self.steps) for row in rows if "val_loss" not in row}
        if rows:
            bar.set_postfix_str(", ".join(figures(rows[-1])), refresh=False)
            bar.update(rows[-1]["step"] - bar.n)

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def _exit_code(self) -> int:
        codes = [self._result(rank) for rank in range(self.ranks)]
        return 2 if 2 in codes else int(any(code != 0 for code in codes))

    def _result(self, rank: int) -> int | str | None:
        """A rank's exit code; its traceback, where it raised; None where it was killed."""
        result = Path(f"{self.prefix}_{rank}_result.pkl")
        return pickle_load(result)[1] if result.exists() else None

    def _explain(self) -> None:
        """Which rank failed and how, whether the disk is full, and what there is to go on from."""
        folder = files.folder_of(self.run_dir, read_job(self.run_dir)["attempt"])
        judged, reports = files.written(folder), files.read(folder)
        results = [self._result(rank) for rank in range(self.ranks)]
        raised = [
            f"rank {rank}: {result.strip().splitlines()[-1]}"
            for rank, result in enumerate(results)
            if isinstance(result, str)
        ]
        if self.verdict_shown:
            pass
        elif self.lost_at:
            _complain(self._lost())
        elif judged is not None:
            _complain(judged.text)
        elif reports:
            _complain(verdict.judge(reports, self.ranks, []).text)
        elif raised:
            _complain(raised[0])
        elif None in results:
            _complain(f"rank {min(self.crashed, default=results.index(None))} was killed or crashed")
        if shutil.disk_usage(self.run_dir).free < 2**20:
            _complain(f"no space left on the file system of {self.run_dir}")
        newest = newest_checkpoint(self.run_dir)
        left = (
            f"the newest committed checkpoint is {newest}; launch again to go on from it"
            if newest
            else "no checkpoint yet"
        )
        _complain(f"the run failed; {left}. Logs: {self.prefix}_*_log.out")


def _complain(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def supervisors(job: str) -> list[psutil.Process]:
    """Of the ranks that live: the processes that submitit's controller started, not the trainers below them. They are
    known by their environment, for they may outlive the controller.
    """
    ranks = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ends while we look, or is another user's
            if _is_rank(process, job) and not ((parent := process.parent()) and _is_rank(parent, job)):
                ranks.append(process)
    return ranks


def _is_rank(process: psutil.Process, job: str) -> bool:
    return (
        "submitit.core._submit" in process.cmdline()
        and process.environ().get("SUBMITIT_LOCAL_JOB_ID") == job
        and process.status() != psutil.STATUS_ZOMBIE
    )


def ask_to_stop(job: str, signalled: set[int]) -> None:
    """SIGTERM to the ranks that are there and whose pids are not yet in `signalled`. Others may only be starting: one
    whose Python has not come to its first line would be killed by it.
    """
    for rank in supervisors(job):
        if rank.pid not in signalled and defers_sigterm(rank.pid):
            with contextlib.suppress(psutil.Error):
                rank.terminate()
            signalled.add(rank.pid)


def was_killed(child: int) -> bool:
    """Whether a signal has ended this child of ours, which stays to be waited for."""
    with contextlib.suppress(ChildProcessError):  # it has been waited for
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is not None and ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
    return False


def defers_sigterm(pid: int) -> bool:
    """Whether a process blocks or handles SIGTERM."""
    with contextlib.suppress(OSError):  # it has ended
        masks = re.findall(r"Sig(?:Blk|Cgt):\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in masks)
    return False


class Tail:
    """Whole lines of a growing file, as they come, without submitit's own. A file that replaces it is read as well."""

    def __init__(self, path: Path) -> None:
        self.path, self.inode, self.offset = path, 0, 0

    def lines(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if (inode := os.fstat(file.fileno()).st_ino) != self.inode:
                self.inode, self.offset = inode, 0
            file.seek(self.offset)
            whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        self.offset += len(whole)
        lines = whole.decode(errors="replace").splitlines()
        return [line for line in lines if not line.startswith("submitit INFO")]
