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
from functools import cache
from types import CodeType, FrameType
from typing import Any

from tptrain.watch.outcome import Outcome

PHASES = ("rendezvous", "build", "first_step", "step", "checkpoint", "end")
SLOTS, SLOT_BYTES = 4096, 256  # the last collectives: some steps of a deep model, 1 MiB
# State of a collective: the host is inside it, it has returned, the host runs on, the host has handed it to the device.
# The first three are of the device where there is one, as far as is known (parallel/device_clock.py).
INSIDE, LEFT, BACKGROUND, ENQUEUED = range(4)
GROUPS, GROUP_BYTES = 64, 4096  # the groups of a rank; the kernel gives memory only to those that are in use
TEXT_BYTES = 2000
SAME_SIGNAL_S = 3  # Slurm signals every process of a rank, some of them twice: within this time it is one signal


class _State(ctypes.Structure):
    _fields_ = (
        ("phase", ctypes.c_int32),
        ("step", ctypes.c_int64),  # the last that was finished
        ("since", ctypes.c_double),  # monotonic clock at the last sign of life
        ("launched", ctypes.c_double),  # unix time of the command that started the run; 0 where not known
        ("began", ctypes.c_double * (1 + len(PHASES))),  # unix time: of this record, and of each phase the first time
        ("entered", ctypes.c_int64),  # collectives of all groups, over the whole life of the trainer
        ("groups", ctypes.c_int32),  # entries of the table of groups that are in use
        ("signal", ctypes.c_int32),  # the first that asked for a stop; 0 for none
        ("signalled", ctypes.c_double),  # monotonic clock, then
        ("signalled_again", ctypes.c_int32),
        ("end_time", ctypes.c_double),  # unix time at which Slurm kills the job, on rank 0; 0 where not known
        ("ending", ctypes.c_char * TEXT_BYTES),  # outcome, newline, message: how the trainer ended, in its own words
    )


class _Group(ctypes.Structure):
    """One entry of the table of groups, which keeps the counts of groups whose collectives the ring has dropped."""

    _fields_ = (
        ("entered", ctypes.c_int64),  # collectives of this group, over the whole life of the trainer
        ("name", ctypes.c_char * (GROUP_BYTES - 8)),  # axis, tab, ranks
    )


