"""Collectives of CPU ranks that share a machine, through memory that all of them map: gloo's take five times as long.

Every rank owns two slots and posts the number of the operation that it has written. Operation n uses slot n % 2: a rank
gets to n + 2 only after it has seen everybody post n + 1, and nobody posts that before it has read what it needs of n.
So no barrier is needed beside the posting, and a slow rank is met by waiting, not by copying.

The memory is anonymous (memfd): nothing is left behind by a crash. Ranks read each other's through /proc, and the flags
rely on x86's order of stores, so this is for Linux on x86-64; `connect` returns None elsewhere.
"""

import ctypes
import math
import mmap
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tptrain.parallel.communicators import Communicator, Finish, Op, nothing

HEADER_BYTES = 4096
SLOT_BYTES = 128 * 2**20  # address space: pages that no message reaches are never made
SMALL_BYTES = 64 * 2**10  # up to here every rank sums all slots whole: the second round costs more than it saves
SPINS = 200  # looks at a flag, about 10 microseconds, before a rank sleeps between two looks
NAP_S = 5e-5  # not sched_yield: on Linux 6.18 a rank that yields starves what else wants its core, for half a minute
CHECK_EVERY = 2000  # looks, for the death of the rank that is waited for


class _Header(ctypes.Structure):
    _fields_ = (("posted", ctypes.c_int64), ("bytes", 2 * ctypes.c_int64), ("pid", ctypes.c_int64))


