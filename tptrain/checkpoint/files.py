"""Files of a checkpoint: measured while they are written, on the disk when that is done."""

import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

BLOCK = 4 * 2**20  # bytes read or written at once
_SYNC = 64 * 2**20  # bytes after which the disk is told to begin


class MeasuredStream(io.BufferedWriter):
    """A file that is being written: its `length` and `digest` so far."""

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
        while block := opened.read(BLOCK):
            digest.update(block)
            length += len(block)
    return [length, digest.hexdigest()]
