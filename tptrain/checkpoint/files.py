"""Files of a checkpoint: measured while they are written, on the disk when that is done."""

import contextlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

_BLOCK = 4 * 2**20  # bytes read or written at once
_SYNC = 64 * 2**20  # bytes after which the disk is told to begin


class Files(FileSystem):
    """What torch.distributed.checkpoint writes through. `measured`: size and checksum of each file, by its name."""

    def __init__(self) -> None:
        self.measured: dict[str, list[Any]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with _Stream(io.FileIO(path, mode), buffer_size=_BLOCK) as stream:
            yield stream
        self.measured[Path(path).name] = [stream.length, stream.digest.hexdigest()]


class _Stream(io.BufferedWriter):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.digest, self.length = xxhash.xxh3_128(), 0
        self.syncing = ThreadPoolExecutor(1)
        self.synced: list[Future[None]] = []

    def write(self, data: Any) -> int:
        """All of `data`. The disk begins on what has been written before the writer has the rest."""
        self.digest.update(data)
        self.length += (written := super().write(data))
        if self.length > _SYNC * (len(self.synced) + 1):
            self.synced.append(self.syncing.submit(os.fdatasync, self.fileno()))
        return written

    def close(self) -> None:
        self.syncing.shutdown()
        super().close()
        for synced in self.synced:
            synced.result()  # the kernel tells of a failed write once only


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def measure(file: Path) -> list[Any]:
    digest, length = xxhash.xxh3_128(), 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
            length += len(block)
    return [length, digest.hexdigest()]
