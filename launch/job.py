"""What runs on a node: one rank, under its supervisor."""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from launch.allocation import SlurmAllocation
from launch.place import find_place, on_slurm
from launch.slurm import SlurmError
from tptrain.config import Config, UserError, read_config
from tptrain.config.variables import IN_CUDA_RANK, exports
from tptrain.watch import files
from tptrain.watch.black_box import BlackBox
from tptrain.watch.outcome import Outcome
from tptrain.watch.place import Allocation, FlightRecorder, Place
from tptrain.watch.supervisor import Supervisor, end_with

# Trains as one rank: config, black box, allocation (on Slurm), the attempt's name; returns the exit code.
Entry = Callable[[Config, BlackBox, Allocation | None, str], int]


def command_time() -> float:
    """Unix time at which this process, the user's command, was started."""
    return psutil.Process().create_time()


def run_rank(entry: Entry, run_dir: str, variables: dict[str, str | None], launched: float = 0.0) -> int:
    """For submitit: set this rank's variables, run it on the run's snapshot and return its exit code.

    Under Slurm a failed rank ends its process with that code, upon which srun ends the others.
    """
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "SUBMITIT_LOCAL_JOB_ID" in os.environ:  # the pid of submitit's controller, which has started this process
        end_with(int(os.environ["SUBMITIT_LOCAL_JOB_ID"]), signal.SIGTERM)
    try:
        code = supervised(entry, read_config(Path(run_dir) / "config.yaml"), launched=launched)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = (Outcome.INFRA if isinstance(error, SlurmError) else Outcome.USER).exit_code
    if code and os.environ.get("SUBMITIT_EXECUTOR") != "local":
        sys.exit(code)
    return code


def supervised(entry: Entry, config: Config, launched: float = 0.0) -> int:
    """Run this process's rank under its supervisor. Raises UserError for a misplaced one."""
    place = find_place()
    allocation = SlurmAllocation() if on_slurm() else None
    supervisor = Supervisor(config, place, allocation, _flight_recorder(config, place))
    supervisor.box.state.launched = 0.0 if place.restart else launched  # a restart was not waited for since then
    return supervisor.run(lambda box: entry(config, box, allocation, place.attempt))


def _flight_recorder(config: Config, place: Place) -> FlightRecorder:
    """Have NCCL keep PyTorch's flight record, and write it where the other reports of a hang lie."""
    reports = files.folder_of(Path(config.run.dir), place.attempt)
    for_record, for_pipe = IN_CUDA_RANK
    record = os.environ.setdefault(for_record, str(reports / "nccl-trace-"))
    pipe = os.environ.setdefault(for_pipe, f"/tmp/tptrain-{place.attempt}-")
    return FlightRecorder(Path(f"{record}{place.rank}"), Path(f"{pipe}{place.rank}.pipe"))


def shell_lines(config: Config) -> list[str]:
    """The shell lines to run before the trainer: defaults, exported variables, then the user's own set-up."""
    lines = [f"export {name}=${{{name}:-{value}}}" for name, value in exports(config).items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in config.cluster.env.items()]
    return lines + list(config.cluster.setup)
