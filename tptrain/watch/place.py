"""Which rank this is, and the Slurm job that it runs in: what the launcher tells a rank and its supervisor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Place:
    rank: int
    world: int
    node: str  # as Slurm calls it
    job: str  # who started it: the same for all attempts of a requeued job
    restart: int  # how often the job was restarted before
    address: str = "127.0.0.1"  # of the node of rank 0
    stand_in: int = 1  # the rank whose supervisor collects reports where rank 0's is gone: on another node if it can be
    nodes: tuple[str, ...] = ()  # of each rank, where the scheduler tells

    @property
    def attempt(self) -> str:
        """Names this try to run the job: ranks of two attempts never meet, and what they leave lies apart."""
        return f"{self.job}-{self.restart}"


class Allocation(Protocol):
    """What a rank and its supervisor ask of the scheduler; launch/allocation.py answers for Slurm."""

    def end_time(self) -> float | None:
        """Unix time at which the scheduler kills the job, or None."""
        ...

    def reason(self, signals: set[str]) -> tuple[str, bool, float | None]:
        """Why the job is to stop, whether it should go on later, and the unix time of its end where that is known."""
        ...


@dataclass(frozen=True)
class FlightRecorder:
    """PyTorch's record of NCCL's collectives: the trainer writes `record` once its `pipe` is written to."""

    record: Path
    pipe: Path
