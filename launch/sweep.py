"""`launch -m a=1,2 b=3,4`: one run for every combination, in Hydra's sweep syntax, as one Slurm job array."""

import dataclasses
import time
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from tptrain.config import Config, UserError, load_config


def combinations(overrides: list[str]) -> list[list[str]]:
    """The override list of each run. Raises UserError for text that is no override."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        return [list(lines) for lines in BasicSweeper.split_arguments(parsed, None)[0]]
    except HydraException as error:
        raise UserError(
            f"{' '.join(overrides)!r}: {str(error).splitlines()[0]}. Write a=1,2 or a=range(1,4)."
        ) from error


def configs(overrides: list[str]) -> tuple[Path, list[Config]]:
    """The sweep's folder and the config of each run, in folders 0, 1, ... below it, all in one wandb group.

    Raises UserError for overrides that make no sweep.
    """
    varied = combinations(overrides)
    fixed = [line for line in overrides if line.startswith(("run.dir=", "run.name="))]
    if any("run." in key for lines in varied for key in lines if key.startswith("run.") and key not in fixed):
        raise UserError("run: a sweep names its runs itself: 0, 1, ... below run.dir. Give one run.name or run.dir.")
    first = load_config(varied[0])
    base = Path(first.run.dir)
    if not fixed:
        base = base.parent / f"sweep-{first.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    group = first.wandb.group or base.name
    runs = []
    for index, lines in enumerate(varied):
        others = [line for line in lines if not line.startswith(("run.dir=", "run.name=", "wandb.group="))]
        names = [f"run.dir='{base}/{index}'", f"run.name='{base.name}-{index}'", f"wandb.group='{group}'"]
        runs.append(load_config([*others, *names]))
    for config in runs[1:]:
        for item in dataclasses.fields(config.cluster):
            if getattr(config.cluster, item.name) != getattr(runs[0].cluster, item.name):
                raise UserError(
                    f"cluster.{item.name}: differs within the sweep, and its runs are one job array. Launch them apart."
                )
    return base, runs
