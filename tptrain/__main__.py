"""The commands: `python -m tptrain VERB ...`. The one file that knows both the trainer and `launch`."""

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tptrain.config import Config

HELP = """\
Tensor-parallel training of transformer language models on Slurm clusters.

  python -m tptrain VERB [arguments]        python -m tptrain VERB --help

runs:
  launch [-m] [key=value ...]   check the config, submit the run to this machine or to Slurm; -m: a sweep, a=1,2 b=3,4
  status [RUN ...]              how runs stand: job, state, step, loss, tokens/s, restarts, last checkpoint
  logs RUN [-f] [--rank N]      what a rank of the run's last job printed; -f follows it
  cancel RUN                    stop a run for good, with a checkpoint
without a job:
  config [key=value ...]        print the resolved, checked config
  plan [key=value ...]          legal TP degrees, memory a rank, traffic and operations of a step; needs no GPU
  train [key=value ...]         run one rank here, under torchrun, under srun, or alone
  eval [RUN] [key=value ...]    perplexity on data=..., of a run, a checkpoint or model=hf; alone, under torchrun, srun
  import DIR OUT [key=value ...]  a Hugging Face directory as a checkpoint; alone, under torchrun, srun
  export RUN OUT                a run's newest checkpoint, or a checkpoint, as a Hugging Face directory

overrides are Hydra's:
  python -m tptrain launch model=hf model.path=Qwen/Qwen3-8B parallel.tp=4 data=files 'data.files=[corpus/*.jsonl]'
  python -m tptrain plan model=llama3_8b train=pretrain cluster.nodes=2 cluster.tasks_per_node=8
  torchrun --nproc-per-node 2 -m tptrain train parallel.tp=2 run.name=mine

`launch` again with the same run.name or run.dir resumes the run. RUN is a run's name below runs/, or its directory.
exit codes: 0 done, 2 a mistake in what was asked for, 1 anything else
"""


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    verbs = {
        "launch": launch,
        "status": status,
        "logs": logs,
        "cancel": cancel,
        "config": show_config,
        "plan": show_plan,
        "train": train,
        "eval": evaluate,
        "import": import_model,
        "export": export_model,
    }
    if not given or given[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if given else 2
    if given[0] not in verbs:
        print(f"error: {given[0]}: no such verb. Known: {', '.join(verbs)}.", file=sys.stderr)
        return 2
    options = _parser(given[0]).parse_intermixed_args(given[1:])
    from tptrain.config import UserError

    try:
        return verbs[given[0]](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `logs RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m tptrain {verb}", epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if verb in ("logs", "cancel"):
        parser.add_argument("run", metavar="RUN")
    elif verb == "export":
        parser.add_argument("run", metavar="RUN", help="or a checkpoint's directory")
        parser.add_argument("out", metavar="OUT", help="a directory that does not exist yet")
    elif verb == "status":
        parser.add_argument("runs", nargs="*", metavar="RUN", help="default: all below runs/")
    elif verb == "import":
        parser.add_argument("model", metavar="DIR", help="a Hugging Face directory, or a name of the hub")
        parser.add_argument("out", metavar="OUT", help="a directory that does not exist yet")
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="parallel.tp=N, as many ranks as there are"
        )
    else:
        parser.add_argument("overrides", nargs="*", metavar="key=value")
    if verb == "launch":
        parser.add_argument(
            "-m", "--multirun", action="store_true", help="one run for every combination of a=1,2 b=3,4"
        )
    if verb == "logs":
        parser.add_argument("-f", "--follow", action="store_true", help="go on as it grows, until the job ends")
        parser.add_argument("--rank", type=int, default=0, help="default: 0, the one that tells progress")
    return parser


def launch(options: argparse.Namespace) -> int:
    from launch import run_dir, submit, sweep
    from tptrain.config import UserError, check_cluster, check_data, load_config
    from tptrain.run.rank import run

    if options.multirun:
        base, configs = sweep.configs(options.overrides)
    else:
        configs = [load_config(options.overrides)]
        base = Path(configs[0].run.dir)
    for config in configs:
        check_data(config)
        _settle(config)
        check_cluster(config)
    cluster = configs[0].cluster
    if cluster.kind == "slurm":
        submit.prepare(configs)
        if cluster.dry_run:
            print(submit.script(configs, base))
            return 0
    elif cluster.dry_run:
        raise UserError("cluster.dry_run: shows the sbatch script, and cluster=local has none. Use cluster=slurm.")
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


def show_config(options: argparse.Namespace) -> int:
    from tptrain.config import check_cluster, load_config
    from tptrain.config.load import to_yaml

    config = load_config(options.overrides)
    _settle(config)
    check_cluster(config)
    print(to_yaml(config), end="")
    return 0


def show_plan(options: argparse.Namespace) -> int:
    from tptrain.config import load_config
    from tptrain.plan.report import plan

    print(plan(load_config(options.overrides)))
    return 0


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
    _settle(config)

    def claim() -> None:
        _check_free(Path(config.run.dir))
        run_dir.claim(config)

    return _exit_code(supervised(partial(run, claim=claim), config))


def evaluate(options: argparse.Namespace) -> int:
    import json

    from launch.place import find_place
    from launch.runs import find_checkpoint
    from tptrain.config import UserError, check_data, load_config, validate
    from tptrain.config.load import settings_of
    from tptrain.models.check import check_model
    from tptrain.run.evaluate import run

    overrides: list[str] = options.overrides
    named = bool(overrides) and "=" not in overrides[0]
    config = load_config(overrides[1:] if named else overrides)
    checkpoint = find_checkpoint(overrides[0]) if named else None
    if checkpoint is not None:
        config = settings_of(checkpoint, config, overrides[1:])
    elif config.model.path is None:
        raise UserError("eval: name a run or a checkpoint, or set model=hf model.path=DIR.")
    config.run.dir = str(Path(config.data.cache_dir) / "eval")  # the same on every rank; nothing is written there
    check_data(config)
    validate(config)
    check_model(config, reads_weights=checkpoint is None)
    find_place()
    result, is_main = run(config, checkpoint)
    if is_main:
        print(json.dumps({"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}))
    return 0


def import_model(options: argparse.Namespace) -> int:
    from launch.place import find_place
    from tptrain.config import UserError, load_config, validate
    from tptrain.models.check import check_tp, checked_spec
    from tptrain.models.directory import tensors
    from tptrain.run.convert import run

    out = Path(options.out).absolute()
    config = load_config(["model=hf", f"model.path='{options.model}'", f"run.dir='{out}'", *options.overrides])
    if out.exists():
        raise UserError(f"{out}: exists already, and nothing is written over. Choose another name.")
    validate(config)
    check_tp(checked_spec(config.model), config.parallel.tp)
    tensors(config.model)
    find_place()
    if run(config):
        print(f"imported {config.model.path} to {out}")
    return 0


def export_model(options: argparse.Namespace) -> int:
    from launch.runs import find_checkpoint
    from tptrain.checkpoint.export import export

    checkpoint, out = find_checkpoint(options.run), Path(options.out).absolute()
    export(checkpoint, out)
    print(f"exported {checkpoint} to {out}")
    return 0


def _exit_code(rank: int) -> int:
    """A command's, out of a rank's, which tells the job script more."""
    return rank if rank in (0, 2) else 1


def _settle(config: "Config") -> None:
    """Check what needs neither a machine nor data, and fill in what follows from the model. Raises UserError."""
    from tptrain.config import validate
    from tptrain.models.check import check_model
    from tptrain.models.cost import checkpoint_every

    validate(config)
    check_model(config)
    config.checkpoint.every = checkpoint_every(config)


def _check_free(folder: Path) -> None:
    """Raises UserError while another process trains in the folder."""
    from tptrain.run.rank import run_lock

    if (folder / ".lock").exists():
        with run_lock(folder):
            pass


if __name__ == "__main__":
    sys.exit(main())