class BlackBox:
    """Shared between a trainer and its supervisor by being made before the fork."""

    def __init__(self) -> None:
        size = ctypes.sizeof(_State)
        self.slots = size + GROUPS * GROUP_BYTES
        self.memory = mmap.mmap(-1, self.slots + SLOTS * SLOT_BYTES)
        self.state = _State.from_buffer(self.memory)
        self.table = (_Group * GROUPS).from_buffer(self.memory, size)
        self.rank = 0
        self.texts: dict[tuple[Any, ...], bytes] = {}  # of collectives that were entered before
        self.groups: dict[tuple[Any, ...], tuple[int, _Group]] = {}  # index and entry in the table, by axis and ranks
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
        """How the trainer ends, and why, for people. Where a device has failed, what comes after follows from it."""
        if self.ending()[0] != Outcome.DEVICE:
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

    def enter(
        self,
        op: str,
        shape: tuple[int, ...],
        dtype: Any,
        axis: str,
        ranks: tuple[int, ...] | range,
        state: int = INSIDE,
    ) -> int:
        """Note that a collective of the group (axis and ranks) is entered; returns its number in the order of this
        rank's collectives, the first being 1, which `leave` takes. All members of a group enter the same collectives,
        from the same places, in the same order; their collectives in other groups are their own.

        The record is published by `state.entered`, and only then counted in the table: a trainer that is killed in
        between leaves a count that `group_counts` completes from the record.
        """
        number = self.state.entered + 1
        index, group = self.groups.get((axis, ranks)) or self._add_group(axis, ranks)
        in_group = group.entered + 1
        frame = sys._getframe(2)
        call = (op, shape, dtype, index, _places(frame))
        call_text = self.texts.get(call)
        if call_text is None:
            kind = str(dtype).removeprefix("torch.")
            call_text = f"{index}\t{op}\t{tuple(shape)}\t{kind}\t{_call_site(frame)}".encode()
            self.texts[call] = call_text
        text = b"%d\t%d\t%b" % (number, in_group, call_text)
        text = text[: SLOT_BYTES - 3]
        start = self.slots + number % SLOTS * SLOT_BYTES
        self.memory[start : start + 3 + len(text)] = bytes((state,)) + len(text).to_bytes(2, "big") + text
        self.state.entered = number
        group.entered = in_group
        self.touch()
        return number

    def run_on(self, number: int) -> None:
        """The collective goes on in the background; this rank does other things until it waits for it."""
        self._set(number, BACKGROUND)

    def wait(self, number: int) -> None:
        """This rank does nothing else from now on until the collective has returned."""
        self._set(number, INSIDE)

    def leave(self, number: int) -> None:
        """The collective has returned."""
        self._set(number, LEFT)
        self.touch()

    def _set(self, number: int, state: int) -> None:
        if self.state.entered - number < SLOTS - 1:  # else the slot is another's by now
            self.memory[self.slots + number % SLOTS * SLOT_BYTES] = state

    def _add_group(self, axis: str, ranks: tuple[int, ...] | range) -> tuple[int, _Group]:
        """A new entry of the table. Its name is whole before `state.groups` shows it to the reader."""
        index, name = self.state.groups, f"{axis}\t{text_of(ranks)}".encode()
        assert index < GROUPS, f"a rank in more than {GROUPS} groups"
        assert len(name) < GROUP_BYTES - 8, f"{len(ranks)} ranks at uneven distances in the group {axis}"
        self.table[index].name = name
        self.state.groups = index + 1
        self.groups[axis, ranks] = index, self.table[index]
        return self.groups[axis, ranks]

    def collectives(self) -> list[dict[str, Any]]:
        """The last collectives of all groups, oldest first: `number` counts all of this rank's, and `number_in_group`
        those of its group.
        """
        calls = []
        names = self._group_names()
        kinds: dict[bytes, dict[str, Any]] = {}  # by what `enter` has written of them: few, of thousands of calls
        last = self.state.entered
        for number in range(max(1, last - SLOTS + 2), last + 1):
            start = self.slots + number % SLOTS * SLOT_BYTES
            length = int.from_bytes(self.memory[start + 1 : start + 3], "big")
            own, in_group, text = [*self.memory[start + 3 : start + 3 + length].split(b"\t", 2), b"", b""][:3]
            if own != b"%d" % number:
                continue  # cut off while it was written
            if text not in kinds:
                kinds[text] = _kind(text, names)
            if kind := kinds[text]:
                state = self.memory[start]
                states = {"left": state == LEFT, "background": state == BACKGROUND, "enqueued": state == ENQUEUED}
                calls.append({"number": number, "number_in_group": int(in_group)} | kind | states)
        return calls

    def group_counts(self, calls: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """How many collectives of each group this rank has entered; on a GPU, how many its device has come to. `calls`:
        the `collectives`, where they have been read already.
        """
        counts = [
            name | {"entered": group.entered} for name, group in zip(self._group_names(), self.table, strict=False)
        ]
        calls = self.collectives() if calls is None else calls
        for count in counts:
            own = [call for call in calls if (call["axis"], call["ranks"]) == (count["axis"], count["ranks"])]
            if own:  # the last may be published and not yet counted
                count["entered"] = max(count["entered"], own[-1]["number_in_group"])
            count["entered"] -= sum(call["enqueued"] for call in own)
        return counts

    def _group_names(self) -> list[dict[str, Any]]:
        """Axis and ranks (as `text_of` writes them) of each group, in the order of the table."""
        names = []
        for group in self.table[: self.state.groups]:
            axis, _, text = group.name.decode().partition("\t")
            names.append({"axis": axis, "ranks": text})
        return names


def _kind(text: bytes, names: list[dict[str, Any]]) -> dict[str, Any]:
    """What all calls of one kind have in common; empty where the text is cut off."""
    fields = text.decode(errors="replace").split("\t")
    if len(fields) != 5:
        return {}
    return names[int(fields[0])] | dict(zip(("op", "shape", "dtype", "site"), fields[1:], strict=True))


def text_of(ranks: Sequence[int]) -> str:
    """Ranks at even distances by their ends: a group of all ranks must not be as long as the world, at every rank."""
    stride = max(1, ranks[1] - ranks[0]) if len(ranks) > 1 else 1
    even = range(ranks[0], ranks[-1] + 1, stride)
    return f"{even.start}:{even.stop}:{stride}" if list(even) == list(ranks) else ",".join(map(str, ranks))


@cache
def ranks_of(text: str) -> tuple[int, ...]:
    """What `text_of` wrote."""
    numbers = [int(number) for number in text.replace(":", ",").split(",")]
    return tuple(range(*numbers) if ":" in text else numbers)


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_OURS: dict[int, tuple[CodeType, bool]] = {}


def _ours(code: CodeType) -> bool:
    """Whether it is named in call sites: not what is torch's, nor what passes every collective on."""
    if id(code) not in _OURS:
        passes_on = f"{os.sep}parallel{os.sep}" in code.co_filename
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
    """Who called, innermost first: `linear.py:137 forward < linear.py:83 forward < ffn.py:45 forward`. Not torch's."""
    places = []
    while frame is not None and len(places) < 3:
        if _ours(code := frame.f_code):
            places.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " < ".join(places)
