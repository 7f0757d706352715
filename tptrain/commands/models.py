"""What is said of a model, proved of it, or made of it: config, plan, verify, import, export."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.commands.settled import settle, settle_engine, warn

if TYPE_CHECKING:
    pass


def show_config(options: argparse.Namespace) -> int:
    from tptrain.config import check_cluster, load_config
    from tptrain.config.load import to_yaml

    config = load_config(options.overrides)
    settle(config)
    check_cluster(config)
    warn([config], options.overrides)
    print(to_yaml(config), end="")
    return 0


def show_plan(options: argparse.Namespace) -> int:
    from tptrain.config import load_config
    from tptrain.plan.report import plan

    config = load_config([*options.overrides, "data.tokenizer=bytes"])  # no text is read, and no weight
    settle_engine(config, weights=False)
    print(plan(config))
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
        settle_engine(config, weights=config.verify.reads_weights)
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
    from launch.here import ranks_to_start, run_ranks, speaks
    from launch.place import find_place
    from tptrain.config import UserError, load_config, validate
    from tptrain.models.check import check_tp, checked_spec
    from tptrain.models.directory import check_weights
    from tptrain.run.convert import run

    out = Path(options.out).absolute()
    config = load_config(["model=hf", f"model.path='{options.model}'", f"run.dir='{out}'", *options.overrides])
    if out.exists():
        raise UserError(f"{out}: exists already, and nothing is written over. Choose another name.")
    validate(config)
    settle_engine(config, say=speaks())
    check_tp(checked_spec(config.model), config.parallel.tp)
    if config.model.engine == "native":
        check_weights(config.model)
    if count := ranks_to_start(config):
        return run_ranks(["-m", "tptrain", "import", options.model, options.out, *options.overrides], count, "import")
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
