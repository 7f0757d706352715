"""What a rank is doing, in memory that outlives it: phase, step, stop signals and the last collectives it entered.

The trainer writes, its supervisor (another process on the same node, see supervisor.py) reads: the record is
whole even where the trainer was killed, stopped, or aborted by gloo in the middle of a collective. Imports no torch.
"""

import ctypes
import mmap
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import CodeType, FrameType
from typing import Any

from tptrain.watch.outcome import Outcome

PHASES = ("rendezvous", "build", "first_step", "step", "checkpoint", "end")
SLOTS, SLOT_BYTES = 4096, 256  # the last collectives: some steps of a deep model, 1 MiB
TEXT_BYTES = 2000
SAME_SIGNAL_S = 3  # Slurm signals every process of a rank, some of them twice: within this time it is one signal


class _State(ctypes.Structure):
    _fields_ = (
        ("phase", ctypes.c_int32),
        ("step", ctypes.c_int64),  # the last that was finished
        ("since", ctypes.c_double),  # monotonic clock at the last sign of life
        ("launched", ctypes.c_double),  # unix time of the command that started the run; 0 where not known
        ("began", ctypes.c_double * (1 + len(PHASES))),  # unix time: of this record, and of each phase the first time
        ("entered", ctypes.c_int64),  # collectives, over the whole life of the trainer
        ("signal", ctypes.c_int32),  # the first that asked for a stop; 0 for none
        ("signalled", ctypes.c_double),  # monotonic clock, then
        ("signalled_again", ctypes.c_int32),
        ("end_time", ctypes.c_double),  # unix time at which Slurm kills the job, on rank 0; 0 where not known
        ("ending", ctypes.c_char * TEXT_BYTES),  # outcome, newline, message: how the trainer ended, in its own words
    )


class BlackBox:
    """Shared between a trainer and its supervisor by being made before the fork."""

    def __init__(self) -> None:
        size = ctypes.sizeof(_State)
        self.memory = mmap.mmap(-1, size + SLOTS * SLOT_BYTES)
        self.state = _State.from_buffer(self.memory)
        self.slots = size
        self.rank = 0
        self.texts: dict[tuple[Any, ...], bytes] = {}  # of collectives that were entered before
        self.counts_signals = True  # not in the trainer: its handler may run long after the signal came
        self.state.began[0] = time.time()
        self.touch()

    # ------------------------------------------------------------------------------------------------ signs of life

    @property
    def phase(self) -> str:
        return PHASES[self.state.phase]

    def touch(self, phase: str | None = None) -> None:
        """The trainer is alive, and in this phase from now on (None: still in the same)."""
        if phase is not None:
            self.state.phase = PHASES.index(phase)
            self.state.began[1 + self.state.phase] = self.state.began[1 + self.state.phase] or time.time()
        self.state.since = time.monotonic()

    def start_up(self) -> dict[str, float]:
        """Seconds from the launch to the end of the first step, by what they went for; the launch, which has Slurm's
        queue in it, where its time is known.
        """
        names = ("launch", "imports", "rendezvous", "data and model", "first step")
        times = [self.state.launched, *self.state.began[: len(names)]]
        parts = {name: end - start for name, start, end in zip(names, times, times[1:], strict=False)}
        return {name: seconds for name, seconds in parts.items() if name != "launch" or self.state.launched}

    def end(self, outcome: Outcome, message: str = "") -> None:
        """How the trainer ends, and why, for people."""
        self.state.ending = f"{outcome}\n{message}".encode()[: TEXT_BYTES - 1]

    def ending(self) -> tuple[Outcome | None, str]:
        """Outcome and message; None and empty where the trainer had no time to say."""
        outcome, _, message = self.state.ending.decode(errors="replace").partition("\n")
        return Outcome(outcome) if outcome else None, message

    # ---------------------------------------------------------------------------------------------------- signals

    def on_signal(self, number: int, frame: FrameType | None = None) -> None:
        """A handler: notes the first signal, and whether it came again. Safe in both processes."""
        now = time.monotonic()
        if not self.state.signal:
            self.state.signalled = now
            self.state.signal = number
        elif self.counts_signals and number == self.state.signal and now - self.state.signalled > SAME_SIGNAL_S:
            self.state.signalled_again = 1

    @property
    def signal(self) -> str | None:
        """The name of the signal that asked for a stop, if one did."""
        return signal.Signals(self.state.signal).name if self.state.signal else None

    # ------------------------------------------------------------------------------------------------- collectives

    def enter(self, op: str, shape: tuple[int, ...], dtype: Any, axis: str, ranks: Sequence[int]) -> int:
        """Note that a collective is entered; returns the number to `leave` it by, the first being 1."""
        number = self.state.entered + 1
        frame = sys._getframe(2)
        call = (op, shape, dtype, axis, ranks[0], ranks[-1], len(ranks), _places(frame))
        if call not in self.texts:
            members = f"{ranks[0]}:{ranks[-1] + 1}:{ranks[1] - ranks[0] if len(ranks) > 1 else 1}"
            kind = str(dtype).removeprefix("torch.")
            self.texts[call] = f"{op}\t{tuple(shape)}\t{kind}\t{axis}\t{members}\t{_call_site(frame)}".encode()
        text = b"%d\t%b" % (number, self.texts[call])
        text = text[: SLOT_BYTES - 3]
        start = self.slots + number % SLOTS * SLOT_BYTES
        self.memory[start : start + 3 + len(text)] = b"\0" + len(text).to_bytes(2, "big") + text
        self.state.entered = number
        self.touch()
        return number

    def leave(self, number: int) -> None:
        """The collective has returned (over NCCL: has been handed to the device)."""
        self.memory[self.slots + number % SLOTS * SLOT_BYTES] = 1
        self.touch()

    def collectives(self) -> list[dict[str, Any]]:
        """The last collectives, oldest first."""
        found = []
        last = self.state.entered
        for number in range(max(1, last - SLOTS + 2), last + 1):
            start = self.slots + number % SLOTS * SLOT_BYTES
            length = int.from_bytes(self.memory[start + 1 : start + 3], "big")
            fields = self.memory[start + 3 : start + 3 + length].decode(errors="replace").split("\t")
            if len(fields) == 7 and fields[0] == str(number):
                low, high, stride = (int(n) for n in fields[5].split(":"))
                call = dict(zip(("op", "shape", "dtype", "axis"), fields[1:5], strict=True))
                ranks = list(range(low, high, stride))
                found.append(
                    {"number": number, **call, "ranks": ranks, "site": fields[6], "left": bool(self.memory[start])}
                )
        return found


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OURS: dict[int, tuple[CodeType, bool]] = {}


def _ours(code: CodeType) -> bool:
    """Whether it is named in call sites: not what is torch's, nor what passes every collective on."""
    if id(code) not in _OURS:
        passes_on = code.co_filename.endswith(("collectives.py", "mesh.py"))
        _OURS[id(code)] = code, code.co_filename.startswith(_PACKAGE) and not passes_on
    return _OURS[id(code)][1]


def _places(frame: FrameType | None) -> tuple[int, ...]:
    """The innermost three that are ours, in numbers: lines and names take longer."""
    places: list[int] = []
    while frame is not None and len(places) < 6:
        if _ours(frame.f_code):
            places += (id(frame.f_code), frame.f_lasti)
        frame = frame.f_back
    return tuple(places)


def _call_site(frame: FrameType | None) -> str:
    """Who called, innermost first: `layers.py:141 row_parallel < model.py:79 forward`. Frames of torch are left out."""
    places = []
    while frame is not None and len(places) < 3:
        if _ours(code := frame.f_code):
            places.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(places)
