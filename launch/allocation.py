"""The Slurm job as seen from inside it: when it ends, and why it is being stopped."""

import os
import time
from datetime import datetime

from launch import slurm


def slurm_name() -> str:
    """What this job is called in Slurm's commands. An array's last task has the array's own id: ID_INDEX is safe."""
    env = os.environ
    array = env.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]


def requeued_by_slurm(shown: dict[str, str]) -> bool:
    """Whether Slurm has put the job back into the queue while we still run, as after a node's failure.

    `shown`: what `slurm.show_job` returned.
    """
    return int(shown.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT", 0))


class SlurmAllocation:
    """The job that this process runs in."""

    def __init__(self) -> None:
        self.job = slurm_name()
        self.launched = "SUBMITIT_EXECUTOR" in os.environ  # else nobody is there to requeue it

    def end_time(self) -> float | None:
        """Unix time at which Slurm kills the job, or None."""
        return _unix(slurm.show_job(self.job).get("EndTime", ""))

    def reason(self, signals: set[str]) -> tuple[str, bool, float | None]:
        """Why these signals came, whether the job goes on later, and when Slurm kills it."""
        why, requeue, end = self._reason(signals)
        return why, requeue and self.launched, end

    def _reason(self, signals: set[str]) -> tuple[str, bool, float | None]:
        shown = slurm.show_job(self.job)
        state, end = shown.get("JobState", ""), _unix(shown.get("EndTime", ""))
        if "SIGINT" in signals:
            return "interrupted", False, end
        if state and state != "RUNNING":  # Slurm has ended it already
            end = time.time() + slurm.kill_wait_s()
            if requeued_by_slurm(shown):
                return "requeued by Slurm: a node failed, or the job was preempted", True, end
            limit = shown.get("Reason") == "TimeLimit"
            return "the time limit" if limit else "cancelled", limit, end
        if shown.get("PreemptTime", "None") not in ("None", ""):
            return "preempted", True, end
        if signals & {"SIGUSR2", "SIGUSR1"}:
            return "the time limit is near", True, end
        return " and ".join(sorted(signals)), True, end


def _unix(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # Unknown, N/A
        return None
