"""How far a rank's items lie from the reference, and what kind of mistake a difference looks like."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tptrain.parallel.collectives import all_reduce_
from tptrain.parallel.mesh import Mesh
from tptrain.verify.reference import Reference
from tptrain.verify.step import LR, Item

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
# Roundings of EPS that one module may add up to. In float32 those within its sums of thousands of products count, which
# bfloat16's matrix products do in float32. Measured at tp=2 and widths of 192 to 1,024: at most a fifth of these.
ROUNDINGS = {torch.float32: 64.0, torch.bfloat16: 5.0}
FLOOR = 1e-2  # of the gradient norm: what a smaller gradient of a parameter is held against; some are only rounding
ALIKE = 0.02  # relative distance below which a pattern counts as recognised
LARGEST = 64  # count that is looked for where something is too large by a whole number


@dataclass(frozen=True)
class Comparison:
    """Of one item, by the rank that is farthest from the reference."""

    module: str
    what: str
    distance: float  # relative: |ours - reference| / |reference|, in 2-norms
    allowed: float
    rank: int
    kind: str = ""  # of the mistake, where there is one

    @property
    def right(self) -> bool:
        return self.distance <= self.allowed


def compare(items: Sequence[Item], reference: Reference, mesh: Mesh, dtype: torch.dtype) -> list[Comparison]:
    """Every rank calls it, with the same items in the same order; all get the same answer.

    The first difference is looked at more closely: it gets its kind.
    """
    norm = reference.whole("gradient norm before clipping").item()
    own = [_distance(item, reference, norm, dtype) for item in items]
    everywhere = mesh.control.gather(own)
    comparisons = []
    for number, item in enumerate(items):
        rank = max(range(len(everywhere)), key=lambda rank: everywhere[rank][number][0] - everywhere[rank][number][1])
        distance, allowed = everywhere[rank][number]
        comparisons.append(Comparison(item.module, item.what, distance, allowed, rank))
    wrong = next((number for number, each in enumerate(comparisons) if not each.right), None)
    if wrong is not None:
        comparisons[wrong] = replace(comparisons[wrong], kind=_kind(items[wrong], reference, mesh))
    return comparisons


def allowance(dtype: torch.dtype, depth: int) -> float:
    """The relative distance that rounding may bring about behind so many modules, as in a random walk."""
    return ROUNDINGS[dtype] * EPS[dtype] * math.sqrt(1 + depth)


def _distance(item: Item, reference: Reference, norm: float, dtype: torch.dtype) -> tuple[float, float]:
    """The relative distance, infinite where ours is no number, and the allowed one."""
    if not reference.has(item.key):
        return math.inf, 0.0
    theirs, ours = reference.part(item), item.value.float().cpu()
    size, eps = theirs.norm().item(), EPS[dtype]
    allowed = allowance(dtype, item.depth)
    if not theirs.numel():  # rows of the vocabulary's padding alone
        return 0.0, allowed
    if item.what in ("at the start", "buffer"):
        allowed = 0.0
    elif item.what == "gradient":
        size = max(size, FLOOR * norm)
    elif item.what == "after the step":  # of the change, in which a weight's own rounding weighs more
        change = (theirs - _before(item, reference)).norm().item()
        change = max(change, FLOOR * LR * math.sqrt(theirs.numel()))
        allowed += eps * size / change
        size = change
    difference = (ours - theirs).norm().item()
    if difference != difference:
        return math.inf, allowed
    return (0.0 if difference == 0 else difference / max(size, 1e-30)), allowed


def _before(item: Item, reference: Reference) -> Tensor:
    """A parameter's values before the step, of those after it."""
    return reference.whole(f"{item.module} at the start")[item.place]


# ---------------------------------------------------------------------------------------------------------------- kinds


