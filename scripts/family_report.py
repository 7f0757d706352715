"""The page docs/families.md, and a line of the terminal, out of what every family did."""

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version

from tests.zoo_step import ALLOWED, FLOOR, Distance
from tptrain.models.families import FAMILIES as NATIVE

INTRODUCTION = """\
# Transformers' families, cut by tensor parallelism

Of each causal family of Transformers that has a tensor-parallel plan (`base_model_tp_plan` of its config, or of its
text model's) a small random model is built, with all its kinds of layers ([tests/zoo.py](../tests/zoo.py)): 64 wide,
8 heads, 2 KV heads where the family has grouped queries, 4 experts, no parameter left at 0 or 1. One process computes
the loss, the logits and the gradient of each parameter for a batch of 2 x 24 tokens, in float32 with eager attention.
Then ranks that talk over gloo load the saved model and compute the same, with Transformers' own tensor parallelism
(`DistributedConfig(tp_size=...)`) and with tptrain.

- **right**: the loss, and each parameter's gradient on each rank, gathered to a whole one where it is cut, are within
  {allowed} of those of one process, relative. The figure is that of the worst gradient: the 2-norm of the difference
  over that of the gradient, or over {floor} of the norm of all gradients where that is more.
- **wrong**: one of them is not. Which one, and by how much, is said below the table.
- **crashes**: a rank raised an error, died or gave no answer in time. The error is below the table.
- **layers cut**: parameters of layers of which each rank holds a slice only, of all that get a gradient (embedding,
  head and last norm are not counted), and their share of the elements. Every rank computes the rest anew.
- **tp=4, 4 KV heads**: where the model with 2 KV heads crashes at tp=4, the same with 4.

The columns of tptrain are there for the families that it has natively; the others it does not support yet.
{unplanned}

One small model, one batch and one step of each family show mistakes of a plan. They say nothing of speed, of bfloat16
or of other parallelism beside it, and a model of these sizes may crash where the released one would not, by a size
that the number of ranks does not divide.

Made by `scripts/families` in {minutes:.0f} minutes on {cores} cores (CPU): Transformers {transformers}, torch {torch},
accelerate {accelerate}.
"""


# Read out of tracebacks and of Transformers' source, and checked where it says so.
CAUSES = {
    (
        "apertus",
        "apertus1p5_text",
    ): "every rank has the two slopes of the activation and sees its own features; the plan "
    "does not sum their gradients. Checked: the sum over the ranks is the gradient of one process",
    ("gemma3n_text",): "activation sparsity takes mean and deviation over the features of a rank, for those of all. "
    "Checked: without sparsity it is right",
    (
        "hrm_text",
        "sarvam_moe",
    ): "the checkpoint has rows of several projections in one tensor; a rank takes its slice of "
    "that before it is split into projections",
    ("doge",): "the mask has all heads, the scores those of a rank",
    ("inkling_text",): "the norm of the embedding works on sums that are not complete yet",
    ("gemma4",): "a row of the embedding's weight, a DTensor, is combined with plain tensors",
}


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
    wide: Outcome | None = None  # Transformers on the most ranks, with as many KV heads

    @property
    def cut(self) -> Distance | None:
        """Of the fewest ranks that computed something: what of the layers was cut."""
        return next((each.distance for each in self.theirs.values() if each.distance), None)


def one_line(row: Row) -> str:
    if row.absent:
        return f"{row.family}: not built: {row.absent}"
    parts = [f"Transformers tp={tp}: {_with_reason(each)}" for tp, each in row.theirs.items()]
    if row.wide:
        parts.append(f"with 4 KV heads: {_with_reason(row.wide)}")
    parts += [f"tptrain tp={tp}: {_with_reason(each)}" for tp, each in row.ours.items()]
    return f"{row.family}: {_cut(row)} of layers cut; {'; '.join(parts)}"


