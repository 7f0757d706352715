"""What a device has finished, for the black box: on a GPU the host only enqueues its collectives, and runs ahead.

The host's notes (entered, waited for, left) are applied to the black box when the device comes to where the host wrote
them: an event is recorded on the stream beside each note, and a thread asks the events in their order.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from tptrain.watch.black_box import BlackBox
from tptrain.watch.outcome import Outcome, device_fault

POLL_S = 0.05


class Event(Protocol):
    """A place in a stream of work, such as `torch.cuda.Event`."""

    def record(self) -> None:
        """Be the place that the current stream has now reached on the host."""
        ...

    def query(self) -> bool:
        """Whether the device has come to it. Does not wait."""
        ...


class DeviceClock:
    """Notes on a stream, applied in their order, each once the device has come to it.

    The trainer's threads only append, and the polling thread only takes away: a deque needs no lock for that.
    """

    def __init__(self, new_event: Callable[[], Event], on_failure: Callable[[str], None] = lambda text: None) -> None:
        """`on_failure` gets the text of the error with which the device fails."""
        self.new_event, self.on_failure = new_event, on_failure
        self.notes: deque[tuple[Event, Callable[[int], None], int]] = deque()
        self.free: deque[Event] = deque()  # events to use again: making one takes longer than recording it

    def note(self, apply: Callable[[int], None], number: int) -> None:
        """Call `apply(number)` once the device comes to where its stream ends now."""
        event = self.free.pop() if self.free else self.new_event()
        event.record()
        self.notes.append((event, apply, number))

    def poll(self) -> None:
        """Apply the notes that the device has come to. Returns at once, whatever the device does."""
        while self.notes and self.notes[0][0].query():
            event, apply, number = self.notes.popleft()
            apply(number)
            self.free.append(event)

    def _run(self) -> None:
        while True:
            try:
                self.poll()
            except RuntimeError as error:  # the device has failed: what it had finished is known
                self.on_failure(str(error))
                return
            time.sleep(POLL_S)

    def start(self) -> "DeviceClock":
        """Poll from a thread of its own, for as long as the process lives."""
        threading.Thread(target=self._run, name="device-clock", daemon=True).start()
        return self


def device_clock(device: torch.device, box: BlackBox) -> DeviceClock | None:
    """For ranks on a GPU; None on a CPU, whose collectives are done when they return.

    That the device fails is noted in the box: NCCL's own thread may end the process before another hears of it.
    """

    def on_failure(text: str) -> None:
        if fault := device_fault(text):
            box.end(Outcome.DEVICE, fault)

    return DeviceClock(torch.cuda.Event, on_failure).start() if device.type == "cuda" else None