def _kind(item: Item, reference: Reference, mesh: Mesh) -> str:
    """What kind of mistake it looks like. Every rank calls it."""
    if not reference.has(item.key):
        return "one rank has no such parameter: tied weights that have come apart"
    if item.what == "buffer":
        return "a buffer that is not what follows from the config: it was lost when the model was built"
    if item.module == "gradient norm":  # of gradients that have been found right
        more = item.value.item() > reference.part(item).item()
        return (
            "the gradients are right: those that several ranks hold alike are counted more than once"
            if more
            else "the gradients are right: a sum over the ranks is missing"
        )
    own = _own_kind(item, reference)
    answers = [answer for answer in mesh.control.gather(own) if answer]
    if answers:
        return answers[0]
    places = mesh.control.gather([(part.start, part.stop) for part in item.place])
    for axis in ("tp", "kv", "dp"):
        group = mesh.group(axis)
        partition = mesh.grid.partition(axis)
        if group is None or not all(places[rank] == places[ranks[0]] for ranks in partition for rank in ranks):
            continue
        total = item.value.float().contiguous().clone()
        all_reduce_(total, group).wait()
        added = _close(_centred(total.cpu(), item), _centred(reference.part(item), item))
        if all(mesh.control.gather(added)):
            return f"a sum over {axis} is missing: the ranks' parts add up to what one rank has"
    return "of no kind that is known"


def _own_kind(item: Item, reference: Reference) -> str:
    """By this rank's part alone; empty where that shows nothing."""
    ours, theirs = item.value.float().cpu(), reference.part(item)
    if not ours.numel():
        return ""
    if not ours.isfinite().all():
        return "not finite"
    if _close(ours, theirs) and (ours - theirs).norm() <= 1e-6 * theirs.norm():
        return ""  # another rank's mistake
    if not ours.any():
        return "absent: zero on this rank"
    if item.what == "after the step" and torch.equal(ours, _before(item, reference)):
        return "stale: unchanged by the step"
    x, y = _centred(ours, item).flatten(), _centred(theirs, item).flatten()
    ratio = (torch.dot(x, y) / y.square().sum()).item()
    if _close(x, ratio * y):
        for count in range(2, LARGEST + 1):
            if abs(ratio / count - 1) < ALIKE:
                return f"{count} times too large: added up, or counted, once too often"
            if abs(ratio * count - 1) < ALIKE:
                return f"1/{count} of it: a mean where a sum should be, or a part that is missing"
    return _constant(ours - theirs) or _moved(item, ours, reference)


def _centred(x: Tensor, item: Item) -> Tensor:
    """An output without its mean over the tokens, in which a bias is that is added after a sum."""
    return x - x.mean(0) if item.what == "output" else x


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return (ours - theirs).norm().item() <= ALIKE * theirs.norm().item()


def _constant(difference: Tensor) -> str:
    """Whether every token is off by the same vector."""
    if difference.dim() == 2 and len(difference) > 1 and _close(difference, difference.mean(0).expand_as(difference)):
        return "off by the same vector at every token: a bias that is added on each rank, or nowhere"
    return ""


def _moved(item: Item, ours: Tensor, reference: Reference) -> str:
    """Whether the rows or columns are those of other places, or the rows those of another parameter."""
    whole = reference.whole(item.key)
    for dim, name in list(enumerate(("row", "column")))[: whole.dim()]:
        others = tuple(slice(None) if d == dim else part for d, part in enumerate(item.place))
        places = _places(ours.transpose(0, dim), whole[others].transpose(0, dim))
        expected = torch.arange(item.place[dim].start, item.place[dim].start + ours.shape[dim])
        if places is not None and (moved := (places != expected).nonzero()).numel():
            there, here = int(places[moved[0]]), int(expected[moved[0]])
            return f"a wrong slice: {name} {there} of the whole lies where {name} {here} belongs"
    if item.what == "at the start":
        for module in reference.modules(item.what):
            other = reference.whole(f"{module} {item.what}")
            if module != item.module and other.shape[1:] == whole.shape[1:] and _places(ours, other) is not None:
                return f"a wrong slice: these are rows of {module}"
    return ""


def _places(rows: Tensor, whole: Tensor) -> Tensor | None:
    """Where in the whole, (n, ...), each of the rows lies; None where some are not there. They are recognised by their
    products with a random vector.
    """
    rows, whole = rows.reshape(len(rows), -1), whole.reshape(len(whole), -1)
    vector = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
    marks, order = (whole @ vector).sort()
    own = rows @ vector
    above = torch.searchsorted(marks, own).clamp(max=len(marks) - 1)
    below = (above - 1).clamp(min=0)
    nearest = torch.where((marks[above] - own).abs() <= (marks[below] - own).abs(), above, below)
    alike = (marks[nearest] - own).abs() <= 1e-5 * marks.abs().mean()
    return order[nearest] if len(own) > 1 and alike.float().mean() > 0.9 else None
