"""When to stop before the end: the wish of one rank, made the decision of all.

A signal or a clock raises a flag on one rank; the flag travels with the gradient norm (`Reducer.norm_and_flags`), so at
the next step boundary every rank knows, and what to do about it is settled once, by rank 0, for all.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tptrain.parallel.mesh import Mesh
from tptrain.watch.place import Allocation

MARGIN_S = 2  # of time that must be left beside a step and a save


@dataclass(frozen=True)
class Agreement:
    """What all ranks do at this step boundary."""

    reason: str
    save: bool
    requeue: bool  # whether the job should go back into the queue


class Stop:
    """One rank's view of the wishes to stop."""

    def __init__(
        self, mesh: Mesh, allocation: Allocation | None = None, wish: Callable[[], str | None] | None = None
    ) -> None:
        self.mesh, self.allocation = mesh, allocation
        self.wish = wish or (lambda: mesh.box.signal)
        self.save_s = 0.0  # the last save
        self.recent: deque[float] = deque(maxlen=20)  # seconds of the last steps
        self._copy: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    @property
    def step_s(self) -> float:
        """A long step among the last ones, in seconds: not the longest, in which the job may have been suspended."""
        return sorted(self.recent)[-2] if len(self.recent) > 1 else sum(self.recent)

    def wanted(self) -> bool:
        """Whether this rank wants to stop: it was signalled, or another step and a save would not fit any more."""
        end = self.mesh.box.state.end_time  # rank 0 only
        late = end > 0 and end - time.time() < 1.5 * self.step_s + self.save_s + MARGIN_S
        return late or self.wish() is not None

    def read(self, norm: Tensor) -> tuple[float, bool]:
        """Gradient norm and whether any rank wants to stop, out of `Reducer.norm_and_flags`.

        On a gpu, of the step before, so that the host need not wait for the device; on every rank alike.
        """
        if not norm.is_cuda:
            value, flags = norm.tolist()
            return value, flags > 0
        before, event = self._copy, self._copied
        self._copy = torch.empty(2, pin_memory=True)
        self._copy.copy_(norm, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
        if before is None or event is None:
            return 0.0, False
        event.synchronize()
        value, flags = before.tolist()
        return value, flags > 0

    def agree(self) -> Agreement:
        """Every rank calls it once the flag is up: why, and whether there is time for a checkpoint."""
        signals = {name for name in self.mesh.control.gather(self.wish()) if name}
        proposal = None
        if self.mesh.is_main:
            end = self.mesh.box.state.end_time or None
            reason, requeue = "the time limit is near", True
            if signals and self.allocation is not None:
                reason, requeue, end = self.allocation.reason(signals)
            elif signals:
                reason, requeue = " and ".join(sorted(signals)), False
            left = end - time.time() if end else float("inf")
            proposal = Agreement(reason, left > self.save_s, requeue)
        agreed = self.mesh.control.gather(proposal)[0]
        assert isinstance(agreed, Agreement)
        return agreed
