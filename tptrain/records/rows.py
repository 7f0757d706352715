"""Rows of metrics.jsonl, one for each logged step: reading them, and how a console shows them. Imports no torch.

Between them may stand rows of evaluations (records/evaluations.py), each with the step of the checkpoint that it is of.
"""

import json
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

# A figure that is no finite number is None in the file, as JSON has none. Beside figures a row may have "samples": a
# list of {"prompt": ..., "text": ...}.
Row = dict[str, Any]
TAIL_BYTES = 8192  # more than a row without samples takes


def parse_row(line: str) -> Row | None:
    """None for a line that is no row of training: an evaluation's, or the last one where a crash cut it short."""
    row = _parse(line)
    return None if row is None or is_evaluation(row) else row


def is_evaluation(row: Row) -> bool:
    return "eval" in row


def read_rows(path: Path) -> list[Row]:
    """The rows of training of a metrics.jsonl, up to the first line that is no row."""
    return [row for row in read_all(path) if not is_evaluation(row)]


def read_all(path: Path) -> list[Row]:
    """`read_rows`, and the rows of evaluations."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        if (row := _parse(line)) is None:
            break
        rows.append(row)
    return rows


def last_row(path: Path) -> Row | None:
    """The newest row of training of a metrics.jsonl, out of the file's tail; of so much of it as the row takes."""
    tail = TAIL_BYTES
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while True:
                file.seek(max(0, end - tail))
                lines = file.read(tail).decode(errors="replace").splitlines()
                row = next((row for line in reversed(lines) if (row := parse_row(line)) is not None), None)
                if row is not None or tail >= end:
                    return row
                tail *= 8
    except OSError:
        return None


def to_line(row: Row) -> str:
    """All in ASCII, so that whatever is in a text, the row is one line for everybody who reads it."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def short(row: Row) -> str:
    return f"loss {_number(row['loss']):.4f}, {row['tokens_per_second']:,.0f} tok/s"


def figures(row: Row) -> list[str]:
    return [
        f"loss {_number(row['loss']):.4f}",
        f"lr {row['lr']:.2e}",
        f"grad_norm {_number(row['grad_norm']):.3f}",
        f"{row['tokens_per_second']:,.0f} tok/s",
    ]


def describe(row: Row, steps: int) -> str:
    """One line of the console; `steps`: of the whole run."""
    left = timedelta(seconds=math.ceil((steps - row["step"]) * row["step_time_s"]))
    parts = [f"step {row['step']:>{len(str(steps))}}/{steps}", *figures(row), f"eta {left}"]
    if "val_loss" in row:
        parts.append(f"val_loss {_number(row['val_loss']):.4f}")
    return "  ".join(parts)


def _number(figure: float | None) -> float:
    return math.nan if figure is None else figure
