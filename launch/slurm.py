"""The one Slurm client: every command that this project gives to Slurm, apart from submitit's sbatch and srun.

`ask` runs them all, each with a time-out. A command that is missing, fails or gives no answer raises SlurmError, and
the caller decides what that means.
"""

import itertools
import os
import re
import subprocess
from dataclasses import dataclass
from typing import Any

from tptrain.config import UserError

ANSWER_S = 20  # for Slurm's controller to answer a command
HURRIED_S = 10  # the same, where a job may have only seconds left
ORDER_S = 120  # the same, for an order that must not be given up while the controller is merely busy
DOWN = ("down", "drain", "drng", "fail", "maint")  # states of a node that takes no job, in sinfo's short form


class SlurmError(UserError):
    """Slurm refuses or gives no answer. A UserError, because the user's command ends with its message."""


def ask(*command: str, timeout_s: float = ANSWER_S, ignored_error: str | None = None) -> str:
    """What a Slurm command prints. Raises SlurmError, unless it fails with `ignored_error` in its message."""
    environment = os.environ | {"SLURM_TIME_FORMAT": "standard"}  # a user's own could not be parsed
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    except OSError as error:
        raise SlurmError(f"`{command[0]}` cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"`{command[0]}` gave no answer in {timeout_s:.0f} s") from error
    if done.returncode and not (ignored_error and ignored_error in done.stderr):
        raise SlurmError(f"`{' '.join(command)}`: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def options(settings: dict[str, Any]) -> dict[str, Any]:
    """The options of a command, by name without the leading dashes: a value, or True for a flag."""
    return {
        key.replace("_", "-"): ",".join(map(str, value)) if isinstance(value, list) else value
        for key, value in settings.items()
        if value is not None and value is not False
    }


def flags(options: dict[str, Any]) -> list[str]:
    """The same as words of a command line."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


# ---------------------------------------------------------------------------------------------------- questions on jobs


def queued(jobs: set[str]) -> dict[str, tuple[str, str]]:
    """State and reason of each of these jobs that waits or runs, by id."""
    # squeue fails where it is asked for one job only and has forgotten it.
    shown = ask("squeue", "-h", "-r", _jobs(jobs), "--format=%i|%T|%r", ignored_error="Invalid job id")
    rows = [line.split("|", 2) for line in shown.splitlines() if line]
    return {job: (state, "" if reason == "None" else reason) for job, state, reason in rows}


def accounted(jobs: set[str]) -> dict[str, str]:
    """The state of each of these jobs by Slurm's accounting, by id; empty where there is none."""
    try:
        shown = ask("sacct", "-X", "-n", "-P", _jobs(jobs), "--format=JobID,State")
    except SlurmError:
        return {}
    rows = [line.split("|") for line in shown.splitlines() if line]
    return {job: state.split()[0] for job, state in rows}


def has_steps(job: str) -> bool:
    """Whether ranks of a job run."""
    return bool(ask("squeue", "-h", "-s", _jobs({job}), ignored_error="Invalid job id").strip())


def show_job(job: str) -> dict[str, str]:
    """`scontrol show job`, as far as its values hold no blanks. Empty where Slurm does not know the job or answer."""
    try:
        words = ask("scontrol", "show", "job", "--oneliner", job, timeout_s=HURRIED_S).split()
    except SlurmError:
        return {}
    fields: dict[str, str] = {}
    for name, _, value in (word.partition("=") for word in words if "=" in word):
        fields.setdefault(name, value)
    return fields


def _jobs(jobs: set[str]) -> str:
    return f"--jobs={','.join(jobs)}"


# ----------------------------------------------------------------------------------------- questions on nodes and site


def check_srun(settings: dict[str, Any]) -> None:
    """Raises SlurmError for an option that srun here does not know; it reads them all before it tells its version."""
    if settings:
        ask("srun", *flags(options(settings)), "--version")


def partitions() -> set[str]:
    return set(ask("sinfo", "--noheader", "--format=%R").split())


@dataclass(frozen=True)
class NodeShape:
    """The least that any node of a partition has."""

    cpus: int
    memory_mb: int
    gpus: int


def node_shape(partition: str | None) -> NodeShape | None:
    """Of the nodes with GPUs in these partitions (None: in the default one); None where there are none."""
    rows = ask("sinfo", "--noheader", "--Node", "--format=%P|%c|%m|%G").splitlines()
    wanted = None if partition is None else set(partition.split(","))
    shapes = []
    for name, cpus, memory, resources in (row.strip().split("|") for row in rows):
        if name.endswith("*") if wanted is None else name.rstrip("*") in wanted:
            # "gpu:8", "gpu:h100:8(S:0-1),gpu:t4:2"
            gpus = sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", resources))
            shapes.append(NodeShape(int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus))
    shapes = [shape for shape in shapes if shape.gpus]
    if not shapes:
        return None
    return NodeShape(*(min(getattr(shape, name) for shape in shapes) for name in ("cpus", "memory_mb", "gpus")))


def hostnames(names: str) -> list[str]:
    """The nodes that a Slurm list such as n[08-10,12],m1 stands for; without scontrol, which containers lack."""
    nodes: list[str] = []
    for name in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", names):
        parts = re.split(r"\[([^\]]*)\]", name)  # every second one is a list of numbers
        choices = [_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
        nodes += ["".join(choice) for choice in itertools.product(*choices)]
    return nodes


def _numbers(ranges: str) -> list[str]:
    """Of 08-10,12: 08, 09, 10 and 12."""
    ends = [each.partition("-") for each in ranges.split(",")]
    return [f"{n:0{len(low)}}" for low, _, high in ends for n in range(int(low), int(high or low) + 1)]


def nodes_up(partition: str) -> set[str]:
    """The nodes of a partition that can run a job."""
    rows = ask("sinfo", "--noheader", "--Node", "--format=%N %t", f"--partition={partition}").splitlines()
    return {node for node, state in map(str.split, rows) if state.strip("*~#") not in DOWN}


def kill_wait_s() -> float:
    """Seconds between Slurm's SIGTERM and its SIGKILL; Slurm's default where it does not answer."""
    try:
        shown = ask("scontrol", "show", "config", timeout_s=HURRIED_S)
    except SlurmError:
        shown = ""
    values = [line.split("=")[1].split()[0] for line in shown.splitlines() if line.startswith("KillWait")]
    return float(values[0]) if values else 30.0


# --------------------------------------------------------------------------------------------------------------- orders


def cancel(job: str, signal: str | None = None) -> None:
    """End a job, or send its ranks a signal."""
    ask("scancel", *([f"--signal={signal}"] if signal else []), job, timeout_s=ORDER_S)


def requeue(job: str) -> None:
    ask("scontrol", "requeue", job, timeout_s=ORDER_S)


def exclude_nodes(job: str, nodes: str) -> None:
    ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}", timeout_s=ORDER_S)
