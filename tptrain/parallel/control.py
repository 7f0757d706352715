"""How ranks agree on small Python objects: over gloo on the CPU, beside the groups that carry tensors."""

import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from tptrain.config import UserError
from tptrain.parallel.communicators import ProcessGroup
from tptrain.parallel.group import Group

T = TypeVar("T")
POLL_S = 0.05  # between two looks for rank 0's answer
LAST_WORDS_S = 5  # for the others to read how rank 0 failed
MAIN_FAILED = "rank 0 failed: "  # and what then follows: the type of its error and the message


class Control:
    """All ranks, for agreements. A group of None is a run of one rank."""

    def __init__(self, group: Group | None, rank: int, store: Any = None) -> None:
        """`store`: of the rendezvous, where rank 0 leaves what the others wait for."""
        self.group, self.rank, self.store = group, rank, store

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        communicator = self.group.communicator if self.group is not None else None
        return communicator.group if isinstance(communicator, ProcessGroup) else None

    def gather(self, value: Any) -> list[Any]:
        """The small object of every rank, in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.group.size
        with self.group.noted("all_gather_object"):
            dist.all_gather_object(values, value, group=self.process_group)
        return values

    def barrier(self) -> None:
        if self.group is not None:
            with self.group.noted("barrier"):
                dist.barrier(group=self.process_group)

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, for all: the others wait as long as it takes; its failure fails every rank."""
        if self.group is None:
            return work()
        value, store = None, self.store or dist.distributed_c10d._get_default_store()
        if self.rank == 0:
            try:
                value = work()
            except BaseException as error:
                store.set("main_first", f"{type(error).__name__}: {error}")
                deadline = time.monotonic() + LAST_WORDS_S  # the store ends with this process
                while store.add("main_first/read", 0) < self.group.size - 1 and time.monotonic() < deadline:
                    time.sleep(POLL_S)
                raise
            store.set("main_first", "done")
        else:
            while not store.check(["main_first"]):  # not store.wait: it warns of every time-out
                self.group.box.touch()
                time.sleep(POLL_S)
            if (answer := store.get("main_first").decode()) != "done":
                store.add("main_first/read", 1)
                raise UserError(f"{MAIN_FAILED}{answer}")
        values = [value]
        with self.group.noted("broadcast_object_list"):  # not a gathering: a large value would come from every rank
            dist.broadcast_object_list(values, group=self.process_group)
        if self.rank == 0:
            store.delete_key("main_first")
        self.barrier()
        return cast(T, values[0])
