"""The Slurm job as seen from inside it: when it ends, and why it is being stopped. Every answer is one `scontrol`."""

import os
import subprocess
import time
from datetime import datetime


def ask(*command: str) -> str:
    """What a Slurm command prints; empty where Slurm does not answer in time."""
    try:
        plain = os.environ | {"SLURM_TIME_FORMAT": "standard"}  # a user's own would not be understood
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, env=plain).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def slurm_name() -> str:
    """What this job is called in Slurm's commands. An array's last task has the array's own id: ID_INDEX is safe."""
    env = os.environ
    array = env.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]


def fields(job: str) -> dict[str, str]:
    """`scontrol show job`, as far as its values hold no blanks. Empty where Slurm does not answer."""
    words = ask("scontrol", "show", "job", "--oneliner", job).split()
    pairs = (word.partition("=") for word in words if "=" in word)
    found: dict[str, str] = {}
    for name, _, value in pairs:
        found.setdefault(name, value)
    return found


def requeued_by_slurm(shown: dict[str, str]) -> bool:
    """Whether Slurm has put the job back into the queue while we still run, as after a node's failure."""
    return int(shown.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0))


class SlurmAllocation:
    """The job that this process runs in."""

    def __init__(self) -> None:
        self.job = slurm_name()
        self.launched = "SUBMITIT_EXECUTOR" in os.environ  # else nobody is there to requeue it

    def end_time(self) -> float | None:
        """Unix time at which Slurm kills the job, or None."""
        return _unix(fields(self.job).get("EndTime", ""))

    def reason(self, signals: set[str]) -> tuple[str, bool, float | None]:
        """Why these signals came, whether the job goes on later, and when Slurm kills it."""
        why, requeue, end = self._reason(signals)
        return why, requeue and self.launched, end

    def _reason(self, signals: set[str]) -> tuple[str, bool, float | None]:
        shown = fields(self.job)
        state, end = shown.get("JobState", ""), _unix(shown.get("EndTime", ""))
        if "SIGINT" in signals:
            return "interrupted", False, end
        if state and state != "RUNNING":  # Slurm has ended it already
            end = time.time() + _kill_wait()
            if requeued_by_slurm(shown):
                return "requeued by Slurm: a node failed, or the job was preempted", True, end
            limit = shown.get("Reason") == "TimeLimit"
            return "the time limit" if limit else "cancelled", limit, end
        if shown.get("PreemptTime", "None") not in ("None", ""):
            return "preempted", True, end
        if signals & {"SIGUSR2", "SIGUSR1"}:
            return "the time limit is near", True, end
        return " and ".join(sorted(signals)), True, end


def _kill_wait() -> float:
    """Seconds between Slurm's SIGTERM and its SIGKILL."""
    for line in ask("scontrol", "show", "config").splitlines():
        if line.startswith("KillWait"):
            return float(line.split("=")[1].split()[0])
    return 30.0


def _unix(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # Unknown, N/A
        return None
