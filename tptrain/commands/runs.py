"""Runs and their jobs: launch, train, status, logs, cancel."""

import argparse
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.commands.settled import settle, warn

if TYPE_CHECKING:
    from tptrain.config import Config


def launch(options: argparse.Namespace) -> int:
    from launch import planned, run_dir, submit, sweep
    from launch.verify import check_proposed
    from tptrain.config import UserError, check_cluster, check_data, load_config
    from tptrain.run.rank import run

    if options.multirun:
        base, configs = sweep.configs(options.overrides)
    else:
        configs = [load_config(options.overrides)]
        base = Path(configs[0].run.dir)
    for config in configs:
        check_data(config)
        settle(config)
        check_cluster(config)
    cluster = configs[0].cluster
    if cluster.kind == "slurm":
        submit.prepare(configs, base)
    elif cluster.dry_run:
        raise UserError("cluster.dry_run: shows the sbatch script, and cluster=local has none. Use cluster=slurm.")
    warn(configs, options.overrides)
    for config in configs:
        check_proposed(config)
        if config.model.engine == "transformers":
            print(planned.summary(config), flush=True)
    if cluster.dry_run:
        print(submit.script(configs, base))
        return 0
    if cluster.kind == "local":
        return _launch_here(configs)
    with ExitStack() as stack:
        for config in configs:
            stack.enter_context(_only_launch(config))
            stack.enter_context(run_dir.claimed(config))
        job = submit.submit(configs, base, run)
    if len(configs) > 1:
        print(f"submitted Slurm job array {job} of {len(configs)} runs, in {base}/0 to {base}/{len(configs) - 1}")
    else:
        print(f"submitted Slurm job {job}, run directory {configs[0].run.dir}")
    command, name = "python -m tptrain", shlex.quote(configs[0].run.dir)
    every = f"{shlex.quote(str(base))}/[0-9]*" if len(configs) > 1 else name
    print(
        f"  how it stands:        {command} status {every}\n"
        f"  its output:           {command} logs -f {name}\n"
        f"  stop it:              {command} cancel {name}\n"
        f"  resume it afterwards: the same launch with run.dir={shlex.quote(str(base))}"
    )
    return 0


@contextmanager
def _only_launch(config: "Config") -> Iterator[None]:
    """One launch of a run at a time, and none while it waits or runs. Raises UserError."""
    import filelock

    from launch import runs
    from tptrain.config import UserError

    folder = Path(config.run.dir)
    lock = Path(f"{folder}.launching")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(lock, timeout=0):
            try:
                runs.check_not_running(folder)
                _check_free(folder)
                yield
            finally:
                lock.unlink(missing_ok=True)
    except filelock.Timeout as error:
        raise UserError(f"run.dir={folder}: another launch of it is under way. Wait for that one.") from error


def _launch_here(configs: "list[Config]") -> int:
    """One run after the other, followed live; Ctrl-C ends the run and the sweep."""
    from launch import local, run_dir
    from tptrain.run.rank import run

    worst = 0
    for config in configs:
        folder = Path(config.run.dir)
        with local.interrupts() as presses:
            with _only_launch(config), run_dir.claimed(config):
                job = local.submit(config, run)
            print(f"job {job.job_id} on this machine, run directory {folder}", flush=True)
            code = local.Follower(config, job, presses).follow()
        worst = max(worst, code)
        if code == 0:
            print(f"checkpoints: {folder}/checkpoints\nmetrics:     {folder}/metrics.jsonl")
        if presses:
            break
    return worst


def status(options: argparse.Namespace) -> int:
    from launch import runs

    runs.status([runs.find(name) for name in options.runs] or runs.all_runs(Path("runs")))
    return 0


def logs(options: argparse.Namespace) -> int:
    from launch import runs

    runs.logs(runs.find(options.run), options.rank, options.follow)
    return 0


def cancel(options: argparse.Namespace) -> int:
    from launch import runs

    return runs.cancel(runs.find(options.run))


def train(options: argparse.Namespace) -> int:
    from launch import run_dir
    from launch.job import supervised
    from tptrain.config import UserError, check_data, load_config, read_config
    from tptrain.run.rank import run

    overrides: list[str] = options.overrides
    if len(overrides) == 1 and overrides[0].startswith("run.dir="):
        snapshot = Path(overrides[0].removeprefix("run.dir=")) / "config.yaml"
        if snapshot.exists():
            return _exit_code(supervised(run, read_config(snapshot)))
    if not any(override.startswith(("run.dir=", "run.name=")) for override in overrides):
        raise UserError("run.name: not set, and the ranks must agree on it. Give run.name or run.dir.")
    config = load_config(overrides)
    check_data(config)
    settle(config, say=False)  # every rank comes here

    def claim() -> None:
        _check_free(Path(config.run.dir))
        run_dir.claim(config)

    return _exit_code(supervised(partial(run, claim=claim), config))


def _check_free(folder: Path) -> None:
    """Raises UserError while another process trains in the folder."""
    from tptrain.run.rank import run_lock

    if (folder / ".lock").exists():
        with run_lock(folder):
            pass


def _exit_code(rank: int) -> int:
    """A command's, out of a rank's, which tells the job script more."""
    return rank if rank in (0, 2) else 1
