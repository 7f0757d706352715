"""What submitit runs on a node: one rank."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tptrain.config import Config, UserError, read_config

Entry = Callable[[Config], int]  # runs a rank, returns its exit code


def run_rank(entry: Entry, run_dir: str, variables: dict[str, str | None]) -> int:
    """Set this rank's variables, call the trainer on the run's snapshot and return its exit code.

    Under Slurm a failed rank ends its process with that code, upon which srun ends the others.
    """
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    local = os.environ.get("SUBMITIT_EXECUTOR") == "local"
    if local:  # under Slurm the mesh reads srun's own variables
        _like_torchrun()
    try:
        code = entry(read_config(Path(run_dir) / "config.yaml"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    if code and not local:
        sys.exit(code)
    return code


def _like_torchrun() -> None:
    env: Any = os.environ
    world = env["SUBMITIT_LOCAL_NTASKS"]
    env["RANK"] = env["LOCAL_RANK"] = env["SUBMITIT_LOCAL_GLOBALID"]
    env["WORLD_SIZE"] = env["LOCAL_WORLD_SIZE"] = world
    env["MASTER_ADDR"] = "127.0.0.1"


def shell_lines(config: Config) -> list[str]:
    """The shell lines to run before the trainer: exported variables, then the user's own set-up."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in config.cluster.env.items()]
    return exports + list(config.cluster.setup)
