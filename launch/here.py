"""Ranks of a command on this machine: as many processes of it, without a supervisor."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from launch.place import free_port
from tptrain.config import Config, UserError

STARTED_BY = ("RANK", "SUBMITIT_LOCAL_NTASKS", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NODELIST")
HAS_SPOKEN = "TPTRAIN_HAS_SPOKEN"  # set for ranks by the command that starts them


def is_alone() -> bool:
    """Whether nobody has started this process as one of several ranks."""
    return not any(name in os.environ for name in STARTED_BY)


def speaks() -> bool:
    """Whether this process says what all ranks know: the command that starts them, else rank 0."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return HAS_SPOKEN not in os.environ and (is_alone() or rank == "0")


def ranks_to_start(config: Config) -> int:
    """How many ranks this process has to start, for a command that is a rank itself otherwise: 0 where it is one."""
    if config.cluster.nodes > 1:
        raise UserError(f"cluster.nodes={config.cluster.nodes}: on several nodes, start the ranks with srun.")
    count = config.cluster.tasks_per_node or config.parallel.tp
    return count if is_alone() and count > 1 else 0


def run_ranks(command: Sequence[str], count: int, verb: str) -> int:
    """Run so many processes of a Python command, of which the first has stdin; returns 0, or the exit code of the first
    that failed.
    """
    shared = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "TPTRAIN_NODE": os.uname().nodename,
        "TPTRAIN_ATTEMPT": f"{verb}-{os.getpid()}-0",
        HAS_SPOKEN: 1,
    }
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            stdin = None if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen([sys.executable, *command], env={**os.environ, **own}, stdin=stdin))
        while any(process.poll() is None for process in processes):
            failed = next((process.returncode for process in processes if process.poll()), 0)
            if failed:
                time.sleep(1)  # for its last words
                return _explained(failed)
            time.sleep(0.05)
        return _explained(next((process.returncode for process in processes if process.returncode), 0))
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in processes:
            process.wait()


def _explained(code: int) -> int:
    if code < 0:
        print(f"error: a rank was killed by signal {-code}: out of memory, most likely", file=sys.stderr)
    return code if code in (0, 2) else 1
