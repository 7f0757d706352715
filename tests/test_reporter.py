"""The supervisors' connections: real sockets, and ranks that are threads here or lie beyond a network that is cut."""

import asyncio
import contextlib
import json
import os
import pickle
import socket
import stat
import subprocess
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from tests.commands import wait_until
from tests.test_verdict import report
from tptrain.watch import collector, wire
from tptrain.watch.black_box import SLOTS, BlackBox
from tptrain.watch.packed import pack, unpack
from tptrain.watch.place import Place
from tptrain.watch.reporter import Reporter
from tptrain.watch.verdict import Absence, judge
from tptrain.watch.wire import Connection, WireError

PER_NODE = 8


def place(rank: int, world: int, per_node: int = PER_NODE, address: str = "127.0.0.1") -> Place:
    return Place(rank, world, f"n{rank // per_node}", "job", 0, address, per_node if per_node < world else 1)


class Ranks:
    """The reporters of a world, each in its thread, and what they had judged."""

    def __init__(self, folder: Path, world: int, without: tuple[int, ...] = (), per_node: int = PER_NODE) -> None:
        wire.make_secret(folder)
        self.folder, self.world = folder, world
        self.judged: list[tuple[dict[int, Any], dict[int, Absence], dict[int, str]]] = []
        self.by_rank = {
            rank: Reporter(place(rank, world, per_node), folder, lambda *seen: self.judged.append(seen))
            for rank in range(world)
            if rank not in without
        }

    def __enter__(self) -> "Ranks":
        self._connect([reporter for reporter in self.by_rank.values() if reporter.collector is not None])
        self._connect([reporter for reporter in self.by_rank.values() if reporter.collector is None])
        return self

    def _connect(self, reporters: list[Reporter]) -> None:
        """Those that collect come first: a rank that came before the stand-in would get one message more."""
        for reporter in reporters:
            reporter.start()
            wait_until(lambda reporter=reporter: reporter.connected, "a connection", timeout_s=60)

    def __exit__(self, *_: object) -> None:
        for rank, reporter in self.by_rank.items():  # a failed test has not come so far
            reporter.report(pack(report(rank, world=self.world)))
        self.wait(lambda reporter: reporter.released, "the end")

    @property
    def main(self) -> collector.Collector:
        main = self.by_rank[0].collector
        assert main is not None
        return main

    def wait(self, condition: Callable[[Reporter], bool], what: str) -> None:
        wait_until(lambda: all(condition(reporter) for reporter in self.by_rank.values()), what, timeout_s=60)

    def tell(self, *ranks: int, kind: str = "waiting") -> None:
        for rank in ranks:
            self.by_rank[rank].report(pack(report(rank, kind=kind, world=self.world)))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no connection is soon given up."""
    monkeypatch.setattr(collector, "RETURN_S", dict.fromkeys(collector.RETURN_S, 0.4))


# --------------------------------------------------------------------------------------------------------- the reports


def boxed(rank: int, world: int) -> dict[str, Any]:
    """The report of a rank of a grid of tp=8 that has gone through 4,096 collectives and more, and waits in one."""
    box, row = BlackBox(), rank // 8 * 8
    tp, dp = tuple(range(row, row + 8)), tuple(range(rank % 8, world, 8))
    for number in range(SLOTS + 500):
        axis, ranks = ("dp", dp) if number % 130 == 129 else ("tp", tp)
        box.leave(box.enter("all_reduce", (4096, 1 + number % 3), "bfloat16", axis, ranks))
    box.enter("all_gather", (2,), "float32", "model", range(world))
    noted = {"entered": box.state.entered, "groups": box.group_counts(), "collectives": box.collectives()}
    return report(rank, kind="hang" if rank == 5 else "waiting", world=world, tp=8) | noted


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Messages and bytes that all sides have sent."""
    sums, lock = {"messages": 0, "bytes": 0}, threading.Lock()
    send, write = Connection.send, asyncio.StreamWriter.write

    async def counted_send(self: Connection, message: dict[str, Any]) -> None:
        with lock:
            sums["messages"] += 1
        await send(self, message)

    def counted_write(self: asyncio.StreamWriter, data: bytes) -> None:
        with lock:
            sums["bytes"] += len(data)
        write(self, data)

    monkeypatch.setattr(Connection, "send", counted_send)
    monkeypatch.setattr(asyncio.StreamWriter, "write", counted_write)
    return sums


