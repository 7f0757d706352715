"""A supervisor's connection to the collector of the ranks' reports, in a thread of its own.

It is to the supervisor of rank 0; where that cannot be reached any more, to the stand-in's. It stands however long the
trainer hangs, and the supervisor beside it hears from it that another rank has failed, and when all reports are judged.
"""

import asyncio
import contextlib
import threading
from pathlib import Path

from tptrain.watch import wire
from tptrain.watch.collector import Collector, Judge
from tptrain.watch.packed import Packed
from tptrain.watch.place import Place
from tptrain.watch.verdict import Absence
from tptrain.watch.wire import Connection, Message

RETRY_S, DIAL_S = 0.5, 3  # between tries to connect, and for one


class Reporter:
    """`judge`: as the Collector calls it, where this rank's supervisor is the one that collects."""

    def __init__(self, place: Place, run_dir: Path, judge: Judge) -> None:
        self.place, self.run_dir = place, run_dir
        self.collector = Collector(place, judge) if place.rank in (0, place.stand_in) else None
        self.connected = False
        self.failed = False  # a rank has: this one is to end as well and to report
        self.released = False  # all reports are judged: there is nothing left to wait for
        self._report: Packed | None = None
        self._link: Connection | None = None
        self._main_port = 0  # where rank 0's collector was reached
        self._stand_in: tuple[str, int] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sending: asyncio.Future[None] | None = None  # the loop itself would let it be collected

    def start(self) -> None:
        """After the fork of the trainer, which is to have none of this. A rank alone reports to nobody."""
        if self.place.world > 1:
            threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True).start()

    def report(self, report: Packed) -> None:
        """Send it, now or as soon as there is a connection."""

        def send() -> None:
            if self._link is not None:
                self._sending = asyncio.ensure_future(self._send(self._link))

        self._report = report  # sent with the next connection, if there is none now
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: all is judged
                self._loop.call_soon_threadsafe(send)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        while (secret := wire.read_secret(self.run_dir)) is None:  # `train` makes the run directory when all have met
            await asyncio.sleep(RETRY_S)
        if self.collector is not None:
            with contextlib.suppress(OSError):  # no port: the ranks' files are what is left
                await self.collector.serve(secret)
        while not self.released:
            for main, address, port in self._addresses():
                if await self._attend(main, address, port, secret):
                    break
            else:
                await asyncio.sleep(RETRY_S)
        if self.collector is not None:
            self.collector.close()

    def _addresses(self) -> list[tuple[bool, str, int]]:
        """Where a collector may be, rank 0's first, which is `main`."""
        own = self.collector.port if self.collector is not None else 0
        if self.place.rank == 0:
            return [(True, "127.0.0.1", own)]
        if not self._main_port:  # it may only be starting
            return [(True, self.place.address, port) for port in wire.ports_of(self.place.attempt)]
        main = True, self.place.address, self._main_port
        stand_in = ("127.0.0.1", own) if own else self._stand_in
        return [main, (False, stand_in[0], stand_in[1])] if stand_in else [main]

    async def _attend(self, main: bool, address: str, port: int, secret: bytes) -> bool:
        """Be connected to a collector until the connection ends. Returns whether there was one."""
        stand_in, link = self.collector if self.place.rank else None, None
        try:
            async with asyncio.timeout(DIAL_S):
                link = await wire.dial(address, port, secret, self.place.attempt)
                name = {"rank": self.place.rank, "node": self.place.node}
                await link.send(name | {"port": stand_in.port if stand_in is not None else 0})
                state = await link.receive()
        except wire.LOST:
            if link is not None:
                link.close()
            return False
        self._link, self.connected = link, True
        if main:
            self._main_port = port
        if main and stand_in is not None:
            stand_in.stand_by(link, state["node"])
        how = Absence.CUT_OFF
        try:
            await self._send(link)
            while True:
                if main and stand_in is not None:  # before a release ends this process
                    await stand_in.follow(state)
                if self._heed(state):
                    break
                state = await link.receive()
        except wire.LOST as error:
            how = Absence.ENDED if wire.ended_well(error) else Absence.CUT_OFF
        finally:
            self._link, self.connected = None, False
            link.close()
        if main and stand_in is not None:
            stand_in.take_over(how)
        return True

    def _heed(self, state: Message) -> bool:
        """Returns whether all is over."""
        if state["stand_in"] is not None:
            address, port = state["stand_in"]
            self._stand_in = address, port
        self.failed, self.released = self.failed or state["failed"], self.released or state["released"]
        return self.released

    async def _send(self, link: Connection) -> None:
        if self._report is not None:
            with contextlib.suppress(*wire.LOST):  # the connection's end is seen where it is read
                await link.send({"report": self._report})
