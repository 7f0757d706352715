"""Ranks that stay for many tasks: a task that crashes or hangs ends its ranks, and the next task starts new ones."""

import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from launch.place import free_port
from tests.distributed import FORKSERVER

MEMORY = 12 << 30  # bytes of addresses of each rank
GRACE = 3  # seconds that the other ranks have after one has failed
DIED = "a rank died"
LONGEST = 300  # characters of an error
TASKS = 25  # of one set of ranks: each leaves process groups behind


class TaskError(Exception):
    """The first line of what a rank raised, or that it died or took too long."""


def preload() -> None:
    """Ranks start with Transformers imported. Not for tests, whose other ranks do without."""
    FORKSERVER.set_forkserver_preload(["tests.zoo_step"])


class Pool:
    def __init__(self, world: int, tasks: int = TASKS) -> None:
        """`tasks`: after so many come new ranks."""
        self.world, self.most = world, tasks
        self.ranks: list[tuple[Any, Connection]] = []
        self.tasks = 0

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
        """`function(*arguments)` on every rank; their values in rank order. Raises `TaskError`."""
        if not self.ranks or self.tasks >= self.most:
            self.stop()
            self._start()
        self.tasks += 1
        answers: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout
        try:
            for _, connection in self.ranks:
                connection.send((function, arguments))
            while len(answers) < self.world and time.monotonic() < deadline:
                waiting = {connection: i for i, (_, connection) in enumerate(self.ranks) if i not in answers}
                for connection in wait(list(waiting), timeout=0.5):
                    assert isinstance(connection, Connection)
                    rank = waiting[connection]
                    answers[rank], failure = self._answer(rank)
                    if failure:
                        failures.append(failure)
                        deadline = min(deadline, time.monotonic() + GRACE)
        except BaseException:
            self.stop()
            raise
        if failures or len(answers) < self.world:
            self.stop()
            # After one rank has failed, others lose their connection to it: what they say of that explains nothing.
            own = [each for each in failures if "onnection" not in each]
            raise TaskError((own or failures or [f"no answer in {timeout:.0f} s"])[0])
        return [answers[rank] for rank in range(self.world)]

    def stop(self) -> None:
        for process, connection in self.ranks:
            process.kill()
            process.join()
            connection.close()
        self.ranks, self.tasks = [], 0

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.world):
            here, there = FORKSERVER.Pipe()
            process = FORKSERVER.Process(target=_rank, args=(rank, self.world, port, there), daemon=True)
            process.start()
            there.close()
            self.ranks.append((process, here))

    def _answer(self, rank: int) -> tuple[Any, str]:
        process, connection = self.ranks[rank]
        try:
            return connection.recv()
        except (EOFError, ConnectionError):
            process.join(1)
            return None, f"{DIED} with exit code {process.exitcode}"


@contextmanager
def lasting(world: int) -> Iterator[Pool]:
    """Ranks that stay for all tests of a file: they import Transformers once."""
    pool = Pool(world, tasks=1000)
    yield pool
    pool.stop()


def _rank(rank: int, world: int, port: int, tasks: Connection) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # What Transformers reads where torchrun sets it.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    while True:
        try:
            function, arguments = tasks.recv()
        except EOFError:
            return
        try:
            tasks.send((function(*arguments), ""))
        except BaseException as error:
            tasks.send((None, _first_line(error)))


def _first_line(error: BaseException) -> str:
    """The kind of the error, its first line that says something, and the place that raised it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = traceback.extract_tb(error.__traceback__)
    place = next((each for each in reversed(frames) if "/transformers/" in each.filename), frames[-1])
    said = lines[0][:LONGEST] if lines else f"{frames[-1].line} in {frames[-1].name}"
    return f"{type(error).__name__}: {said} ({os.path.basename(place.filename)}:{place.lineno})"