def test_messages_and_bytes_are_linear_in_the_ranks_and_reports_are_judged_once(
    tmp_path: Path, traffic: dict[str, int]
) -> None:
    for_a_rank = []
    for world in (8, 32):
        traffic |= dict.fromkeys(traffic, 0)
        reports = {rank: boxed(rank, world) for rank in range(world)}
        (tmp_path / str(world)).mkdir()
        with Ranks(tmp_path / str(world), world) as ranks:
            ranks.by_rank[5].report(pack(reports[5]))
            ranks.wait(lambda reporter: reporter.failed, "the others hear of it")
            assert not ranks.judged
            for rank in set(ranks.by_rank) - {5}:
                ranks.by_rank[rank].report(pack(reports[rank]))
            ranks.wait(lambda reporter: reporter.released, "the verdict")
            ((packed, absent, nodes),) = ranks.judged
        assert (packed.keys(), absent) == (reports.keys(), {})
        assert nodes == {rank: f"n{rank // 8}" for rank in reports}
        needed = unpack(packed)
        assert judge(needed, world, []) == judge(reports, world, [])
        assert sum(len(each["collectives"]) for each in needed.values()) < 40 * world
        for_a_rank.append({what: amount / world for what, amount in traffic.items()})
    few, many = for_a_rank
    assert few["messages"] <= 6
    assert few["bytes"] < 8_000
    assert all(many[what] <= 1.05 * few[what] for what in traffic), for_a_rank


@pytest.mark.usefixtures("hurried")
def test_a_slow_rank_is_waited_for_and_not_called_gone(tmp_path: Path) -> None:
    with Ranks(tmp_path, 4) as ranks:
        ranks.tell(0, 1, 2, kind="hang")
        wait_until(lambda: len(ranks.main.reports) == 3, "three reports")
        assert not threading.Event().wait(4 * collector.RETURN_S[Absence.ENDED])
        assert not ranks.judged
        ranks.tell(3)
        ranks.wait(lambda reporter: reporter.released, "the verdict")
        ((reports, absent, _),) = ranks.judged
    assert (set(reports), absent) == ({0, 1, 2, 3}, {})


@pytest.mark.usefixtures("hurried")
def test_a_rank_that_can_be_reached_and_does_not_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "SLOW_S", 0.5)
    with Ranks(tmp_path, 4, without=(2,)) as ranks:
        ranks.tell(0, 1, kind="hang")
        ranks.wait(lambda reporter: reporter.released, "the verdict")
        assert ranks.judged[0][1] == {2: Absence.NEVER_CAME, 3: Absence.SILENT}


def test_ranks_that_all_end_well_are_released_without_a_verdict(tmp_path: Path) -> None:
    with Ranks(tmp_path, 4) as ranks:
        ranks.tell(0, 1, 2, kind="done")
        wait_until(lambda: len(ranks.main.reports) == 3, "three reports")
        assert not any(reporter.released for reporter in ranks.by_rank.values())
        ranks.tell(3, kind="done")
        ranks.wait(lambda reporter: reporter.released, "the end")
        assert not any(reporter.failed for reporter in ranks.by_rank.values())
    assert not ranks.judged


def test_a_failure_after_others_have_ended_well(tmp_path: Path) -> None:
    with Ranks(tmp_path, 4) as ranks:
        ranks.tell(0, 1, 2, kind="done")
        ranks.tell(3, kind="bug")
        ranks.wait(lambda reporter: reporter.released, "the verdict")
        ((reports, _, _),) = ranks.judged
    assert [each["cause"]["kind"] for each in reports.values()].count("done") == 3


# ------------------------------------------------------------------------------------------------- one rank by hand


