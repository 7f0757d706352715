"""From the raw figures of a cell to the numbers of its table. Imports no torch."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .cells import CHECKED_STEPS, TOLERANCE, Machine, Model
from .roster import Entry

BUSY = 0.1  # share of the cores from which on a run counts as disturbed by other work


@dataclass
class Row:
    """A contestant in a cell, and all that was measured of it."""

    entry: Entry
    rounds: list[dict[str, Any]] = field(default_factory=list)  # as `runs.run` gives them
    failure: str | None = None
    communication: float | None = None  # share of a step
    speeds: list[float] = field(default_factory=list)  # tokens/s of each round
    busy: list[float] = field(default_factory=list)  # share of the cores that others used just before each round's run
    worst: float | None = None  # largest relative distance of a checked loss from the baseline's; None: not compared

    @property
    def speed(self) -> float | None:
        return median(self.speeds) if self.speeds else None


@dataclass
class Cell:
    model: Model
    precision: str
    machine: Machine
    rows: list[Row]
    limits: list[float] = field(default_factory=list)  # seconds of a step's matrix products, of each round
    baseline: str = ""  # label of the row whose losses the others are held against

    @property
    def title(self) -> str:
        m = self.model
        return (
            f"{m.name} {self.precision}: {m.layers} layers, hidden {m.hidden}, vocabulary {m.vocab}, "
            f"{m.batch} x {m.seq_len} tokens; {self.machine}"
        )

    def summarise(self, warmup: int) -> None:
        """Fill the derived figures. A round's speed is that of its median step: one disturbed step does not count."""
        for row in self.rows:
            row.speeds = [self.model.tokens / median(one["seconds"][warmup:]) for one in row.rounds]
        complete = [row for row in self.rows if row.rounds]
        if not complete:
            return
        self.baseline = complete[0].entry.label
        reference = complete[0].rounds[0]["losses"][:CHECKED_STEPS]
        for row in (row for row in complete if not row.entry.own_weights):
            row.worst = max(
                float("inf") if own != own else abs(own / theirs - 1)
                for one in row.rounds
                for own, theirs in zip(one["losses"], reference, strict=False)
            )

    def agrees(self, row: Row) -> bool:
        return row.worst is None or row.worst <= TOLERANCE[self.precision]

    def row_of(self, key: str) -> Row | None:
        return next((row for row in self.rows if row.entry.key == key), None)

    def best_peer(self) -> Row | None:
        peers = [row for row in self.rows if row.entry.kind == "peer" and row.speed]
        return max(peers, key=lambda row: row.speed or 0.0, default=None)

    def limit_share(self, row: Row) -> float | None:
        """Which part of the step the matrix products alone would take, at the measured limit."""
        if not self.limits or not row.speed:
            return None
        return median(self.limits) * row.speed / self.model.tokens

    def mfu(self, row: Row) -> float | None:
        """From tptrain's own: the FLOPs of a token are the same for all."""
        ours = self.row_of("tptrain")
        known = [share for one in ours.rounds for share in one["mfu"]] if ours else []
        return median(known) * row.speed / ours.speed if ours and known and row.speed and ours.speed else None

    def disturbed(self) -> str | None:
        """A warning where other work was on the machine."""
        shares = [share for row in self.rows for share in row.busy]
        count = sum(share > BUSY for share in shares)
        if not count:
            return None
        return f"{self.model.name} {self.precision}: other work used the cores before {count} of {len(shares)} runs"

    def failed(self) -> list[str]:
        """What makes the exit code 1: a loss that differs, or no result of tptrain."""
        wrong = [f"{row.entry.label}: losses differ" for row in self.rows if not self.agrees(row)]
        ours = [row for row in self.rows if row.entry.kind != "peer"]
        return wrong + [f"{row.entry.label}: did not run" for row in ours if row.failure]


def ratio(row: Row, other: Row | None) -> float | None:
    """Of their speeds: the median of the rounds' ratios, as what slows a round down slows all in it down."""
    pairs = list(zip(row.speeds, other.speeds, strict=False)) if other else []
    return median(own / theirs for own, theirs in pairs) if pairs else None


def one_line(failure: str) -> str:
    """The line of a log's end that says most, without torch's `[rank0]: ` before it."""
    lines = [line.split("]: ", 1)[-1].strip() for line in failure.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or line.startswith("error")]
    return (telling or lines or ["no output"])[-1][:160]