def page(rows: list[Row], minutes: float) -> str:
    degrees = sorted({tp for row in rows for tp in row.theirs | row.ours})
    parts = [
        INTRODUCTION.format(
            allowed=f"{ALLOWED:g}",
            floor=f"{FLOOR:g}",
            minutes=minutes,
            unplanned=_unplanned(rows),
            cores=os.cpu_count(),
            **{name: version(name) for name in ("transformers", "torch", "accelerate")},
        ),
        _totals(rows, degrees),
        _table(rows, degrees),
        _reasons(rows, "wrong"),
        _reasons(rows, "crashes"),
        _causes(rows),
        _absent(rows),
    ]
    return "\n".join(part for part in parts if part)


def _unplanned(rows: list[Row]) -> str:
    names = sorted(set(NATIVE) - {row.family for row in rows})
    return f"It also has {', '.join(names)}, without a plan in Transformers." if names else ""


def _totals(rows: list[Row], degrees: list[int]) -> str:
    """Counts of the table."""
    built = [row for row in rows if not row.absent]
    native = [row for row in rows if row.native]
    most = max(degrees)
    lines = ["## Totals", "", f"{len(rows)} families have a plan; {len(built)} of them are built here.", ""]
    lines += [
        "| | families | right | wrong | crash | right, but nothing of the layers cut |",
        "| --- |" + " ---: |" * 5,
    ]
    counted = {f"Transformers, tp={tp}": [row.theirs[tp] for row in built] for tp in degrees}
    counted[f"Transformers, tp={most}, with {most} KV heads where 2 crash"] = [
        row.wide or row.theirs[most] for row in built
    ]
    counted |= {f"tptrain, tp={tp}": [row.ours[tp] for row in native if tp in row.ours] for tp in degrees}
    for name, outcomes in counted.items():
        verdicts = Counter(each.verdict for each in outcomes)
        whole = sum(each.verdict == "right" and _nothing_cut(each) for each in outcomes)
        counts = [len(outcomes), *(verdicts[each] for each in ("right", "wrong", "crashes"))]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {'' if 'tptrain' in name else whole} |")
    return "\n".join([*lines, ""])


def _table(rows: list[Row], degrees: list[int]) -> str:
    most = max(degrees)
    names = ["family", "styles of its plan", "layers cut"]
    names += [*(f"Transformers tp={tp}" for tp in degrees), f"tp={most}, {most} KV heads"]
    names += [f"tptrain tp={tp}" for tp in degrees]
    lines = ["## Families", "", f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = [row.family, ", ".join(row.styles), _cut(row)]
        cells += [_cell(row, row.theirs.get(tp)) for tp in degrees]
        cells += [str(row.wide or "")]
        cells += [str(row.ours.get(tp, "")) for tp in degrees]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(row: Row, outcome: Outcome | None) -> str:
    if row.absent:
        return "not built"
    return str(outcome) if outcome else ""


def _reasons(rows: list[Row], verdict: str) -> str:
    """A list of reasons; families that have the same one in the same columns stand together."""
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        outcomes = {f"tp={tp}": each for tp, each in row.theirs.items()}
        outcomes |= {"4 KV heads": row.wide} if row.wide else {}
        outcomes |= {f"tptrain tp={tp}": each for tp, each in row.ours.items()}
        same: dict[str, list[str]] = defaultdict(list)
        for column, outcome in outcomes.items():
            if outcome.verdict == verdict:
                same[_plain(outcome.reason)].append(column)
        for reason, columns in same.items():
            families[reason, ", ".join(columns)].append(row.family)
    if not families:
        return ""
    lines = [f"- {', '.join(names)} ({columns}): `{reason}`" for (reason, columns), names in families.items()]
    title = {"wrong": "What is wrong", "crashes": "What crashes"}[verdict]
    return "\n".join([f"## {title}", "", *lines, ""])


def _causes(rows: list[Row]) -> str:
    """Of families that are not right on the fewest ranks."""
    concerned = {row.family for row in rows if any(each.verdict != "right" for each in [*row.theirs.values()][:1])}
    lines = [f"- {', '.join(names)}: {cause}." for names, cause in CAUSES.items() if concerned.intersection(names)]
    return "\n".join(["## Causes, as far as they were looked into", "", *lines, ""]) if lines else ""


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