@contextlib.asynccontextmanager
async def connected(ranks: Ranks, port: int, **hello: Any) -> AsyncIterator[Connection]:
    secret = wire.read_secret(ranks.folder)
    assert secret is not None
    link = await wire.dial("127.0.0.1", port, secret, "job-0")
    await link.send({"node": "n0", "port": 0} | hello)
    await link.receive()
    yield link
    link.close()


@pytest.mark.usefixtures("hurried")
def test_a_supervisor_that_ends_without_a_word_ends_the_run(tmp_path: Path) -> None:
    """Nobody may notice it otherwise: its peers' trainers may be in no collective, or on the device."""
    with Ranks(tmp_path, 4, without=(3,)) as ranks:

        async def come_and_go() -> None:
            async with connected(ranks, ranks.main.port, rank=3):
                pass

        asyncio.run(come_and_go())
        ranks.wait(lambda reporter: reporter.failed, "the others hear of it")
        ranks.tell(0, 1, 2)
        ranks.wait(lambda reporter: reporter.released, "the verdict")
        ((reports, absent, nodes),) = ranks.judged
    assert (set(reports), absent, nodes[3]) == ({0, 1, 2}, {3: Absence.ENDED}, "n0")


@pytest.mark.usefixtures("hurried")
def test_a_connection_that_breaks_and_comes_again_is_no_failure(tmp_path: Path) -> None:
    with Ranks(tmp_path, 4, without=(3,)) as ranks:

        async def come_twice() -> None:
            async with connected(ranks, ranks.main.port, rank=3):
                pass
            async with connected(ranks, ranks.main.port, rank=3) as link:
                await asyncio.sleep(collector.RETURN_S[Absence.ENDED] + 0.5)
                assert not any(reporter.failed for reporter in ranks.by_rank.values())
                ranks.tell(0, 1, 2, kind="done")
                await link.send({"report": pack(report(3, kind="done"))})
                assert (await link.receive())["released"]

        asyncio.run(come_twice())
    assert not ranks.judged


def test_the_stand_in_passes_on_what_only_reaches_it(tmp_path: Path) -> None:
    with Ranks(tmp_path, 4, without=(3,), per_node=2) as ranks:
        stand_in = ranks.by_rank[2].collector
        assert stand_in is not None
        wait_until(lambda: stand_in.above is not None, "the stand-in's connection")

        async def report_there() -> None:
            async with connected(ranks, stand_in.port, rank=3) as link:
                ranks.tell(1, kind="hang")
                assert (await link.receive())["failed"]
                await link.send({"report": pack(report(3, kind="waiting"))})
                ranks.tell(0, 2)
                assert (await link.receive())["released"]

        asyncio.run(report_there())
        ((reports, absent, _),) = ranks.judged
    assert (set(reports), absent) == ({0, 1, 2, 3}, {})


# --------------------------------------------------------------------------------------------------- who may say what


def test_the_secret_is_for_its_owner_alone_and_stays(tmp_path: Path) -> None:
    wire.make_secret(tmp_path)
    secret = wire.read_secret(tmp_path)
    assert secret is not None
    assert len(secret) == 64
    assert stat.S_IMODE((tmp_path / wire.SECRET_FILE).stat().st_mode) == 0o600
    wire.make_secret(tmp_path)
    assert wire.read_secret(tmp_path) == secret
    assert [path.name for path in tmp_path.iterdir()] == [wire.SECRET_FILE]


def test_nobody_without_the_secret_is_heard(tmp_path: Path) -> None:
    with Ranks(tmp_path, 4) as ranks:

        async def forge() -> None:
            link = await wire.dial("127.0.0.1", ranks.main.port, b"another", "job-0")
            await link.send({"rank": 1, "node": "n9", "port": 0})
            await link.send({"report": pack(report(1, kind="bug"))})
            with pytest.raises((EOFError, ConnectionError)):
                await link.receive()
            link.close()

        asyncio.run(forge())
        assert ranks.main.reports == {}
        assert ranks.main.nodes[1] == "n0"