class SharedMemory:
    """One rank's end. Operations run in the same order on all ranks; one begun is finished before the next begins.

    Results lie in memory of their own. Only a `buffer` lies in a slot: the operand of the next operation, to be written
    and handed to it before any other begins. What is too large to gather or scatter at once goes to `beside`.
    """

    def __init__(self, maps: list[mmap.mmap], index: int, beside: Communicator) -> None:
        self.index, self.size, self.beside = index, len(maps), beside
        self.headers = [_Header.from_buffer(each) for each in maps]
        self.slots = [
            torch.frombuffer(each, dtype=torch.uint8, offset=HEADER_BYTES).view(2, SLOT_BYTES)  # (2, bytes)
            for each in maps
        ]
        self.places = [self.slots[index][turn].data_ptr() for turn in range(2)]  # of this rank's slots
        self.views: dict[tuple[Any, ...], Tensor] = {}  # of slots, by their first use
        self.number = 0  # of the last operation
        self.lent = 0  # the operation whose operand a `buffer` was handed out for; 0: it has been used or lost
        self.unfinished: Callable[[], None] | None = None

    # ---------------------------------------------------------------------------------------------------- operations

    def buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if math.prod(shape) * like.element_size() > SLOT_BYTES:
            return like.new_empty(shape)
        self._finish()
        self.lent = self.number + 1
        return self._view(self.index, self.lent % 2, shape, like.dtype).detach()  # autograd may mark it

    def sum(self, x: Tensor) -> tuple[Tensor, Finish]:
        if not self._in_slot(x):
            return x, self.all_reduce_(x, "sum")
        out = torch.empty_like(x)
        total, operand = out.view(-1), x.view(-1)
        self._post(operand)
        if self.size == 2:
            return out, self._later(lambda: self._sum_of_two(total, operand))
        return out, self._later(lambda: self._sum_in_parts(total, "sum"))

    def all_reduce_(self, x: Tensor, op: Op) -> Finish:
        """In place; all ranks get the same bits."""
        flat, pieces = x.detach().view(-1), -(-x.nbytes // SLOT_BYTES)
        if pieces > 1:
            for piece in flat.chunk(pieces):
                self.all_reduce_(piece, op)()
            return nothing
        self._post(flat)
        return self._later(lambda: self._sum_whole(flat, op) if self._at_once(flat) else self._sum_in_parts(flat, op))

    def all_gather(self, out: Tensor, x: Tensor) -> Finish:
        if x.nbytes > SLOT_BYTES:
            return self.beside.all_gather(out, x)
        parts = out.view(self.size, -1)
        parts[self.index].copy_(x.view(-1))
        self._post(parts[self.index])
        return self._later(lambda: self._collect(parts))

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Finish:
        if x.nbytes > SLOT_BYTES:
            return self.beside.reduce_scatter(out, x)
        self._post(x.view(-1))
        return self._later(lambda: self._sum_part(out.view(-1), x.view(-1), x.numel() // self.size))

    # -------------------------------------------------------------------------------------------------------- sums

    def _at_once(self, x: Tensor) -> bool:
        return self.size == 2 or x.nbytes <= SMALL_BYTES

    def _sum_of_two(self, out: Tensor, x: Tensor) -> None:
        """Of two ranks a + b is b + a, so both get the same bits."""
        torch.add(x, self._read(1 - self.index, x), out=out)

    def _sum_whole(self, x: Tensor, op: Op) -> None:
        """In rank order, so that rounding is alike on every rank."""
        if self.size == 2:
            _add(x, self._read(1 - self.index, x), op)
            return
        total = self._read(0, x).clone()
        for peer in range(1, self.size):
            _add(total, self._read(peer, x), op)
        x.copy_(total)

    def _sum_in_parts(self, x: Tensor, op: Op) -> None:
        """Each rank sums a part of all slots, then collects the others' sums: 2 (n - 1) / n of `x` is read."""
        length = -(-x.numel() // self.size)
        starts = [min(rank * length, x.numel()) for rank in range(self.size + 1)]
        own = x[starts[self.index] : starts[self.index + 1]]
        self._sum_part(own, x, length, op)
        self._post(own)
        for peer in range(self.size):
            if peer != self.index:
                part = x[starts[peer] : starts[peer + 1]]
                part.copy_(self._read(peer, part))

    def _sum_part(self, out: Tensor, x: Tensor, length: int, op: Op = "sum") -> None:
        start = self.index * length
        for peer in range(self.size):
            part = self._read(peer, x)[start : start + length]
            out.copy_(part) if peer == 0 else _add(out, part, op)

    def _collect(self, parts: Tensor) -> None:
        for peer in range(self.size):
            if peer != self.index:
                parts[peer].copy_(self._read(peer, parts[peer]))

    # ------------------------------------------------------------------------------------------------------- slots

    def _later(self, work: Callable[[], None]) -> Finish:
        """What finishes an operation, unless the next one has had to.

        It must not refer to itself: a cycle keeps tensors until Python looks for cycles, many steps later.
        """

        def finish() -> None:
            if self.unfinished is work:
                self._finish()

        self.unfinished = work
        return finish

    def _finish(self) -> None:
        """The operation before: until then the others may read what this rank is about to overwrite."""
        work, self.unfinished = self.unfinished, None
        if work is not None:
            with torch.no_grad():  # autograd has noted the result where the operation began
                work()

    def _post(self, x: Tensor) -> None:
        """Write `x` into the next slot, unless it lies there, and say so."""
        self._finish()
        self.number += 1
        if self._in_slot(x):
            place_is_right = x.data_ptr() == self.places[self.number % 2]
            assert place_is_right and self.lent == self.number, "a buffer of another operation"  # noqa: PT018
        else:
            self._slot(self.index, x).copy_(x)
        self.lent = 0
        self.headers[self.index].bytes[self.number % 2] = x.nbytes
        self.headers[self.index].posted = self.number

    def _in_slot(self, x: Tensor) -> bool:
        return 0 <= x.data_ptr() - self.places[0] < 2 * SLOT_BYTES

    def _slot(self, rank: int, x: Tensor) -> Tensor:
        return self._view(rank, self.number % 2, (x.numel(),), x.dtype)

    def _view(self, rank: int, turn: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The beginning of a slot, kept for the next time: to make it takes longer than to look it up."""
        key = rank, turn, shape, dtype
        if key not in self.views:
            self.views[key] = self.slots[rank][turn, : math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        return self.views[key]

    def _read(self, peer: int, x: Tensor) -> Tensor:
        """What a rank has posted, once it has. Raises DistBackendError for one that is gone or sent something else."""
        header, number, looks = self.headers[peer], self.number, 0
        while header.posted < number:
            looks += 1
            if looks > SPINS:
                time.sleep(NAP_S)
            if looks % CHECK_EVERY == 0 and not _alive(header.pid):
                raise dist.DistBackendError(f"shared memory: process {header.pid} is gone")
        posted = header.bytes[number % 2]
        if posted != x.nbytes:
            raise dist.DistBackendError(f"shared memory: one rank sent {x.nbytes} bytes, another {posted}")
        return self._slot(peer, x)


def _add(x: Tensor, y: Tensor, op: Op) -> None:
    torch.maximum(x, y, out=x) if op == "max" else x.add_(y)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def connect(index: int, exchange: Callable[[Any], list[Any]], beside: Communicator) -> SharedMemory | None:
    """Map every rank's memory; `exchange` gathers a small object of each. None, on all ranks, where one cannot."""
    handle, maps, length = -1, [], HEADER_BYTES + 2 * SLOT_BYTES
    problem = None
    try:
        if platform.machine() != "x86_64":
            raise OSError("not x86-64")
        handle = os.memfd_create("tptrain")
        os.ftruncate(handle, length)
    except (OSError, AttributeError) as error:
        problem = str(error)
    peers = exchange((os.getpid(), handle, problem))
    try:
        if not any(why for _, _, why in peers):
            for pid, descriptor, _ in peers:
                opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
                maps.append(mmap.mmap(opened, length))
                os.close(opened)
            _Header.from_buffer(maps[index]).pid = os.getpid()
    except OSError as error:
        problem = str(error)
    everywhere = exchange(problem)
    if handle >= 0:
        os.close(handle)
    return None if any(everywhere) or len(maps) != len(peers) else SharedMemory(maps, index, beside)
