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

from tptrain.config.command_line import HELP, parser

if TYPE_CHECKING:
    from tptrain.config import Config


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
        "verify": verify,
        "import": import_model,
        "export": export_model,
    }
    if not given or given[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if given else 2
    if given[0] not in verbs:
        print(f"error: {given[0]}: no such verb. Known: {', '.join(verbs)}.", file=sys.stderr)
        return 2
    options = parser(given[0]).parse_intermixed_args(given[1:])
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
        _settle(config)
        check_cluster(config)
    cluster = configs[0].cluster
    if cluster.kind == "slurm":
        submit.prepare(configs, base)
    elif cluster.dry_run:
        raise UserError("cluster.dry_run: shows the sbatch script, and cluster=local has none. Use cluster=slurm.")
    _warn(configs, options.overrides)
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


def show_config(options: argparse.Namespace) -> int:
    from tptrain.config import check_cluster, load_config
    from tptrain.config.load import to_yaml

    config = load_config(options.overrides)
    _settle(config)
    check_cluster(config)
    _warn([config], options.overrides)
    print(to_yaml(config), end="")
    return 0


def show_plan(options: argparse.Namespace) -> int:
    from tptrain.config import load_config
    from tptrain.plan.report import plan

    config = load_config(options.overrides)
    _settle_engine(config)
    print(plan(config))
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
    _settle(config, say=False)  # every rank comes here

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
    _settle_engine(config)
    check_model(config, reads_weights=checkpoint is None)
    find_place()
    result, is_main = run(config, checkpoint)
    if is_main:
        print(json.dumps({"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}))
    return 0


def verify(options: argparse.Namespace) -> int:
    from launch.runs import find
    from launch.verify import verify
    from tptrain.config import UserError, load_config, validate
    from tptrain.records.run_dir import COMMIT

    overrides: list[str] = options.overrides
    if not overrides or "=" in overrides[0]:
        config = load_config([*overrides, "data.tokenizer=bytes"])  # no text is read
        validate(config)
        _settle_engine(config)
        return verify(config)
    if len(overrides) > 1:
        raise UserError(f"verify: {overrides[0]} is checked as it is, without {overrides[1]}.")
    from tptrain.checkpoint.integrity import check_all, checkpoints_of

    folder = Path(overrides[0]).absolute()
    if not (folder / COMMIT).exists() and not (folder / "checkpoints").is_dir():
        folder = find(overrides[0])
    whole = True
    for checkpoint, text, right in check_all(checkpoints_of(folder)):
        print(f"{checkpoint.name}: {text}", flush=True)
        whole = whole and right
    return 0 if whole else 1


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
    _settle_engine(config)
    check_tp(checked_spec(config.model), config.parallel.tp)
    if config.model.engine == "native":
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


def _settle(config: "Config", say: bool = True) -> None:
    """Check what needs neither a machine nor data, and fill in what follows from the model. Raises UserError."""
    from tptrain.config import validate
    from tptrain.models.check import check_model
    from tptrain.models.cost import checkpoint_every

    validate(config)
    _settle_engine(config, say)
    check_model(config)
    config.checkpoint.every = checkpoint_every(config)


def _settle_engine(config: "Config", say: bool = True) -> None:
    """Decide who computes the model, and say so where there was a choice. Raises UserError."""
    from tptrain.models.sizes import settle_engine

    if (line := settle_engine(config)) and say:
        print(line, file=sys.stderr)


def _warn(configs: "list[Config]", overrides: list[str]) -> None:
    from tptrain.config.advice import advice

    for line in advice(configs, overrides):
        print(f"warning: {line}", file=sys.stderr)


def _check_free(folder: Path) -> None:
    """Raises UserError while another process trains in the folder."""
    from tptrain.run.rank import run_lock

    if (folder / ".lock").exists():
        with run_lock(folder):
            pass


if __name__ == "__main__":
    sys.exit(main())
