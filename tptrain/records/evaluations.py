"""What `eval` leaves of a run's checkpoint: the harness's results in a file, and a row for metrics.jsonl and wandb.

Only who holds the run's lock writes to its metrics.jsonl: while the run is trained, a row waits in a file of its own
until the trainer takes it. Imports no torch.
"""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

from tptrain.config.load import write_atomically
from tptrain.records.rows import Row, read_all, to_line
from tptrain.records.run_dir import step_folder

EVALS = "evals"  # below a run directory


def results_folder(run_dir: Path, step: int) -> Path:
    return step_folder(run_dir / EVALS, step)


def row_of(step: int, results: dict[str, Any], file: Path) -> Row:
    """A row for metrics.jsonl. `results`: of the harness, a task's figures by "metric,filter"."""
    tasks = {task: _figures(values) for task, values in results["results"].items()}
    return {"step": step, "eval": tasks, "time": time.time(), "results": str(file)}


def _figures(values: dict[str, Any]) -> dict[str, float | None]:
    figures = {}
    for key, value in values.items():
        metric, comma, name = key.partition(",")
        if comma and isinstance(value, int | float):  # not a task's title, nor an error that is "N/A"
            figures[metric if name == "none" else key] = float(value) if math.isfinite(value) else None
    return figures


def flat(row: Row) -> dict[str, float | None]:
    """A row's figures as wandb has them."""
    figures = {f"eval/{task}/{name}": value for task, values in row["eval"].items() for name, value in values.items()}
    return {"eval_step": row["step"], **figures}


def leave(run_dir: Path, row: Row) -> None:
    """For who next holds the run's lock to take."""
    (run_dir / EVALS).mkdir(exist_ok=True)
    write_atomically(run_dir / EVALS / f"waiting-{time.time_ns()}.json", json.dumps(row))


def take(run_dir: Path) -> list[Row]:
    """The rows that wait, which then no longer do. Only who holds the run's lock calls it."""
    rows = []
    for file in sorted((run_dir / EVALS).glob("waiting-*.json")):
        with contextlib.suppress(OSError, ValueError):
            rows.append(json.loads(file.read_text()))
            file.unlink()
    return rows


def add(path: Path, rows: list[Row]) -> None:
    """Add rows to a metrics.jsonl that nobody else writes to; a last line that a crash cut short is dropped."""
    everything = [*read_all(path), *rows]
    write_atomically(path, "".join(map(to_line, everything)))
