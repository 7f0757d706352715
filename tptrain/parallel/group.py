"""Ranks that communicate together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from tptrain.parallel.communicators import Communicator
from tptrain.watch.black_box import BlackBox


@dataclass(frozen=True)
class Group:
    """Ranks that communicate together, and the black box in which each of their collectives is noted."""

    axis: str
    ranks: tuple[int, ...]
    communicator: Communicator
    box: BlackBox

    @property
    def size(self) -> int:
        return len(self.ranks)

    @contextmanager
    def noted(self, op: str) -> Iterator[None]:
        """Around a blocking collective of Python objects: entered, and left unless it fails."""
        number = self.enter(op)
        yield
        self.box.leave(number)

    def enter(self, op: str, x: Tensor | None = None) -> int:
        shape, dtype = ((), "object") if x is None else (x.shape, x.dtype)
        return self.box.enter(op, shape, dtype, self.axis, self.ranks)
