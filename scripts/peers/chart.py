# pyright: basic, reportMissingImports=false
"""The chart: tokens per second as horizontal bars, a panel for each cell. Imports no torch."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .summary import Cell

COLOURS = {"ours": "#1f6f54", "peer": "#a9b4bf", "reference": "#e0c27a"}


def draw(cells: list[Cell], caption: str, path: Path) -> None:
    columns = min(2, len(cells))
    lines = -(-len(cells) // columns)
    bars = max(len(cell.rows) for cell in cells)
    size = (6.2 * columns, (0.34 * bars + 1.1) * lines + 0.4)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for index, panel in enumerate(axes.flat):
        if index < len(cells):
            _panel(panel, cells[index])
        else:
            panel.axis("off")
    figure.supxlabel(caption, fontsize=7, color="#555555")
    figure.savefig(path)
    plt.close(figure)


def _panel(panel: Axes, cell: Cell) -> None:
    """Fastest on top; a contestant that did not run has a label and no bar."""
    rows = sorted(cell.rows, key=lambda row: row.speed or 0.0)
    top = max((max(row.speeds, default=0.0) for row in rows), default=1.0) or 1.0
    for place, row in enumerate(rows):
        speed = row.speed or 0.0
        panel.barh(place, speed, color=COLOURS[row.entry.kind], height=0.72)
        if row.speeds:
            panel.plot([min(row.speeds), max(row.speeds)], [place, place], color="#333333", linewidth=1)
        text = f"{speed:,.0f}" if row.speeds else "did not run"
        panel.text(max(row.speeds, default=0.0) + 0.015 * top, place, text, va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [row.entry.label for row in rows], fontsize=8)
    for tick, row in zip(panel.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row.entry.kind == "ours" else "normal")
    panel.set_xlim(0, 1.18 * top)
    panel.set_xlabel("tokens per second (line: lowest to highest round)", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)
    panel.set_title(f"{cell.model.name}, {cell.precision}", fontsize=10, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
