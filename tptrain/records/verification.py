"""What `verify` has seen of a model, as JSON for programs and as a card in Markdown for people. Imports no torch."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain import __version__
from tptrain.config.load import write_atomically
from tptrain.records.run_dir import CARD, VERIFICATION

RESULT = "result.json"  # what the ranks leave for `verify`, which makes the others of it
# Kinds of items by `what`, as the card's rows have them.
ROWS = {
    "at the start": "weights at the start",
    "output": "outputs of modules",
    "of each token": "loss of each token",
    "buffer": "buffers that follow from the config",
    "input gradient": "gradients to modules' inputs",
    "output gradient": "gradients to modules' outputs",
    "branch's gradient": "gradients to modules' inputs",
    "gradient": "gradients of parameters",
    "before clipping": "gradient norm",
    "after the step": "parameters after an AdamW step",
}


@dataclass(frozen=True)
class Row:
    """Items of one kind, by the one that is nearest to what is allowed, or farthest beyond."""

    name: str
    count: int  # of tensors
    module: str
    distance: float
    allowed: float


@dataclass(frozen=True)
class Verification:
    """`facts`: what was compared and where, in words; `items`: as verify/compare.py has them."""

    facts: dict[str, Any]
    items: list[dict[str, Any]]

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """Items beyond what is allowed, the first of them first."""
        return [item for item in self.items if not item["distance"] <= item["allowed"]]

    @property
    def rows(self) -> list[Row]:
        rows: dict[str, list[dict[str, Any]]] = {}
        for item in self.items:
            rows.setdefault(ROWS[item["what"]], []).append(item)
        return [self._row(name, items) for name, items in rows.items()]

    @staticmethod
    def _row(name: str, items: list[dict[str, Any]]) -> Row:
        worst = max(items, key=lambda item: item["distance"] / (item["allowed"] or 1.0))
        count = len({(item["module"], item["what"]) for item in items})
        return Row(name, count, worst["module"], worst["distance"], worst["allowed"])

    @property
    def verdict(self) -> str:
        """One sentence."""
        wrong = self.wrong
        if not wrong:
            other = "Transformers gives in one process" if "plan" in self.facts else "one rank gives"
            return f"right: {self.facts['topology']} gives what {other}"
        first = wrong[0]
        off = "no number" if math.isinf(first["distance"]) else f"{100 * first['distance']:.2g}% off"
        more = len({(item["module"], item["what"]) for item in wrong}) - 1
        what = {"gradient": "its gradient", "output": "its output"}.get(first["what"], first["what"])
        return f"wrong: {first['module']}: {what} is {off} on rank {first['rank']}: {first['kind']}" + (
            f". {more} more tensors differ" if more else ""
        )

    def card(self) -> str:
        """Markdown."""
        facts = [f"- {name}: {value}" for name, value in self.facts.items() if name != "time"]
        table = ["| compared | tensors | worst | distance | allowed |", "| --- | ---: | --- | ---: | ---: |"]
        table += [
            f"| {row.name} | {row.count} | {row.module} | {row.distance:.1e} | {row.allowed:.1e} |" for row in self.rows
        ]
        day = time.strftime("%Y-%m-%d", time.localtime(self.facts["time"]))
        return "\n".join(
            [
                "## Verification of training",
                "",
                f"On {day} tptrain {__version__} ran a step of this model on many ranks and on one, and compared.",
                f"The result is **{self.verdict}**.",
                "",
                *facts,
                "",
                *table,
                "",
                "Distances are relative 2-norms, by the rank that is farthest from the reference.",
                "",
            ]
        )

    def write(self, folder: Path) -> None:
        content = {"verdict": "wrong" if self.wrong else "right", "text": self.verdict} | self.facts
        content["items"] = self.items
        write_atomically(folder / VERIFICATION, json.dumps(content, indent=1) + "\n")
        write_atomically(folder / CARD, self.card())
