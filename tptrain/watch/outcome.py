"""How a rank or an attempt ended: every way there is, and what follows from it."""

from enum import StrEnum

# What CUDA says only where a device or what drives it has failed. Not: an assert, an illegal address or instruction,
# which are a kernel's errors as a rule; an unspecified launch failure or an unknown error, which may be either.
DEVICE_FAULTS = (
    "uncorrectable ECC error encountered",  # cudaErrorECCUncorrectable
    "uncorrectable NVLink error",  # cudaErrorNvlinkUncorrectable
    "GPU is lost",  # NVML, where it has fallen off the bus
    "system not yet initialized",  # cudaErrorSystemNotReady: the node's fabric manager does not run
)


class Outcome(StrEnum):
    """The values stand in reports, verdict.json and attempts.jsonl. Where ranks of one attempt have ended in several of
    the announced ways, the one that stands first here is the cause of the others.
    """

    DONE = "done"
    CANCELLED = "cancelled"  # by the user: Ctrl-C, `cancel` or scancel
    STOPPED = "stopped"  # on a signal of the scheduler, and is to go on later
    USER = "user"  # a mistake in what the user asked for
    DIVERGED = "diverged"  # the loss or the gradient norm is no finite number
    DISK = "disk"  # no space left
    DEVICE = "device"  # a device of the rank's node failed
    BUG = "bug"  # an error that nothing expects
    MISMATCH = "mismatch"  # the rank entered another collective than its peers
    DIED = "died"  # killed by a signal
    HANG = "hang"  # silent for longer than its phase allows
    GONE = "gone"  # cannot be reached: the node or all processes of the rank are gone
    INFRA = "infra"  # peers were lost, or ranks did not meet: follows from something else, and blames nobody
    WAITING = "waiting"  # ended because another rank failed
    TIMEOUT = "timeout"  # Slurm's time limit
    SUPERSEDED = "superseded"  # a later attempt of the same job has taken over the run

    @property
    def exit_code(self) -> int:
        """Of a rank whose trainer ends so by itself. A rank that its supervisor ends exits with 1, however it ended."""
        if self == Outcome.DONE or self.early:
            return 0
        return {Outcome.USER: 2, Outcome.DISK: 4}.get(self, 1)

    @classmethod
    def of_exit_code(cls, code: int) -> "Outcome":
        """What a rank's exit code alone tells, where no rank has left a report."""
        return {outcome.exit_code: outcome for outcome in (cls.DONE, cls.USER, cls.DISK)}.get(code, cls.INFRA)

    @property
    def early(self) -> bool:
        """Whether the run was asked to end before its last step."""
        return self in (Outcome.CANCELLED, Outcome.STOPPED)

    @property
    def announced(self) -> bool:
        """Whether the rank itself has told the user why it ends: no verdict is printed."""
        return self.early or self in (Outcome.SUPERSEDED, Outcome.USER, Outcome.DIVERGED, Outcome.DISK)

    @property
    def final(self) -> str | None:
        """Why another try is of no use, or None where it may be."""
        return {
            Outcome.DONE: "the run is finished",
            Outcome.CANCELLED: "the user stopped it",
            Outcome.USER: "the mistake would repeat itself",
            Outcome.DIVERGED: "the loss would be no number again",
            Outcome.DISK: "the disk is full",
        }.get(self)

    @property
    def blames_node(self) -> bool:
        """Whether the node of the rank to blame is kept out of the next attempt."""
        return self in (Outcome.DEVICE, Outcome.DIED, Outcome.GONE, Outcome.HANG, Outcome.MISMATCH)


def device_fault(text: str) -> str | None:
    """What an error's text says of a device that has failed; None where it is of something else."""
    lines = (line for line in text.splitlines() if any(fault in line for fault in DEVICE_FAULTS))
    return next((f"the device failed: {line}" for line in lines), None)
