"""The sequences of a step: which comes when depends on the seed and the global sample index alone."""

import hashlib
import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tptrain.config import UserError


class TokenFile:
    """Fixed-length sequences of one packed file: `sequence(i)` is seq_len + 1 ids, the inputs and their targets."""

    def __init__(self, path: Path, dtype: str, seq_len: int) -> None:
        self.seq_len = seq_len
        self.tokens = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.seq_len)

    def sequence(self, index: int) -> NDArray[np.int64]:
        start = index * self.seq_len
        return self.tokens[start : start + self.seq_len + 1].astype(np.int64)


class TokenData:
    """The training and held-out sequences of a packed data set. Raises UserError where it is too small to train on."""

    def __init__(self, folder: Path, seq_len: int, seed: int) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        dtype, self.digest = meta["dtype"], meta["digest"]  # the digest is of the tokens: a resume must find the same
        self.seed = seed
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._coming: dict[tuple[int, int], Future[NDArray[np.int64]]] = {}
        self.train = TokenFile(folder / "train.bin", dtype, seq_len)
        self.validation = TokenFile(folder / "validation.bin", dtype, seq_len)
        for name, part in (("training", self.train), ("validation", self.validation)):
            if len(part) == 0:
                raise UserError(
                    f"data: its {name} part has {len(part.tokens)} tokens, fewer than one sequence of train.seq_len="
                    f"{seq_len} and its target. Give more text or shorten train.seq_len."
                )

    def samples(self, first: int, count: int) -> NDArray[np.int64]:
        """(count, seq_len + 1): the training samples first, first + 1, ... of the run. Each epoch has its own order."""
        future = self._coming.pop((first, count), None)
        return self._read(first, count) if future is None else future.result()

    def prefetch(self, first: int, count: int) -> None:
        """Begin to read what `samples` will be asked for next: it may lie on a slow file system."""
        self._coming = {(first, count): self._reader.submit(self._read, first, count)}

    def _read(self, first: int, count: int) -> NDArray[np.int64]:
        rows = []
        for index in range(first, first + count):
            epoch, place = divmod(index, len(self.train))
            rows.append(self.train.sequence(shuffled(place, len(self.train), f"{self.seed}/{epoch}")))
        return np.stack(rows)


def shuffled(index: int, n: int, key: str) -> int:
    """Where a keyed permutation of range(n) sends `index`, without holding the permutation.

    A Feistel network over the next even power of two, walked until it lands below n (Black & Rogaway 2002).
    """
    half = (max(n - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = hashlib.blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(mixed, "big") & mask
        index = left << half | right
        if index < n:
            return index
