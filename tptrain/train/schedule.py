"""The order of a step: schedules, which are lists of actions. `runner.py` runs any of them.

A segment is a piece of the forward pass (`nn/decoder.py`), a unit the parameters that are reduced together. Weight
gradients are computed within the backward action of their segment, beside its all-reduce.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """Of one segment, for one micro-batch."""

    batch: int
    segment: int


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch and its gradient to the last segment's output."""

    batch: int


@dataclass(frozen=True)
class Backward:
    """Of one segment, for one micro-batch."""

    batch: int
    segment: int


@dataclass(frozen=True)
class Reduce:
    """Begin to sum a unit's gradients over the ranks: nothing more is added to them in this step."""

    unit: str


Action = Forward | Loss | Backward | Reduce
Schedule = Callable[[int, Sequence[str]], list[Action]]  # micro-batches, and the unit of each segment -> actions


def plain(batches: int, units: Sequence[str]) -> list[Action]:
    """One micro-batch after the other, forward and backward."""
    return in_turn(batches, units, together=1)


def overlapped(batches: int, units: Sequence[str]) -> list[Action]:
    """Micro-batches two by two, a segment of one, then of the other: one's sums travel while the other computes."""
    return in_turn(batches, units, together=2)


def in_turn(batches: int, units: Sequence[str], together: int) -> list[Action]:
    """`together` micro-batches at a time, in turn segment by segment."""
    actions: list[Action] = []
    for first in range(0, batches, together):
        group = range(first, first + together)
        actions += [Forward(batch, segment) for segment in range(len(units)) for batch in group]
        actions += [Loss(batch) for batch in group]
        for segment in reversed(range(len(units))):
            actions += [Backward(batch, segment) for batch in reversed(group)]
            if group.stop == batches and units.index(units[segment]) == segment:  # the unit's first segment
                actions.append(Reduce(units[segment]))
    return actions
