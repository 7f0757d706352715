"""Ranks that communicate together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from tptrain.parallel.communicators import Communicator
from tptrain.parallel.device_clock import DeviceClock
from tptrain.watch.black_box import ENQUEUED, INSIDE, BlackBox


@dataclass(frozen=True)
class Group:
    """Ranks that communicate together, and the black box in which each of their collectives is noted."""

    axis: str
    ranks: tuple[int, ...]
    communicator: Communicator
    box: BlackBox
    clock: DeviceClock | None = None  # of the GPU that runs the collectives

    @property
    def size(self) -> int:
        return len(self.ranks)

    @contextmanager
    def noted(self, op: str) -> Iterator[None]:
        """Around a blocking collective of Python objects: entered, and left unless it fails."""
        number = self.enter(op)
        yield
        self.leave(number)

    def enter(self, op: str, x: Tensor | None = None) -> int:
        """Note a collective that comes next; returns its number, by which the other notes know it."""
        shape, dtype = ((), "object") if x is None else (x.shape, x.dtype)
        state = INSIDE if self.clock is None else ENQUEUED
        number = self.box.enter(op, shape, dtype, self.axis, self.ranks, state)
        if self.clock is not None:
            self.clock.note(self.box.run_on, number)
        return number

    def run_on(self, number: int) -> None:
        """The host goes on while the collective travels. A device goes on by itself."""
        if self.clock is None:
            self.box.run_on(number)

    def wait(self, number: int) -> None:
        """Host or device does nothing else from here on until the collective is done."""
        self._note(self.box.wait, number)

    def leave(self, number: int) -> None:
        """The collective is done."""
        self._note(self.box.leave, number)

    def _note(self, apply: Callable[[int], None], number: int) -> None:
        if self.clock is None:
            apply(number)
        else:
            self.clock.note(apply, number)
