"""The page docs/families.md, and a line of the terminal, out of what every family did."""

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version

from tests.zoo_step import ALLOWED, FLOOR, Distance

INTRODUCTION = """\
# Transformers' families, cut by tensor parallelism

Of each causal family of Transformers that has a tensor-parallel plan (`base_model_tp_plan` of its config, or of the config of its
text model) a small random model is built, with all its kinds of layers ([tests/zoo.py](../tests/zoo.py)): 64 wide, 8 heads, 2 KV
heads where the family has grouped queries, 4 experts, no parameter left at 0 or 1. One process computes the loss, the logits and
the gradient of each parameter of a batch of 2 x 24 tokens in float32, with eager attention. Then ranks that talk over gloo
load the saved model and compute the same: with Transformers' own tensor parallelism (`DistributedConfig(tp_size=...)`), and with tptrain.

- **right**: the loss, and the gradient of each parameter on each rank, gathered to a whole one where it is cut, are within
  {allowed} of those of one process, relative. The figure is that of the worst gradient, as the 2-norm of the difference over that of the gradient,
  or over {floor} of the norm of all gradients if that is more.
- **wrong**: one of them is not. Which one, and how far, is said below the table.
- **crashes**: a rank raised an error, died or gave no answer. The error is below the table.
- **layers cut**: parameters of layers of which each rank holds a slice only, of all that get a gradient (without embedding, head and last
  norm), and their share of the elements. What is not cut is computed by every rank anew.

The column of tptrain is there for the families that it has natively; the others it does not support yet.

One small model, one batch and one step of each family show mistakes of a plan; they say nothing of speed, of bfloat16, or of
combinations with other parallelism. A model of these sizes may crash where the released one would not, by a size that the number of
ranks does not divide: in particular 2 KV heads cannot be cut over 4 ranks, and many crashes at tp=4 are no more than that.

Made by `scripts/families` in {minutes:.0f} minutes: Transformers {transformers}, torch {torch}, accelerate {accelerate}, {cores} cores, CPU.
"""


@dataclass
class Outcome:
    verdict: str  # right, wrong or crashes
    reason: str  # the difference or the error; empty where it is right
    distance: Distance | None = None

    def __str__(self) -> str:
        return f"right {self.distance.grad:.0e}" if self.verdict == "right" and self.distance else self.verdict


@dataclass
class Row:
    family: str
    styles: list[str]
    native: bool
    absent: str = ""  # why there is no model of it here
    reloaded: float = 0.0  # the largest distance of a weight after saving and loading, in one process
    theirs: dict[int, Outcome] = field(default_factory=dict)  # by the number of ranks
    ours: dict[int, Outcome] = field(default_factory=dict)

    @property
    def cut(self) -> Distance | None:
        """Of the fewest ranks that computed something: what of the layers was cut."""
        return next((each.distance for each in self.theirs.values() if each.distance), None)


def one_line(row: Row) -> str:
    if row.absent:
        return f"{row.family}: not built: {row.absent}"
    parts = [f"Transformers tp={tp}: {_with_reason(each)}" for tp, each in row.theirs.items()]
    parts += [f"tptrain tp={tp}: {_with_reason(each)}" for tp, each in row.ours.items()]
    return f"{row.family}: {_cut(row)} of layers cut; {'; '.join(parts)}"


def page(rows: list[Row], minutes: float) -> str:
    degrees = sorted({tp for row in rows for tp in row.theirs | row.ours})
    parts = [
        INTRODUCTION.format(
            allowed=f"{ALLOWED:g}",
            floor=f"{FLOOR:g}",
            minutes=minutes,
            cores=os.cpu_count(),
            **{name: version(name) for name in ("transformers", "torch", "accelerate")},
        ),
        _totals(rows, degrees),
        _table(rows, degrees),
        _reasons(rows, "wrong"),
        _reasons(rows, "crashes"),
        _absent(rows),
    ]
    return "\n".join(part for part in parts if part)


