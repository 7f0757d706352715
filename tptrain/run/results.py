"""Where the scores of an evaluation go: a table, the harness's file, the run's metrics.jsonl and its wandb run."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from tptrain.config import Config, UserError, read_config
from tptrain.config.load import write_atomically
from tptrain.records import evaluations
from tptrain.records.run_dir import step_of
from tptrain.run.rank import run_lock


@dataclass(frozen=True)
class Target:
    """What is evaluated, and where that is noted."""

    name: str  # of the model
    file: Path | None  # as asked for
    config: Config | None  # of the run whose checkpoint it is
    step: int = 0

    @property
    def folder(self) -> Path:
        return Path.cwd() if self.config is None else evaluations.results_folder(Path(self.config.run.dir), self.step)


def target(config: Config, checkpoint: Path | None, out: str | None, words: Sequence[str]) -> Target:
    """`out`: the file of results, if one is named; `words`: the overrides. Raises UserError where nothing can be
    written there.
    """
    file = None if out is None else Path(out).absolute()
    if checkpoint is None:
        result = Target(str(config.model.path), file, None)
    else:
        run_dir = checkpoint.parent.parent
        snapshot = run_dir / "config.yaml"
        result = Target(str(checkpoint), file, _of_run(snapshot, config, words), step_of(checkpoint))
    place = result.folder if file is None else file.parent
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise UserError(f"out: results cannot be written to {place}. Give out=FILE.json.")
    return result


def _of_run(snapshot: Path, config: Config, words: Sequence[str]) -> Config | None:
    """The run's config, with its own settings of wandb unless there are others; None of a checkpoint without a run."""
    if not snapshot.exists():
        return None
    before = read_config(snapshot)
    other = any(word.startswith("wandb.") for word in words)
    run = replace(before.run, dir=str(snapshot.parent))  # it may have been moved
    return replace(before, run=run, wandb=config.wandb if other else before.wandb)


def show(results: dict[str, Any]) -> None:
    from lm_eval.utils import make_table

    print(make_table(results), flush=True)
    if results.get("groups"):
        print(make_table(results, "groups"), flush=True)


def write(target: Target, results: dict[str, Any]) -> None:
    """The files, as the harness writes them, and where there is a run, the row in its metrics.jsonl and wandb.

    Raises FileExistsError where samples are there already.
    """
    from lm_eval.utils import handle_non_serializable

    date = datetime.now().isoformat().replace(":", "-")  # as the harness names its files
    file = target.file or target.folder / f"results_{date}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    samples = results.get("samples", {})
    results = {key: value for key, value in results.items() if key != "samples"}
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_atomically(file, text)
    print(f"results: {file}", flush=True)
    if target.config is not None:
        _note(target.config, evaluations.row_of(target.step, results, file))
    for task, rows in samples.items():
        _write_samples(file.with_name(f"samples_{task.replace('/', '_')}_{date}.jsonl"), rows)


def _write_samples(file: Path, rows: list[dict[str, Any]]) -> None:
    """A line each, in which the harness makes texts of what a reader of data sets needs in one type."""
    from lm_eval.utils import handle_non_serializable, sanitize_list

    with file.open("x", encoding="utf-8") as lines:
        for row in rows:
            arguments = {
                f"gen_args_{i}": {f"arg_{j}": each for j, each in enumerate(args)}
                for i, args in enumerate(row["arguments"])
            }
            texts = {key: sanitize_list(row[key]) for key in ("resps", "filtered_resps")}
            line = row | texts | {"arguments": arguments, "target": str(row["target"])}
            lines.write(json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n")
    print(f"samples: {file}", flush=True)


def _note(config: Config, row: evaluations.Row) -> None:
    """In the run's metrics.jsonl and wandb: by the trainer, where the run is trained now."""
    run_dir = Path(config.run.dir)
    try:
        evaluations.leave(run_dir, row)
        with run_lock(run_dir):
            rows = evaluations.take(run_dir)
            evaluations.add(run_dir / "metrics.jsonl", rows)
            _log(config, rows)
    except UserError:
        print(f"{run_dir} is being trained: its metrics.jsonl and wandb get the scores with its next row", flush=True)
    except OSError as error:
        print(f"warning: {run_dir}: metrics.jsonl lacks the scores ({error.strerror})", file=sys.stderr, flush=True)


def _log(config: Config, rows: list[evaluations.Row]) -> None:
    from tptrain.train.wandb import Wandb

    if config.wandb.mode != "disabled" and (Path(config.run.dir) / "wandb" / "run-id").exists():
        wandb = Wandb(config, lambda text: print(text, flush=True), [])
        for row in rows:
            wandb.log(row)
        wandb.finish()
