"""A run's directory before the run: snapshot of the config, whether a second launch may go on in it, job records."""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tptrain.config import Config, UserError, read_config, write_config
from tptrain.config.load import write_atomically
from tptrain.config.schema import MODEL_FILES
from tptrain.models.directory import PARTIAL, adopt
from tptrain.records.run_dir import CARD, VERIFICATION, newest_checkpoint, step_folder
from tptrain.watch.wire import make_secret


def claim(config: Config) -> Config | None:
    """Make the run directory and write the snapshot, or check that this launch goes on with the run that is there.

    Returns the snapshot that was there before. Raises UserError where the directory belongs to another config or holds
    something else.
    """
    run_dir = Path(config.run.dir)
    snapshot = run_dir / "config.yaml"
    if not snapshot.exists():
        if run_dir.exists() and (not run_dir.is_dir() or (_foreign(run_dir) and not _holds_import(run_dir, config))):
            raise UserError(f"run.dir={run_dir}: exists and is not a tptrain run. Choose another run.dir or run.name.")
        try:
            (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir={run_dir}: cannot be made ({error.strerror}). Choose another run.dir.") from error
        if config.model.path is not None:
            adopt(config)
        write_config(config, snapshot)
        make_secret(run_dir)
        return None
    before = read_config(snapshot)
    check_resume(before, config, run_dir)
    make_secret(run_dir)
    if before != config:  # the old one is kept: nothing saved is overwritten
        (run_dir / "logs").mkdir(exist_ok=True)
        snapshot.replace(run_dir / "logs" / f"config-until-{time.strftime('%Y%m%d-%H%M%S')}.yaml")
        write_config(config, snapshot)
    return before


@contextlib.contextmanager
def claimed(config: Config) -> Iterator[None]:
    """`claim` for a submission: where that fails, the directory is again as it was."""
    run_dir = Path(config.run.dir)
    fresh = not run_dir.exists()
    before = claim(config)
    try:
        yield
    except UserError:
        if fresh:
            shutil.rmtree(run_dir)
        elif before is not None:
            write_config(before, run_dir / "config.yaml")
        raise


def check_resume(before: Config, now: Config, run_dir: Path) -> None:
    """Raises UserError where `now` is not the run that `before` started."""
    old, new = _fixed_settings(before), _fixed_settings(now)
    for settings in (old, new):  # auto: of a run from before there was another
        settings["model.engine"] = settings["model.engine"].replace("auto", "native")
    for key in sorted(old):
        if old[key] != new[key]:
            untrained = newest_checkpoint(run_dir) is None
            raise UserError(
                f"run.dir={run_dir}: belongs to a run with {key}={old[key]}, and this launch has "
                f"{key}={new[key]}. Launch with the old value to resume it, or choose another run.dir or run.name"
                + (", or remove this one, which has no checkpoint yet." if untrained else ".")
            )
    if now.train.steps < before.train.steps:
        raise UserError(
            f"train.steps={now.train.steps}: fewer than the {before.train.steps} of the run in {run_dir}. "
            "A resumed run may only be made longer."
        )


def record_job(run_dir: Path, **job: Any) -> None:
    write_atomically(run_dir / "job.json", json.dumps(job))


def read_job(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "job.json").read_text())
    except (OSError, ValueError):
        return {}


def _holds_import(run_dir: Path, config: Config) -> bool:
    """Whether the directory is what `import` has made of this config's model."""
    snapshot = step_folder(run_dir / "checkpoints", 0) / "config.yaml"
    entries = {entry.name for entry in run_dir.iterdir()}
    return (
        snapshot.exists()
        and entries <= {"checkpoints", MODEL_FILES, "logs", VERIFICATION, CARD}
        and (read_config(snapshot).model.source == config.model.source)
    )


def _foreign(run_dir: Path) -> bool:
    return any(entry.name not in ("logs", ".lock", PARTIAL, VERIFICATION, CARD) for entry in run_dir.iterdir())


def _fixed_settings(node: Any, prefix: str = "") -> dict[str, Any]:
    """By dotted key, the settings that a resume may not change."""
    fixed: dict[str, Any] = {}
    for item in dataclasses.fields(node):
        key, value = f"{prefix}{item.name}", getattr(node, item.name)
        if item.metadata.get("may_change"):
            continue
        if dataclasses.is_dataclass(value):
            fixed |= _fixed_settings(value, f"{key}.")
        else:
            fixed[key] = value
    return fixed
