"""Where the ranks' reports come together: in the supervisor of rank 0, or of its stand-in on another node.

Every supervisor keeps a connection to it. The first report of a failure, or the end of a supervisor that did not say
how its rank ended, makes it ask all others for theirs; once these are there, or known not to come, they are judged.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from tptrain.watch import wire
from tptrain.watch.outcome import Outcome
from tptrain.watch.packed import Packed
from tptrain.watch.place import Place
from tptrain.watch.verdict import Absence
from tptrain.watch.wire import Connection, Message

HELLO_S = 10  # for a new connection to prove that it has the secret
SLOW_S = 60  # for the report of a rank whose connection stands, from the first report on
RETURN_S = {Absence.ENDED: 3, Absence.CUT_OFF: 15, Absence.NEVER_CAME: 6}  # for a rank without one to connect
TELL_S = 5  # for the last message to the ranks
POLL_S = 0.05
Judge = Callable[[dict[int, Packed], dict[int, Absence], dict[int, str]], None]


class Collector:
    """`judge` is called once, in a thread of its own, with the reports, what is known of the ranks that sent none, and
    the nodes of the ranks that have connected. All else runs in the event loop.
    """

    def __init__(self, place: Place, judge: Judge) -> None:
        self.place, self.judge = place, judge
        self.links: dict[int, Connection] = {}
        self.nodes: dict[int, str] = {}
        self.reports: dict[int, Packed] = {}
        self.left: dict[int, tuple[float, Absence]] = {}  # ranks whose connection ended: when (monotonic clock) and how
        self.stand_in: tuple[str, int] | None = None
        self.broken = False  # a rank has ended otherwise than well
        self.gathering = self.failed = self.released = False
        self.port = 0
        self.above: Connection | None = None  # to rank 0's collector, while this one stands in for nobody
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, secret: bytes) -> None:
        """Raises OSError where there is no port to listen on."""
        self.secret = secret
        host = "127.0.0.1" if self.place.address in ("127.0.0.1", "localhost") else None
        ports = wire.ports_of(self.place.attempt) if self.place.rank == 0 else [0]
        for port in ports:
            try:
                self.server = await asyncio.start_server(self._take_connection, host, port, backlog=4096)
            except OSError:
                if port == ports[-1]:
                    raise
                continue
            self.port = self.server.sockets[0].getsockname()[1]
            return

    def close(self) -> None:
        if self.port:
            self.server.close()

    @property
    def state(self) -> Message:
        """What a rank is told when it connects and whenever this changes."""
        progress = {"failed": self.failed, "released": self.released}
        return {"node": self.place.node, "stand_in": self.stand_in} | progress

    async def _take_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The end of the loop cancels it, of which Python 3.11 would print a traceback."""
        with contextlib.suppress(asyncio.CancelledError):
            await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One rank's connection, from its first message to its end."""
        try:
            async with asyncio.timeout(HELLO_S):
                link = await wire.answer(reader, writer, self.secret, self.place.attempt)
                hello = await link.receive()
        except wire.LOST:
            writer.close()
            return
        rank = hello["rank"]
        self.links[rank], self.nodes[rank] = link, hello["node"]
        self.left.pop(rank, None)
        how = Absence.ENDED
        try:
            if hello["port"] and self.stand_in is None:
                self.stand_in = link.peer, hello["port"]
                await self._tell_all()
            else:
                await link.send(self.state)
            while True:
                await self._take((await link.receive())["report"])
        except wire.LOST as error:
            how = Absence.ENDED if wire.ended_well(error) else Absence.CUT_OFF
        finally:
            link.close()
            if self.links.get(rank) is link:
                del self.links[rank]
                self.lost(rank, how)

    async def _take(self, report: Packed) -> None:
        """A rank's report: its own, or one that the stand-in passes on."""
        self.reports.setdefault(report["rank"], report)
        self.broken = self.broken or report["cause"]["kind"] != Outcome.DONE
        if self.above is not None:
            with contextlib.suppress(*wire.LOST):
                await self.above.send({"report": report})
        self._start(self._consider())

    def lost(self, rank: int, how: Absence) -> None:
        """A rank's connection has ended. Its processes may be gone, and no other rank notice."""
        self.left[rank] = time.monotonic(), how
        if self.released:
            return
        self._start(self._consider())
        if how is Absence.ENDED and rank not in self.reports:
            self._start(self._gather_unless_back(rank))

    async def _gather_unless_back(self, rank: int) -> None:
        await asyncio.sleep(RETURN_S[Absence.ENDED])
        if rank in self.left and self.above is None:
            await self._gather()

    async def _consider(self) -> None:
        """Gather the reports where a rank has failed; where all that there are have ended well, nothing is to judge."""
        killed = {rank for rank, (_, how) in self.left.items() if how is Absence.ENDED}
        if self.above is not None or self.released:
            return
        if self.broken:
            await self._gather()
        elif self.reports and self.reports.keys() >= self.links.keys() | killed:
            await self._release()

    async def _gather(self) -> None:
        if self.gathering or self.released:
            return
        self.gathering = self.failed = True
        began = time.monotonic()
        await self._tell_all()
        while self._awaited(began):
            await asyncio.sleep(POLL_S)
        missing = [rank for rank in range(self.place.world) if rank not in self.reports]
        missing.sort(key=lambda rank: self.left[rank][0] if rank in self.left else began)  # the first to go comes first
        absent = {rank: Absence.SILENT if rank in self.links else self._absence(rank) for rank in missing}
        await asyncio.to_thread(self.judge, dict(self.reports), absent, dict(self.nodes))
        await self._release()

    def _awaited(self, began: float) -> bool:
        """Whether a report is still needed, and may come: a rank that has told the user why it ends is cause enough."""
        if any(Outcome(report["cause"]["kind"]).announced for report in self.reports.values()):
            return False
        now = time.monotonic()
        for rank in range(self.place.world):
            if rank in self.reports:
                continue
            since, patience_s = began, SLOW_S
            if rank not in self.links:
                since = max(began, self.left[rank][0] if rank in self.left else began)
                patience_s = RETURN_S[self._absence(rank)]
            if now - since < patience_s:
                return True
        return False

    def _absence(self, rank: int) -> Absence:
        return self.left[rank][1] if rank in self.left else Absence.NEVER_CAME

    def stand_by(self, main: Connection, node: str) -> None:
        """The stand-in's own supervisor is connected to rank 0's collector, on this node: pass on what comes here."""
        self.above, self.nodes[0] = main, node
        self.left.pop(0, None)

    async def follow(self, state: Message) -> None:
        """Rank 0's collector says this: so it is for the ranks that have only come as far as here."""
        if (state["failed"], state["released"]) != (self.failed, self.released):
            self.failed, self.released = state["failed"], state["released"]
            await self._tell_all()

    def take_over(self, how: Absence) -> None:
        """The connection to rank 0's collector has ended."""
        self.above = None
        self.lost(0, how)

    async def _release(self) -> None:
        self.released = True
        await self._tell_all()

    async def _tell_all(self) -> None:
        """Its own rank last: upon a release it ends the process."""
        own = self.links.get(self.place.rank)
        others = [asyncio.create_task(self._tell(link)) for link in self.links.values() if link is not own]
        if others:
            await asyncio.wait(others, timeout=TELL_S)
        if own is not None:
            await self._tell(own)

    async def _tell(self, link: Connection) -> None:
        with contextlib.suppress(*wire.LOST):
            await link.send(self.state)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself would let it be collected
        task.add_done_callback(self._tasks.discard)
