"""What a GPU's collectives look like to the black box and to the verdict.

There is no GPU here: the events are stand-ins that a test lets complete. Everything else is the real code: the
collectives of real groups, the black box, the waits and the verdict.
"""

import threading
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from tests.commands import wait_until
from tptrain.parallel import connect
from tptrain.parallel.collectives import Work, all_reduce_
from tptrain.parallel.communicators import Nobody
from tptrain.parallel.device_clock import DeviceClock, device_clock
from tptrain.parallel.group import Group
from tptrain.parallel.mesh import tp_grid
from tptrain.watch.black_box import SLOTS, BlackBox
from tptrain.watch.outcome import Outcome
from tptrain.watch.verdict import Report, Verdict, judge


class Device:
    """A stand-in for a GPU: one stream, in which `done` events have completed."""

    def __init__(self) -> None:
        self.recorded = self.done = self.events = 0

    def event(self) -> "StandIn":
        self.events += 1
        return StandIn(self)


class StandIn:
    def __init__(self, device: Device) -> None:
        self.device, self.place = device, 0

    def record(self) -> None:
        self.device.recorded += 1
        self.place = self.device.recorded

    def query(self) -> bool:
        return self.place <= self.device.done


class Rank:
    """One of the ranks on a tp axis, with a device of its own."""

    def __init__(self, rank: int, world: int = 2) -> None:
        self.rank, self.world, self.device, self.box = rank, world, Device(), BlackBox()
        self.clock = DeviceClock(self.device.event)
        self.tp = Group("tp", tuple(range(world)), Nobody(), self.box, self.clock)

    def begin(self) -> Work:
        return all_reduce_(torch.zeros(4), self.tp)

    def finish(self, count: int = 1) -> None:
        """Enqueue so many collectives, each waited for at once: three events for each."""
        for _ in range(count):
            self.begin().wait()

    def come_to(self, events: int) -> None:
        self.device.done = events
        self.clock.poll()

    def report(self, kind: str = "hang") -> Report:
        cause = {"kind": kind, "message": "silent for 9 s in the phase `step`"}
        return {
            "rank": self.rank,
            "world": self.world,
            "node": f"n{self.rank}",
            "time": 100.0,
            "phase": "step",
            "step": 3,
            "entered": self.box.state.entered,
            "cause": cause,
            "top": "",
            "groups": self.box.group_counts(),
            "collectives": self.box.collectives(),
        }


def judged(ranks: list[Rank]) -> Verdict:
    reports = {rank.rank: rank.report() for rank in ranks}
    verdict = judge(reports, len(ranks), [])
    assert judge(dict(reversed(reports.items())), len(ranks), []) == verdict
    return verdict


STATES = ("enqueued", "background", "left")


def states(box: BlackBox) -> list[str]:
    """Of each collective, in a word."""
    return [next((name for name in STATES if call[name]), "inside") for call in box.collectives()]


def test_a_collective_is_where_the_device_is_and_not_where_the_host_is() -> None:
    rank = Rank(0)
    work = rank.begin()
    assert (states(rank.box), rank.box.group_counts()[0]["entered"]) == (["enqueued"], 0)
    work.wait()
    assert states(rank.box) == ["enqueued"]
    for events, state in ((1, "background"), (2, "inside"), (3, "left")):
        rank.come_to(events)
        assert (states(rank.box), rank.box.group_counts()[0]["entered"]) == ([state], 1)


@pytest.mark.parametrize("stuck", [0, 1, 2])
def test_the_rank_whose_device_does_not_come_to_a_collective_is_to_blame(stuck: int) -> None:
    """All hosts have enqueued the same: by their own word, no rank is behind another."""
    ranks = [Rank(rank, 3) for rank in range(3)]
    for rank in ranks:
        rank.finish(5)
        rank.come_to(6 if rank.rank == stuck else 8)  # two done; the others are inside the third
    verdict = judged(ranks)
    assert (verdict.kind, verdict.rank, verdict.node) == ("hang", stuck, f"n{stuck}")
    others = ", ".join(str(rank) for rank in range(3) if rank != stuck)
    assert "enqueued, and its device never came to, collective 3, all_reduce of (4,) float32" in verdict.text
    assert f"while ranks {others} waited" in verdict.text


def test_a_rank_whose_host_is_behind_is_named_as_on_a_cpu() -> None:
    ranks = [Rank(0), Rank(1)]
    for rank, count in zip(ranks, (5, 2), strict=True):
        rank.finish(count)
        rank.come_to(8 - 2 * rank.rank)
    verdict = judged(ranks)
    assert (verdict.rank, verdict.node) == (1, "n1")
    assert "never entered collective 3" in verdict.text


@pytest.mark.parametrize("events", [0, 6, 8, 15], ids=["none", "between", "inside", "all"])
def test_equal_evidence_blames_nobody(events: int) -> None:
    ranks = [Rank(0), Rank(1)]
    for rank in ranks:
        rank.finish(5)
        rank.come_to(events)
    verdict = judged(ranks)
    assert (verdict.kind, verdict.rank, verdict.node) == ("hang", None, None)
    assert ("the network between them" in verdict.text) == (events == 8)


def test_a_device_that_computes_while_a_collective_travels_does_not_wait_for_it() -> None:
    """Rank 1 began a collective in the background, and its device hangs before the wait: the others went on."""
    ranks = [Rank(0), Rank(1)]
    for rank in ranks:
        work = rank.begin()
        work.wait()
        rank.finish()
    ranks[0].come_to(5)  # inside the second
    ranks[1].come_to(1)  # the first travels, and the device has not come to its end
    verdict = judged(ranks)
    assert (verdict.rank, verdict.node) == (1, "n1")