def _totals(rows: list[Row], degrees: list[int]) -> str:
    """Counts of the table."""
    planned = [row for row in rows if row.styles]
    built = [row for row in planned if not row.absent]
    native = [row for row in rows if row.native]
    lines = ["## Totals", "", f"{len(planned)} families have a plan; {len(built)} of them are built here.", ""]
    lines += [
        "| | families | right | wrong | crash | right with nothing of the layers cut |",
        "| --- |" + " ---: |" * 5,
    ]
    for tp in degrees:
        verdicts = Counter(row.theirs[tp].verdict for row in built)
        whole = [row for row in built if row.theirs[tp].verdict == "right" and _nothing_cut(row.theirs[tp])]
        counts = (len(built), *(verdicts[each] for each in ("right", "wrong", "crashes")), len(whole))
        lines.append(f"| Transformers, tp={tp} | {' | '.join(map(str, counts))} |")
    for tp in degrees:
        verdicts = Counter(row.ours[tp].verdict for row in native if tp in row.ours)
        counts = (len(native), *(verdicts[each] for each in ("right", "wrong", "crashes")))
        lines.append(f"| tptrain, native families, tp={tp} | {' | '.join(map(str, counts))} | |")
    return "\n".join([*lines, ""])


def _table(rows: list[Row], degrees: list[int]) -> str:
    names = ["family", "styles of its plan", "layers cut"]
    names += [f"Transformers tp={tp}" for tp in degrees] + [f"tptrain tp={tp}" for tp in degrees]
    lines = ["## Families", "", f"| {' | '.join(names)} |", "| --- |" * 1 + " --- |" * (len(names) - 1)]
    for row in rows:
        cells = [row.family, ", ".join(row.styles) or "no plan", _cut(row)]
        cells += [_cell(row, row.theirs.get(tp)) for tp in degrees]
        cells += [str(row.ours[tp]) if tp in row.ours else "" for tp in degrees]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(row: Row, outcome: Outcome | None) -> str:
    if row.absent:
        return "not built"
    return str(outcome) if outcome else ""


def _reasons(rows: list[Row], verdict: str) -> str:
    """A list of reasons; families that have the same one stand together."""
    families: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for framework, outcomes in (("", row.theirs), ("tptrain, ", row.ours)):
            same: dict[str, list[str]] = defaultdict(list)
            for tp, outcome in outcomes.items():
                if outcome.verdict == verdict:
                    same[_plain(outcome.reason)].append(f"tp={tp}")
            for reason, degrees in same.items():
                families[reason].append(f"{row.family} ({framework}{', '.join(degrees)})")
    if not families:
        return ""
    lines = [f"- `{reason}`: {', '.join(names)}" for reason, names in families.items()]
    return "\n".join([f"## {'What is wrong' if verdict == 'wrong' else 'What crashes'}", "", *lines, ""])


def _absent(rows: list[Row]) -> str:
    lines = [f"- {row.family}: {row.absent}" for row in rows if row.absent]
    changed = [f"- {row.family}: {row.reloaded:.0e}" for row in rows if row.reloaded]
    parts = ["## What is not built", "", *lines, ""] if lines else []
    if changed:
        parts += ["## What saving and loading changes, in one process", "", *changed, ""]
    return "\n".join(parts)


def _plain(reason: str) -> str:
    """Without the place in the source, which differs between families with the same error."""
    return re.sub(r" \(\w+\.py:\d+\)$", "", reason).replace("`", "'")


def _with_reason(outcome: Outcome) -> str:
    return f"{outcome}: {outcome.reason}" if outcome.reason else str(outcome)


def _nothing_cut(outcome: Outcome) -> bool:
    return outcome.distance is not None and outcome.distance.cut[0] == 0


def _cut(row: Row) -> str:
    if row.cut is None:
        return ""
    return f"{row.cut.cut[0]} of {row.cut.cut[1]} ({row.cut.share:.0%})"
