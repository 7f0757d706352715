"""The results as tables (terminal and Markdown) and JSON. Imports no torch."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cells import CHECKED_STEPS, TOLERANCE
from .roster import ENTRIES, installed
from .summary import Cell, Row, one_line, ratio

HEADER = (
    "contestant",
    "tokens/s",
    "min to max",
    "of best peer",
    "of DTensor",
    "of 1 process",
    "MFU",
    "of GEMM limit",
    "in collectives",
    "first step",
    "memory",
    "losses",
)


@dataclass(frozen=True)
class Session:
    """What holds for all cells."""

    command: str
    date: str
    rounds: int
    warmup: int
    steps: int | None  # None: as the model says

    def facts(self) -> dict[str, Any]:
        packages = sorted({entry.package for entry in ENTRIES} | {"torch"})
        return {
            "command": self.command,
            "date": self.date,
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(psutil.virtual_memory().total / 2**30),
            "python": platform.python_version(),
            "versions": {package: installed(package) for package in packages},
            "rounds": self.rounds,
            "warmup_steps": self.warmup,
        }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cells_of(cell: Cell, row: Row) -> tuple[str, ...]:
    """The texts of a table row, in the order of HEADER."""
    if not row.rounds:
        return (row.entry.label, *["-"] * 10, f"did not run: {one_line(row.failure or '')}")
    speed = row.speed or 0.0

    def against(other: Row | None) -> str:
        quotient = ratio(row, other)
        return "-" if quotient is None else f"{quotient:.2f}"

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.0%}"

    losses = "-" if row.worst is None else f"{'agree' if cell.agrees(row) else 'DIFFER'} ({row.worst:.0e})"
    if row.failure:
        losses += f"; {len(row.rounds)} rounds only: {one_line(row.failure)}"
    return (
        row.entry.label,
        f"{speed:,.0f}",
        f"{min(row.speeds):,.0f} to {max(row.speeds):,.0f}",
        against(cell.best_peer()),
        against(cell.row_of("dtensor")),
        against(cell.row_of("threads")),
        percent(cell.mfu(row)),
        percent(cell.limit_share(row)),
        percent(row.communication),
        f"{row.rounds[0]['first_step_s']:.1f} s",
        f"{max(one['memory_gb'] for one in row.rounds):.2f} GiB",
        losses,
    )


def texts_of(cell: Cell) -> list[list[str]]:
    """The header and the rows, without the columns that have nothing."""
    columns = list(zip(HEADER, *(cells_of(cell, row) for row in cell.rows), strict=True))
    return [list(line) for line in zip(*(c for c in columns if {*c[1:]} != {"-"}), strict=True)]


def print_table(cell: Cell, console: Console) -> None:
    table = Table(title=cell.title, title_justify="left", title_style="bold")
    header, *rows = texts_of(cell)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if 0 < index < len(header) - 1 else "left", overflow="fold")
    for row, texts in zip(cell.rows, rows, strict=True):
        style = "bold green" if row.entry.kind == "ours" else "dim" if not row.rounds else None
        style = style if cell.agrees(row) else "bold red"
        table.add_row(*map(escape, texts), style=style)
    console.print(table)
    if warning := cell.disturbed():
        console.print(f"disturbed: {warning}", style="yellow")


def explanation() -> str:
    """What the columns mean."""
    tolerances = ", ".join(f"{value:g} in {name}" for name, value in TOLERANCE.items())
    return f"""\
The same weights and batches for all; on a CPU, ranks of one thread each over gloo.
- tokens/s: of the median step of a round; median, lowest and highest of the rounds
- of best peer, of DTensor, of 1 process: ratio of tokens/s, median of the rounds, to the fastest other framework,
  to PyTorch DTensor eager, and to tptrain in one process with two threads, which communicates nothing
- MFU: PaLM's FLOPs of a token over the device's peak, where that is known (no CPU's is)
- of GEMM limit: the time that the linears of one rank take alone, all ranks busy, over the time of the step
- in collectives: share of a profiled step with a gloo collective under way, waiting included
- first step: seconds from the launch to the end of the first step, in the first round, with nothing compiled before
- memory: resident peak of rank 0
- losses: largest relative distance from the first row's, first {CHECKED_STEPS} steps; they agree up to {tolerances}
"""


def markdown(cells: list[Cell], session: Session, chart: str | None) -> str:
    facts = session.facts()
    versions = ", ".join(f"{name} {quotient or 'not installed'}" for name, quotient in facts["versions"].items())
    lines = [
        "# Benchmark",
        "",
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gb']} GiB. Python {facts['python']}; {versions}. "
        f"{facts['date']}, {session.rounds} interleaved rounds.",
        "",
        f"`{session.command}`",
        "",
    ]
    if chart:
        lines += [f"![tokens per second]({chart})", ""]
    for cell in cells:
        header, *rows = texts_of(cell)
        rule = "| --- |" + " ---: |" * (len(header) - 2) + " --- |"
        lines += [f"## {cell.title}", "", "| " + " | ".join(header) + " |", rule]
        for row, quotient in zip(cell.rows, rows, strict=True):
            texts = [text.replace("|", "\\|") for text in quotient]
            texts[0] = f"**{texts[0]}**" if row.entry.kind == "ours" else texts[0]
            lines.append("| " + " | ".join(texts) + " |")
        lines.append("")
        if warning := cell.disturbed():
            lines += [f"Disturbed: {warning}.", ""]
    lines += [explanation()]
    return "\n".join(lines)


def raw(cells: list[Cell], session: Session) -> str:
    """All figures, as JSON."""
    sentences = [
        {
            "model": asdict(cell.model),
            "precision": cell.precision,
            "tolerance": TOLERANCE[cell.precision],
            "gemm_limit_s": cell.limits,
            "losses_held_against": cell.baseline,
            "rows": [asdict(row) | {"tokens_per_second": row.speed, "agrees": cell.agrees(row)} for row in cell.rows],
        }
        for cell in cells
    ]
    return json.dumps(session.facts() | {"cells": sentences}, indent=1)
