"""How supervisors talk: JSON over TCP, in messages of bounded size that are signed with the run's secret.

Each side of a connection begins with random bytes. They, the attempt's name and the secret make a key that no other
connection has, and a message is signed with its direction and number: none can be made up, repeated or sent back.
Nothing is unpickled.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import zlib
from pathlib import Path
from typing import Any

Message = dict[str, Any]
SECRET_FILE = ".secret"
PORTS = range(12000, 20000)  # below those of the rendezvous, and those that the kernel chooses
CANDIDATES = 6  # of them for one attempt: another program may have some
MOST_BYTES, MOST_TEXT = 2 << 20, 64 << 20  # of a message on its way and unpacked
SILENT_S = 12  # without a sign of life from the other side's kernel, after which a connection is given up
NONCE_BYTES, SIGNATURE_BYTES = 16, 32


class WireError(Exception):
    """A message that nobody who has the run's secret has sent, or one that is too large."""


LOST = (OSError, EOFError, WireError)  # what a connection may end with


def make_secret(run_dir: Path) -> None:
    """Give the run a secret that its owner alone can read, unless it has one. Raises OSError."""
    path = run_dir / SECRET_FILE
    if path.exists():
        return
    temporary = run_dir / f"{SECRET_FILE}.{os.getpid()}"
    with open(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):  # another process was first
        os.link(temporary, path)
    temporary.unlink()


def read_secret(run_dir: Path) -> bytes | None:
    """The run's secret; None where it has none (yet)."""
    try:
        return (run_dir / SECRET_FILE).read_bytes()
    except OSError:
        return None


def ports_of(attempt: str) -> list[int]:
    """The ports that the supervisor of rank 0 may listen on, in the order in which it tries them."""
    return [PORTS[zlib.crc32(f"{attempt}/{i}".encode()) % len(PORTS)] for i in range(CANDIDATES)]


def ended_well(error: BaseException) -> bool:
    """Whether the other side's kernel has closed the connection, as it does when the process ends. Otherwise that
    kernel does not answer, or what came was not to be trusted.
    """
    return isinstance(error, EOFError | ConnectionResetError | BrokenPipeError)


class Connection:
    """One end of a connection whose other end is another supervisor. All methods raise one of `LOST`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes, directions: tuple[bytes, bytes]
    ) -> None:
        self.reader, self.writer, self.key = reader, writer, key
        self.outgoing, self.incoming = directions
        self.sent = self.received = 0  # messages

    @property
    def peer(self) -> str:
        """The other side's address."""
        return self.writer.get_extra_info("peername")[0]

    async def send(self, message: Message) -> None:
        body = zlib.compress(json.dumps(message).encode(), 1)
        self.writer.write(len(body).to_bytes(4, "big") + self._signature(self.outgoing, self.sent, body) + body)
        self.sent += 1
        await self.writer.drain()

    async def receive(self) -> Message:
        head = await self.reader.readexactly(4 + SIGNATURE_BYTES)
        length, signature = int.from_bytes(head[:4], "big"), head[4:]
        if length > MOST_BYTES:
            raise WireError(f"a message of {length} bytes")
        body = await self.reader.readexactly(length)
        if not hmac.compare_digest(signature, self._signature(self.incoming, self.received, body)):
            raise WireError("a message with a wrong signature")
        self.received += 1
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(body, MOST_TEXT)
        if not unpacker.eof:
            raise WireError(f"a message of more than {MOST_TEXT} bytes")
        return json.loads(text)

    def close(self) -> None:
        self.writer.close()

    def _signature(self, direction: bytes, number: int, body: bytes) -> bytes:
        return hmac.digest(self.key, direction + number.to_bytes(8, "big") + body, hashlib.sha256)


async def dial(address: str, port: int, secret: bytes, attempt: str) -> Connection:
    """Raises one of `LOST`. That the other side has the secret is known with its first message."""
    reader, writer = await asyncio.open_connection(address, port)
    return await _begin(reader, writer, secret, attempt, dials=True)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, attempt: str) -> Connection:
    """The other end of `dial`. Raises one of `LOST`."""
    return await _begin(reader, writer, secret, attempt, dials=False)


async def _begin(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, attempt: str, dials: bool
) -> Connection:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("IDLE", 5), ("INTVL", 3), ("CNT", 3)):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{option}"), value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENT_S)
    own = secrets.token_bytes(NONCE_BYTES)
    try:
        writer.write(own)
        other = await reader.readexactly(NONCE_BYTES)
    except BaseException:
        writer.close()
        raise
    nonces = own + other if dials else other + own
    key = hmac.digest(secret, nonces + attempt.encode(), hashlib.sha256)
    return Connection(reader, writer, key, (b"up", b"down") if dials else (b"down", b"up"))
