"""Parts of tensors from safetensors files, and whole ones to them. The format: see models/safetensors.py."""

import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tptrain.checkpoint.files import BLOCK, MeasuredStream
from tptrain.models.safetensors import INDEX, SINGLE, Entry, problem

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


class Reader:
    """Reads parts of tensors. Files stay open: the kernel sees each read from front to back, and reads ahead."""

    def __init__(self) -> None:
        self.files: dict[Path, io.FileIO] = {}
        self.memory = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()

    def read(
        self, entry: Entry, rows: tuple[int, int], columns: tuple[int, int] | None = None, own: bool = False
    ) -> Tensor:
        """Rows (start, stop) of a tensor and, of a matrix, columns, in the file's precision.

        No other bytes are read. What is returned is good until the next read, unless it is to have memory of its `own`:
        fresh memory costs more than to read into it (a page fault each 4 KiB). Raises UserError where the file ends
        within the tensor.
        """
        dtype, width = DTYPES[entry.dtype], math.prod(entry.shape[1:])  # width: elements of a row
        first, last = columns or (0, width)
        shape = rows[1] - rows[0], last - first
        size = math.prod(shape) * dtype.itemsize
        if len(self.memory) < size and not own:
            self.memory = torch.empty(size, dtype=torch.uint8)
        target = torch.empty(size, dtype=torch.uint8) if own else self.memory[:size]
        part, memory = target.view(dtype).view(shape), memoryview(target.numpy().data)
        if entry.file not in self.files:
            self.files[entry.file] = io.FileIO(entry.file)
        file, step = self.files[entry.file].fileno(), width * dtype.itemsize
        place = entry.start + rows[0] * step + first * dtype.itemsize
        length = len(memory) if last - first == width else (last - first) * dtype.itemsize  # bytes in one place
        for start in range(0, len(memory), length):
            run = memory[start : start + length]
            if os.preadv(file, (run,), place) != length:
                _read_into(file, run, place, entry.file)
            place += step
        return part.view(-1, *entry.shape[1:]) if columns is None else part


def _read_into(file: int, memory: memoryview, place: int, path: Path) -> None:
    """Read until the memory is full, however little the kernel gives at a time."""
    while len(memory) > 0:
        count = os.preadv(file, [memory], place)
        if count == 0:
            raise problem(path, f"ends at byte {place}, within a tensor")
        memory, place = memory[count:], place + count


# -------------------------------------------------------------------------------------------------------------- writing


@dataclass
class Shard:
    """One file that is to be written: its tensors in order, with dtype and shape."""

    name: str
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    size: int = 0  # bytes of the tensors

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.tensors[name] = dtype, shape
        self.size += math.prod(shape) * dtype.itemsize


def shards(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], largest: int) -> list[Shard]:
    """Tensors in their order, in files of at most `largest` bytes (a larger tensor has a file of its own)."""
    parts = [Shard("")]
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if parts[-1].tensors and parts[-1].size + size > largest:
            parts.append(Shard(""))
        parts[-1].add(name, dtype, shape)
    for i, part in enumerate(parts):
        part.name = SINGLE if len(parts) == 1 else f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
    return parts


def write_shard(folder: Path, shard: Shard, values: Iterable[Tensor]) -> None:
    """Write one file, tensor by tensor; `values` come in the order of `shard.tensors`. It is on the disk afterwards."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shard.tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    with MeasuredStream(io.FileIO(folder / shard.name, "wb"), buffer_size=BLOCK) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (dtype, shape), value in zip(shard.tensors.values(), values, strict=True):
            assert (value.dtype, tuple(value.shape)) == (dtype, shape)
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: Path, parts: list[Shard]) -> None:
    """The index of a model in several files."""
    listed = {name: part.name for part in parts for name in part.tensors}
    total = {"total_size": sum(part.size for part in parts)}
    (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": dict(sorted(listed.items()))}, indent=2))