class Relayed:
    """Two ends of one connection, and what lies between them: bytes that go through unless told otherwise."""

    async def __aenter__(self) -> "Relayed":
        self.ready: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self.taps: asyncio.Future[tuple[Any, Any, Any]] = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.ready.set_result(await wire.answer(reader, writer, b"secret", "job-0"))

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(await far_reader.readexactly(wire.NONCE_BYTES))
            far_writer.write(await reader.readexactly(wire.NONCE_BYTES))
            self.taps.set_result((reader, writer, far_writer))

        self.server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = self.server.sockets[0].getsockname()[1]
        self.middle = await asyncio.start_server(between, "127.0.0.1", 0)
        self.near = await wire.dial("127.0.0.1", self.middle.sockets[0].getsockname()[1], b"secret", "job-0")
        self.far = await self.ready
        self.tap, self.back, self.onward = await self.taps
        return self

    async def __aexit__(self, *_: object) -> None:
        for end in (self.near, self.back, self.onward, self.far):
            end.close()
        for server in (self.server, self.middle):
            server.close()

    async def next_message(self) -> bytes:
        """On its way from the near end."""
        head = await self.tap.readexactly(4 + wire.SIGNATURE_BYTES)
        return head + await self.tap.readexactly(int.from_bytes(head[:4], "big"))


async def through(relay: Relayed) -> None:
    """Once unpacked it is JSON, and JSON is all that the other side reads."""
    await relay.near.send({"a": 1})
    message = await relay.next_message()
    assert json.loads(zlib.decompress(message[4 + wire.SIGNATURE_BYTES :])) == {"a": 1}
    relay.onward.write(message)
    assert await relay.far.receive() == {"a": 1}


async def repeated(relay: Relayed) -> None:
    await relay.near.send({"a": 1})
    message = await relay.next_message()
    relay.onward.write(2 * message)
    await relay.far.receive()
    await relay.far.receive()


async def changed(relay: Relayed) -> None:
    await relay.near.send({"a": 1})
    message = bytearray(await relay.next_message())
    message[-1] ^= 1
    relay.onward.write(message)
    await relay.far.receive()


async def turned_back(relay: Relayed) -> None:
    await relay.near.send({"a": 1})
    relay.near.reader.feed_data(await relay.next_message())
    await relay.near.receive()


async def pickled(relay: Relayed) -> None:
    """By somebody who has the secret."""
    with patch.object(json, "dumps", lambda message: Mock(encode=lambda: pickle.dumps(message))):
        await relay.near.send({"a": 1})
    relay.onward.write(await relay.next_message())
    await relay.far.receive()


async def too_long(relay: Relayed) -> None:
    relay.onward.write((wire.MOST_BYTES + 1).to_bytes(4, "big") + bytes(wire.SIGNATURE_BYTES))
    await relay.far.receive()


async def too_long_unpacked(relay: Relayed) -> None:
    await relay.near.send({"a": "x" * wire.MOST_TEXT})
    relay.onward.write(await relay.next_message())
    await relay.far.receive()


@pytest.mark.parametrize("harm", [through, repeated, changed, turned_back, pickled, too_long, too_long_unpacked])
def test_only_whole_new_signed_messages_are_taken(harm: Callable[[Relayed], Any]) -> None:
    async def one() -> None:
        async with Relayed() as relay:
            with contextlib.nullcontext() if harm is through else pytest.raises((WireError, ValueError)):
                await harm(relay)

    asyncio.run(one())


def test_ports_that_others_have_are_passed_over(tmp_path: Path) -> None:
    """One of them says nothing, one closes at once, one speaks first."""
    ports = wire.ports_of("job-0")
    assert len(set(ports)) == wire.CANDIDATES
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", port))) for port in ports[:3]]

        def serve(listener: socket.socket, word: bytes | None) -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken, _ = listener.accept()
                    if word is None:
                        taken.close()
                    else:
                        kept.append(taken)
                        taken.sendall(word)

        kept: list[socket.socket] = []
        for listener, word in zip(listeners, (b"", None, b"220 mail.example.org ESMTP ready\r\n" * 9), strict=True):
            threading.Thread(target=serve, args=(listener, word), daemon=True).start()
        with Ranks(tmp_path, 2) as ranks:
            assert ranks.main.port == ports[3]
            ranks.tell(0, 1, kind="done")
            ranks.wait(lambda reporter: reporter.released, "the end")
        for listener in listeners:
            listener.shutdown(socket.SHUT_RDWR)
        for taken in kept:
            taken.close()


