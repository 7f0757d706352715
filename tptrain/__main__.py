"""The commands: `python -m tptrain VERB [hydra overrides]`. The one file that knows both the trainer and `launch`."""

import argparse
import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tptrain.config import Config

HELP = """\
Tensor-parallel training of transformer language models on Slurm clusters.

verbs:
  launch   check the config, submit the run to this machine or to Slurm, follow it if it is local
  train    run one rank here, under torchrun, under srun, or alone
  config   print the resolved, checked config

overrides are Hydra's:
  python -m tptrain launch parallel.tp=2
  python -m tptrain launch model=llama3_8b parallel.tp=8 train=pretrain cluster=slurm cluster.gpus_per_node=8
  python -m tptrain launch data=files 'data.files=[corpus/*.jsonl]' run.name=mine
  torchrun --nproc-per-node 2 -m tptrain train parallel.tp=2 run.name=mine
  python -m tptrain config model=qwen3_8b

`launch` again with the same run.name or run.dir resumes the run.
exit codes: 0 done, 2 a mistake in what was asked for, 1 anything else
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tptrain", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = {"launch": launch, "train": train, "config": show_config}
    parser.add_argument("verb", choices=verbs, metavar="VERB", help=" | ".join(verbs))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args(arguments)
    from tptrain.config import UserError

    try:
        return verbs[asked.verb](asked.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


def show_config(overrides: list[str]) -> int:
    from tptrain.config.load import to_yaml

    print(to_yaml(_launchable(overrides)), end="")
    return 0


def launch(overrides: list[str]) -> int:
    from launch import local, run_dir, slurm
    from tptrain.rank import run

    config = _launchable(overrides)
    on_slurm = config.cluster.kind == "slurm"
    if on_slurm:
        slurm.check(config)
    folder = Path(config.run.dir or ".")
    slurm.check_not_queued(folder)
    _check_free(folder)
    with run_dir.claimed(config):
        if not on_slurm:
            job = local.submit(config, run)
            print(f"job {job.job_id} on this machine, run directory {folder}", flush=True)
            code = local.Follower(config, job).follow()
            if code == 0:
                print(f"checkpoints: {folder}/checkpoints\nmetrics:     {folder}/metrics.jsonl")
            return code
        job = slurm.submit(config, run)
    print(
        f"submitted Slurm job {job.job_id}, run directory {folder}\n"
        f"  its place in the queue:  squeue -j {job.job_id}\n"
        f"  its output, once it runs: tail -F {folder}/logs/{job.job_id}_0_log.out\n"
        f"  stop it:                 scancel {job.job_id}\n"
        f"  resume it afterwards:    the same launch with run.dir={folder}"
    )
    return 0


def train(overrides: list[str]) -> int:
    from launch import run_dir
    from launch.job import supervised
    from tptrain.config import UserError, load_config, read_config, validate
    from tptrain.rank import run

    if len(overrides) == 1 and overrides[0].startswith("run.dir="):
        snapshot = Path(overrides[0].removeprefix("run.dir=")) / "config.yaml"
        if snapshot.exists():
            return supervised(run, read_config(snapshot))
    if not any(override.startswith(("run.dir=", "run.name=")) for override in overrides):
        raise UserError("run.name: not set, and the ranks must agree on it. Give run.name or run.dir.")
    config = load_config(overrides)
    validate(config)

    def claim() -> None:
        _check_free(Path(config.run.dir or "."))
        run_dir.claim(config)

    return supervised(run, config, claim)


def _launchable(overrides: list[str]) -> "Config":
    """The composed config, with every check that needs no machine. Raises UserError."""
    from tptrain.config import check_cluster, load_config, validate

    config = load_config(overrides)
    validate(config)
    check_cluster(config)
    return config


def _check_free(folder: Path) -> None:
    """Raises UserError while another process trains in the folder."""
    from tptrain.rank import run_lock

    if (folder / ".lock").exists():
        with run_lock(folder):
            pass


if __name__ == "__main__":
    sys.exit(main())
