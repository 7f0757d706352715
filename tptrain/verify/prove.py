"""The proof: a step on one rank, written down, and the same step on many ranks, held against it."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tptrain.parallel.mesh import Mesh
from tptrain.verify.compare import Comparison, compare
from tptrain.verify.reference import Reference
from tptrain.verify.step import Item


class Step(Protocol):
    """A step of a model whose weights are there."""

    def weights(self) -> list[Item]: ...

    def forward_and_backward(self, tokens: Tensor) -> list[Item]: ...

    def norm(self) -> Item: ...

    def update(self, norm: float) -> list[Item]: ...


Say = Callable[[str], None]  # what comes next


def write_reference(step: Step, tokens: Tensor, reference: Reference, say: Say = lambda _: None) -> None:
    """Run the step, whose weights are there, on one rank, and write all of it."""
    say("weights")
    reference.write(step.weights())
    say("forward and backward pass")
    reference.write(step.forward_and_backward(tokens))
    norm = step.norm()
    reference.write([norm])
    say("update")
    reference.write(step.update(norm.value.item()))


def prove(
    step: Step, tokens: Tensor, reference: Reference, mesh: Mesh, dtype: torch.dtype, say: Say = lambda _: None
) -> list[Comparison]:
    """Run the step, whose weights are there, and compare all of it. Every rank calls it and gets the same answer.

    Where something differs, what follows from it is left out: the weights at the start, the passes, the update.
    """
    say("weights")
    comparisons = compare(step.weights(), reference, mesh, dtype)
    if not all(each.right for each in comparisons):
        return comparisons
    say("forward and backward pass")
    comparisons += compare([*step.forward_and_backward(tokens), step.norm()], reference, mesh, dtype)
    if not all(each.right for each in comparisons):
        return comparisons
    say("update")
    norm = reference.whole("gradient norm before clipping").item()
    return comparisons + compare(step.update(norm), reference, mesh, dtype)