def test_a_late_rank_catches_up() -> None:
    """It is to blame while its device has yet to come to a collective that the other waits in, and then no more."""
    ranks = late, other = Rank(0), Rank(1)
    for rank in ranks:
        rank.finish(3)
    other.come_to(8)  # inside the third
    for events in range(10):
        late.come_to(events)
        assert states(late.box).count("left") == events // 3
        behind = events < 7 and events % 3 != 2  # else it is inside one that both have come to
        assert judged([*ranks]).node == ("n0" if behind else None)


def test_a_poll_returns_while_the_device_hangs_and_the_host_goes_on() -> None:
    """The trainer enqueues from its own thread while another polls a device that never answers."""
    rank = Rank(0)
    polls, done = [0], threading.Event()

    def poll() -> None:
        while not done.is_set():
            rank.clock.poll()
            polls[0] += 1

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        rank.finish(200)
        before = polls[0]
        wait_until(lambda: polls[0] > before + 10, "polls go on, and take nothing away", timeout_s=10)
        assert (states(rank.box), len(rank.clock.notes)) == (["enqueued"] * 200, 600)
        rank.device.done = rank.device.recorded
        wait_until(lambda: not rank.clock.notes, "all notes applied", timeout_s=10)
    finally:
        done.set()
        rank.device.done = rank.device.recorded  # or a poll that waits for it would not end
        poller.join()
    assert states(rank.box) == ["left"] * 200


def test_the_trainer_writes_notes_while_a_query_takes_long() -> None:
    """Of a driver that is stuck: the polling thread holds nothing that the trainer needs."""
    rank, entered, let = Rank(0), threading.Event(), threading.Event()

    def query(event: Any) -> bool:
        entered.set()
        return not let.wait(60)

    rank.finish()
    rank.clock.notes[0] = (Mute(query), *rank.clock.notes[0][1:])
    poller = threading.Thread(target=rank.clock.poll)
    trainer = threading.Thread(target=rank.finish, args=(5,), daemon=True)
    poller.start()
    try:
        assert entered.wait(60)
        trainer.start()
        trainer.join(5)
        assert not trainer.is_alive(), "the trainer waits for the poll"
        assert len(rank.clock.notes) == 18
    finally:
        let.set()
        poller.join()


def test_a_gpu_s_clock_is_polled_by_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    device, thread, applied = Device(), [], threading.Event()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    clock = device_clock(torch.device("cuda", 3), BlackBox())
    assert clock is not None
    clock.note(lambda number: (thread.append(threading.current_thread().name), applied.set()), 1)  # type: ignore[arg-type]
    assert not applied.is_set()
    device.done = 1
    assert applied.wait(60)
    assert thread == ["device-clock"]
    assert device_clock(torch.device("cpu"), BlackBox()) is None


def test_every_group_of_a_mesh_has_the_clock_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not those that carry Python objects over gloo: these are done when they return."""
    clock = DeviceClock(Device().event)
    monkeypatch.setattr(connect, "device_clock", lambda device, box: clock if device.type == "cuda" else None)
    monkeypatch.setattr(connect, "own_group", Mock())
    for name, value in (("is_initialized", True), ("get_rank", 2), ("get_world_size", 4), ("get_backend", "nccl")):
        monkeypatch.setattr(dist, name, Mock(return_value=value))
    monkeypatch.setattr(dist, "new_group", Mock())
    mesh = connect.connect(tp_grid(4, 2, 2), torch.device("cuda", 0))
    assert mesh.groups.keys() >= {"tp", "dp"}
    assert {group.clock for group in mesh.groups.values()} == {clock}
    assert mesh.control.group is not None
    assert mesh.control.group.clock is None


def test_events_are_used_again() -> None:
    rank = Rank(0)
    for _ in range(10):
        rank.finish(2)
        rank.come_to(rank.device.recorded)
    assert rank.device.events == 6


def test_a_note_that_comes_after_the_ring_has_wrapped_harms_no_other() -> None:
    rank = Rank(0)
    rank.finish(SLOTS + 5)
    rank.come_to(6)  # the records of the first two have been overwritten
    assert set(states(rank.box)) == {"enqueued"}


def test_a_device_that_fails_ends_the_polling_and_keeps_what_is_known() -> None:
    rank = Rank(0)
    rank.finish(2)
    rank.come_to(3)

    def query(event: Any) -> bool:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    rank.clock.notes[0] = (Mute(query), *rank.clock.notes[0][1:])
    rank.clock._run()  # returns
    assert states(rank.box) == ["left", "enqueued"]


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        (
            "CUDA error: uncorrectable ECC error encountered\nCompile with",
            (Outcome.DEVICE, "the device failed: CUDA error: uncorrectable ECC error encountered"),
        ),
        ("CUDA error: an illegal memory access was encountered", (None, "")),
    ],
)
def test_that_the_device_fails_is_noted_before_nccl_ends_the_process(
    text: str, ending: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def query(event: Any) -> bool:
        raise RuntimeError(text)

    monkeypatch.setattr(torch.cuda, "Event", lambda: Mute(query))
    monkeypatch.setattr(DeviceClock, "start", lambda clock: clock)
    box = BlackBox()
    clock = device_clock(torch.device("cuda"), box)
    assert clock is not None
    clock.note(lambda number: None, 1)
    clock._run()
    assert box.ending() == ending


class Mute:
    def __init__(self, query: Any) -> None:
        self.query = lambda: query(self)

    def record(self) -> None: ...
