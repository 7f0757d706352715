"""`cluster=slurm` of a command that answers on the terminal: its ranks as a Slurm job under srun, in the foreground."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launch import container, slurm, submit
from launch.here import HAS_SPOKEN
from launch.job import shell_lines
from tptrain.config import Config, check_cluster


def prepare(config: Config, base: Path) -> None:
    """Whether Slurm is here and knows what is asked of it. Raises UserError."""
    check_cluster(config)
    submit.prepare([config], base)
    container.make_folders([config])


def replace_by_srun(config: Config, base: Path, verb: str, words: Sequence[str]) -> NoReturn:
    """Become an srun whose ranks run `tptrain VERB WORDS`; its exit code is the command's.

    `base`: the run that they read, for a container to show.
    """
    sys.stdout.flush()
    os.environ[HAS_SPOKEN] = "1"
    line = command(config, base, verb, words)
    os.execvp(line[0], line)


def command(config: Config, base: Path, verb: str, words: Sequence[str]) -> list[str]:
    """The words of that srun."""
    cluster = config.cluster
    asked = {
        "job_name": f"tptrain-{verb}",
        **submit.allocation(cluster),
        "time": cluster.time,
        "mem": cluster.mem,
        "kill_on_bad_exit": 1,  # a rank that fails must not leave the others waiting
        "unbuffered": True,
    }
    options = slurm.options(asked | cluster.sbatch) | container.srun_options([config], base)
    python = cluster.python or sys.executable
    script = "\n".join(["set -e", *shell_lines(config), *container.shell_lines(cluster), f'exec {python} "$@"'])
    kept = [word for word in words if not word.startswith(("cluster=", "cluster."))]
    return ["srun", *slurm.flags(options), "bash", "-c", script, "bash", "-m", "tptrain", verb, *kept]
