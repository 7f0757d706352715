"""The page docs/families.md, and a line of the terminal, out of what every family did."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

from tests import zoo_generate
from tests.zoo_step import ALLOWED, FLOOR, Distance
from tptrain.hf.corrections import CORRECTIONS

INTRODUCTION = """\
# Transformers' families, cut by tensor parallelism

Of each causal family of Transformers that has a tensor-parallel plan (`base_model_tp_plan` of its config, or of its
text model's), and of some without, a small random model is built, with all its kinds of layers
([tests/zoo.py](../tests/zoo.py)): 64 wide, 8 heads, 2 KV heads where the family has grouped queries, 4 experts, no
parameter left at 0 or 1. One process computes the loss, the logits and the gradient of each parameter for a batch of
2 x 24 tokens, in float32 with eager attention. Then ranks that talk over gloo compute the same, in up to three ways:

- **Transformers**: its own tensor parallelism (`DistributedConfig(tp_size=...)`), which loads the saved model.
- **tptrain, Transformers' model**: Transformers' modelling code, sharded by the model's plan, with tptrain's linears,
  embedding, loss and collectives ([tptrain/hf](../tptrain/hf)). Where the plan cuts no layer, or there is none, tptrain
  proposes cuts from names and shapes. It gets the weights as the model has them in memory, so this says nothing of
  reading files.
- **tptrain, native**: tptrain's own decoder, for the families that it has natively.

What came out:

- **right**: the loss, and each parameter's gradient on each rank, gathered to a whole one where it is cut, are within
  {allowed} of those of one process, relative. The figure is that of the worst gradient: the 2-norm of the difference
  over that of the gradient, or over {floor} of the norm of all gradients where that is more.
- **wrong**: one of them is not. Which one, and by how much, is said below the table.
- **crashes**: a rank raised an error, died twice or gave no answer in time. The error is below the table.
- **refused**: tptrain says before the first step that it cannot, and why. The reason is below the table.
- **cut**: parameters of layers of which each rank holds a slice only, of all that get a gradient (embedding, head and
  last norm are not counted), and their share of the elements; "proposed" where tptrain proposed the cuts. Every rank
  computes the rest anew.
- **tp=4, 4 KV heads**: where the model with 2 KV heads crashes at tp=4, the same with 4.
- **generates**: Transformers' model in tptrain's hands, against Transformers' `generate` in one process: {new} greedy
  tokens after each of two prompts that are equally long, and of four that are not and are padded on the left, with the
  family's usual attention (SDPA as a rule) and larger weights, so that tokens vary. Right: on each rank its columns of
  the logits of each token are within {near} of the norm of all, the tokens are the same, or another one that is as
  likely, and a forward pass of training afterwards is, to the bit, the one before.

One small model, one batch and one step of each family show mistakes of a plan. They say nothing of speed, of bfloat16
or of other parallelism beside it, and a model of these sizes may crash where the released one would not, by a size
that the number of ranks does not divide. DeepSeek-V4's table of experts by token id is all zeros here, as Transformers
initialises it. tptrain refuses a directory whose table is another: checkpoints hold no whole numbers.

Made by `scripts/families` in {minutes:.0f} minutes on {cores} cores (CPU): Transformers {transformers}, torch {torch},
accelerate {accelerate}.
"""


@dataclass(frozen=True)
class Cause:
    """Why Transformers is not right, read out of tracebacks and of its source, and checked where it says so; and what
    tptrain does instead, unless that is a correction of the plan.
    """

    why: str
    instead: str = ""


CAUSES: dict[tuple[str, ...], Cause] = {
    ("apertus", "apertus1p5_text"): Cause(
        "every rank has the two slopes of the activation and sees its own features; the plan does not sum their "
        "gradients. Checked: the sum over the ranks is the gradient of one process",
        "which gradients are sums is read off the graph of a forward pass, not off the plan",
    ),
    ("gemma3n_text",): Cause(
        "activation sparsity takes mean and deviation over the features of a rank, for those of all. Checked: without "
        "sparsity it is right"
    ),
    ("hrm_text", "sarvam_moe"): Cause(
        "the checkpoint has rows of several projections in one tensor; a rank takes its slice of that before it is "
        "split into projections",
        "a parameter is cut as the model has it in memory",
    ),
    ("doge",): Cause("the mask has all heads, the scores those of a rank"),
    ("inkling_text",): Cause(
        "the norm of the embedding works on sums that are not complete yet",
        "a lookup ends with the sum over the ranks, before anything else is done to it",
    ),
    ("gemma4",): Cause(
        "a row of the embedding's weight, a DTensor, is combined with plain tensors",
        "parameters are plain tensors",
    ),
    ("llama4", "llama4_text"): Cause(
        "the output of the shared expert, a view that a custom function returned, is added to in place, which autograd "
        "refuses",
        "the sum over the ranks is a tensor of its own",
    ),
}


@dataclass
class Outcome:
    verdict: str  # right, wrong, crashes or refused
    reason: str  # the difference or the error; empty where it is right
    distance: Distance | None = None

    def __str__(self) -> str:
        return f"right {self.distance.grad:.0e}" if self.verdict == "right" and self.distance else self.verdict


Outcomes = dict[int, Outcome]  # by the number of ranks


@dataclass
class Row:
    family: str
    styles: list[str]
    absent: str = ""  # why there is no model of it here
    reloaded: float = 0.0  # the largest distance of a weight after saving and loading, in one process
    theirs: Outcomes = field(default_factory=dict)  # Transformers' own
    engine: Outcomes = field(default_factory=dict)  # of tptrain, with Transformers' model
    native: Outcomes = field(default_factory=dict)
    generates: Outcomes = field(default_factory=dict)  # with Transformers' model
    wide: Outcome | None = None  # Transformers on the most ranks, with as many KV heads


def one_line(row: Row) -> str:
    if row.absent:
        return f"{row.family}: not built: {row.absent}"
    parts = [f"{name}: {_with_reason(each)}" for name, each in _columns(row).items()]
    return f"{row.family}: {_cut(row.theirs)} and {_cut(row.engine)} of layers cut; {'; '.join(parts)}"


def page(rows: list[Row], minutes: float) -> str:
    degrees = sorted({tp for row in rows for tp in row.engine})
    parts = [
        INTRODUCTION.format(
            allowed=f"{ALLOWED:g}",
            floor=f"{FLOOR:g}",
            new=zoo_generate.NEW,
            near=f"{zoo_generate.ALLOWED:g}",
            minutes=minutes,
            cores=os.cpu_count(),
            **{name: version(name) for name in ("transformers", "torch", "accelerate")},
        ),
        _totals(rows, degrees),
        _only_tptrain(rows, degrees),
        _corrections(),
        _table(rows, degrees),
        *(_reasons(rows, verdict) for verdict in ("wrong", "crashes", "refused")),
        _absent(rows),
    ]
    return "\n".join(part for part in parts if part)


def _columns(row: Row) -> dict[str, Outcome]:
    """What came out of each way and number of ranks."""
    columns = {f"Transformers tp={tp}": each for tp, each in row.theirs.items()}
    columns |= {"Transformers, 4 KV heads": row.wide} if row.wide else {}
    columns |= {f"tptrain, Transformers' model tp={tp}": each for tp, each in row.engine.items()}
    columns |= {f"tptrain, native tp={tp}": each for tp, each in row.native.items()}
    return columns | {f"generates tp={tp}": each for tp, each in row.generates.items()}


def _totals(rows: list[Row], degrees: list[int]) -> str:
    """Counts of the table."""
    planned = [row for row in rows if row.styles]
    built = [row for row in planned if not row.absent]
    without = [row for row in rows if not row.styles and not row.absent]
    most = max(degrees)
    text = f"{len(planned)} families have a plan; {len(built)} of them are built here, and {len(without)} without one."
    names = ["families", "right", "wrong", "crash", "refused", "right, but nothing of the layers cut"]
    names.append("mean share of the layers cut, where right")
    lines = ["## Totals", "", text, "", f"| | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    counted: dict[str, list[Outcome]] = {}

    def count(name: str, of: list[Outcomes]) -> None:
        counted.update({f"{name}, tp={tp}": [each[tp] for each in of if tp in each] for tp in degrees})

    count("Transformers", [row.theirs for row in built])
    counted[f"Transformers, tp={most}, with {most} KV heads where 2 crash"] = [
        row.wide or row.theirs[most] for row in built
    ]
    count("tptrain, Transformers' model", [row.engine for row in built])
    if without:
        count("tptrain, Transformers' model, no plan there", [row.engine for row in without])
    count("tptrain, native", [row.native for row in rows])
    count("generates", [row.generates for row in rows])
    for name, outcomes in counted.items():
        verdicts = Counter(each.verdict for each in outcomes)
        counts = [len(outcomes), *(verdicts[each] for each in ("right", "wrong", "crashes", "refused"))]
        right = [each.distance for each in outcomes if each.verdict == "right" and each.distance]
        whole = sum(each.cut[0] == 0 for each in right)
        share = f"{sum(each.share for each in right) / max(1, len(right)):.0%}"
        cut = ["", ""] if "native" in name or "generates" in name else [str(whole), share]
        lines.append(f"| {name} | {' | '.join([*map(str, counts), *cut])} |")
    return "\n".join([*lines, ""])


def _only_tptrain(rows: list[Row], degrees: list[int]) -> str:
    """Of families that Transformers gets wrong or fails on, and that are right with its model in tptrain's hands."""
    few = [row for row in rows if row.wide and row.wide.verdict == row.engine[max(degrees)].verdict == "right"]
    lines = ["## Right with tptrain only", ""]
    if few:
        lines += [
            f"{len(few)} families have fewer KV heads than ranks at tp={max(degrees)}. Transformers crashes there, and "
            "is right where they have as many. In tptrain neighbours share a KV head and sum its gradient.",
            "",
        ]
    behind = {row.family: row for row in rows if row.theirs and row.theirs[min(degrees)].verdict != "right"}
    ahead = [name for name, row in behind.items() if row.engine[min(degrees)].verdict == "right"]
    lines += [
        f"{len(ahead)} families are not right in Transformers at tp={min(degrees)} either, and are in tptrain:",
        "",
    ]
    for names, cause in CAUSES.items():
        here = [name for name in names if name in ahead]
        verdicts = " and ".join(sorted({behind[name].theirs[min(degrees)].verdict for name in here}))
        corrected = ["it corrects the plan, see below"] if set(here) & set(CORRECTIONS) else []
        instead = "; ".join([*filter(None, [cause.instead]), *corrected])
        lines += [f"- {', '.join(here)} ({verdicts}): {cause.why}. In tptrain: {instead}."] if here else []
    known = {name for names in CAUSES for name in names}
    lines += [f"- {name}: the cause was not looked into." for name in ahead if name not in known]
    lines += [f"- {name}: not right in tptrain either." for name in behind if name not in ahead]
    return "\n".join([*lines, ""])


def _corrections() -> str:
    """Families whose plan is not followed, with the reason."""
    families: dict[str, list[str]] = defaultdict(list)
    for family in CORRECTIONS:
        families[_reason(family)].append(family)
    lines = [f"- {', '.join(names)}: {reason}." for reason, names in families.items()]
    title = "## Plans that tptrain corrects ([tptrain/hf/corrections.py](../tptrain/hf/corrections.py))"
    return "\n".join([title, "", *lines, ""])


def _reason(family: str) -> str:
    """Of a correction, in one line."""
    return " ".join((CORRECTIONS[family].__doc__ or "").split()).removesuffix(".")


def _table(rows: list[Row], degrees: list[int]) -> str:
    most = max(degrees)
    names = ["family", "styles of its plan", "Transformers: cut", *(f"tp={tp}" for tp in degrees)]
    names += [f"tp={most}, {most} KV heads", "tptrain, Transformers' model: cut", *(f"tp={tp}" for tp in degrees)]
    for name in ("tptrain, native", "generates"):
        names += [f"{name}: tp={degrees[0]}", *(f"tp={tp}" for tp in degrees[1:])]
    lines = ["## Families", "", f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = [row.family, ", ".join(row.styles) or "no plan", _cut(row.theirs)]
        cells += ["not built" if row.absent else _cell(row.theirs, tp) for tp in degrees]
        cells += [str(row.wide or ""), _cut(row.engine)]
        cells += [_cell(row.engine, tp) for tp in degrees]
        cells += [_cell(row.native, tp) for tp in degrees]
        cells += [_cell(row.generates, tp) for tp in degrees]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(outcomes: Mapping[int, Outcome], tp: int) -> str:
    return str(outcomes.get(tp, ""))


def _reasons(rows: list[Row], verdict: str) -> str:
    """A list of reasons; families that have the same one in the same columns stand together."""
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        same: dict[str, list[str]] = defaultdict(list)
        for column, outcome in _columns(row).items():
            if outcome.verdict == verdict:
                same[_plain(outcome.reason)].append(column)
        for reason, columns in same.items():
            families[reason, "; ".join(columns)].append(row.family)
    if not families:
        return ""
    lines = [f"- {', '.join(names)} ({columns}): `{reason}`" for (reason, columns), names in families.items()]
    title = {"wrong": "What is wrong", "crashes": "What crashes", "refused": "What is refused"}[verdict]
    return "\n".join([f"## {title}", "", *lines, ""])


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


def _cut(outcomes: Mapping[int, Outcome]) -> str:
    """What of the layers is cut, on the fewest ranks that computed something."""
    of = next((each.distance for each in outcomes.values() if each.distance), None)
    if of is None:
        return ""
    return f"{of.cut[0]} of {of.cut[1]} ({of.share:.0%}){', proposed' * of.proposed}"