# ---------------------------------------------------------------------------------------------------- a cut network


ALONE = """
import sys, time
from pathlib import Path
from tests.test_reporter import place
from tptrain.watch import wire
from tptrain.watch.reporter import Reporter
wire.SILENT_S = 2
reporter = Reporter(place(int(sys.argv[2]), 3, 1, sys.argv[3]), Path(sys.argv[1]), print)
reporter.start()
while True:
    time.sleep(1)
"""


@pytest.mark.usefixtures("hurried")
def test_the_stand_in_judges_where_the_supervisor_of_rank_0_is_gone(tmp_path: Path) -> None:
    wire.make_secret(tmp_path)
    judged: list[Any] = []
    reporters = [Reporter(place(rank, 3, 1), tmp_path, lambda *seen: judged.append(seen)) for rank in (1, 2)]
    first = subprocess.Popen([sys.executable, "-c", ALONE, str(tmp_path), "0", "127.0.0.1"])
    try:
        for reporter in reporters:  # the stand-in first: the other is to hear of it
            reporter.start()
            wait_until(lambda reporter=reporter: reporter.connected, "a connection", timeout_s=60)
    finally:
        first.kill()
        first.wait()
    for reporter in reporters:
        reporter.report(pack(report(reporter.place.rank, kind="infra", world=3, tp=1)))
    wait_until(lambda: all(reporter.released for reporter in reporters), "the verdict", timeout_s=60)
    ((reports, absent, nodes),) = judged
    assert (set(reports), absent, nodes[0]) == ({1, 2}, {0: Absence.ENDED}, "n0")


OURS = f"198.18.{os.getpid() % 256}.1"


@pytest.fixture
def network() -> Iterator[str]:
    """A second network on this machine, and a link to it: the name of both. Our end has the address OURS."""
    name = f"tp{os.getpid()}"
    steps = [
        f"netns add {name}",
        f"link add {name} type veth peer name far netns {name}",
        f"addr add {OURS}/30 dev {name}",
        f"link set {name} up",
        f"-n {name} addr add {OURS[:-1]}2/30 dev far",
        f"-n {name} link set far up",
    ]
    try:
        try:
            for step in steps:
                subprocess.run(["ip", *step.split()], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a second network needs root and `ip netns`")
        yield name
    finally:
        with contextlib.suppress(OSError):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.usefixtures("hurried")
def test_a_node_that_is_cut_off(tmp_path: Path, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No packet tells of it, as when a node loses its power: its kernel does not answer any more."""
    monkeypatch.setattr(wire, "SILENT_S", 2)
    wire.make_secret(tmp_path)
    judged: list[Any] = []
    reporters = [Reporter(place(rank, 3, 1, OURS), tmp_path, lambda *seen: judged.append(seen)) for rank in (0, 1)]
    for reporter in reporters:
        reporter.start()
    command = ["ip", "netns", "exec", network, sys.executable, "-c", ALONE, str(tmp_path), "2", OURS]
    far = subprocess.Popen(command)
    try:
        main = reporters[0].collector
        assert main is not None
        wait_until(lambda: main.links.keys() == {0, 1, 2}, "three connections", timeout_s=60)
        subprocess.run(["ip", "link", "set", network, "down"], check=True)
        for rank, reporter in enumerate(reporters):
            reporter.report(pack(report(rank, kind="infra", world=3, tp=1)))
        wait_until(lambda: all(reporter.released for reporter in reporters), "the verdict", timeout_s=60)
    finally:
        far.kill()
        far.wait()
    ((reports, absent, nodes),) = judged
    assert (set(reports), absent, nodes[2]) == ({0, 1}, {2: Absence.CUT_OFF}, "n2")
    assert judge(unpack(reports), 3, ["n0", "n1", "n2"], absent).node == "n2"
