"""A rank's state in its host's memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from tptrain.checkpoint.layout import flat
from tptrain.optim.state import TrainingState


class HostCopy:
    """The masters and moments of a state, for each block; made once, and renewed by each save.

    From a GPU they come through `pinned`, bytes of page-locked memory, in parts of its size. The copy itself is
    ordinary memory: page-locked, each of its tensors would be rounded up to a power of two.
    """

    def __init__(self, state: TrainingState, pinned: Tensor | None) -> None:
        self.state, self.pinned = state, pinned
        self.tensors = [{kind: torch.empty_like(t, device="cpu") for kind, t in now.items()} for now in flat(state)]

    def renew(self, arrive: Callable[[], None]) -> list[dict[str, Tensor]]:
        """Copy the state as it is now. `arrive` waits for what was last copied into `pinned`."""
        for copy, now in zip(self.tensors, flat(self.state), strict=True):
            for kind, tensor in now.items():
                if self.pinned is None:
                    copy[kind].copy_(tensor)
                else:
                    _copy_through(self.pinned.view(tensor.dtype), tensor, copy[kind], arrive)
        return self.tensors


def _copy_through(pinned: Tensor, source: Tensor, target: Tensor, arrive: Callable[[], None]) -> None:
    size = len(pinned)
    for here, there in zip(source.split(size), target.split(size), strict=True):
        part = pinned[: len(here)]
        part.copy_(here, non_blocking=True)
        arrive()
        there.copy_(part)
