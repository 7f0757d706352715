"""Where the tensors of a checkpoint lie: `index.json`, and parts of tensors read by it. Nothing read is executed.

Checkpoints of version 0.1.0 have torch's pickled `.metadata` instead. It is read by an unpickler that knows the classes
of torch's own metadata and nothing else.
"""

import io
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tptrain.checkpoint.commit import CheckpointError
from tptrain.checkpoint.layout import Part, State

INDEX, PICKLED = "index.json", ".metadata"
INDEX_BYTES = 2**30  # at most
ZIP = b"PK\x03\x04"  # how every archive of torch.save begins
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.uint8)}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, which torch.save has written at some place of a file."""

    offsets: tuple[int, ...]  # in the tensor
    shape: tuple[int, ...]
    file: str
    start: int  # byte of the file
    length: int  # bytes


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Index:
    """The tensors of a checkpoint, by name. Every problem is a CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.tensors = _read_json(folder) if (folder / INDEX).exists() else _read_pickle(folder)
            for name, stored in self.tensors.items():
                for chunk in stored.chunks:
                    _check(name, stored, chunk)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"checkpoint {folder.name}: its index is damaged ({error})") from error

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor. Raises CheckpointError where there is none of that name."""
        return DTYPES[self._stored(name).dtype]

    def _stored(self, name: str) -> Stored:
        if name not in self.tensors:
            raise CheckpointError(f"checkpoint {self.folder.name}: has no {name}")
        return self.tensors[name]

    def load(self, state: State) -> None:
        """Fill the state's tensors, in place, each in its own precision, from whatever boxes were saved."""
        for name, part in state.items():
            shape, stored = tuple(part.shape), self._stored(name).shape
            if shape != stored:
                raise CheckpointError(f"checkpoint {self.folder.name}: has {name} of {list(stored)}, not {list(shape)}")
            boxes = part.boxes if isinstance(part, Part) else [([0] * part.dim(), part)]
            self._fill(name, boxes)

    def _fill(self, name: str, boxes: list[tuple[list[int], Tensor]]) -> None:
        missing = sum(box.numel() for _, box in boxes)
        seen: set[tuple[int, ...]] = set()
        for chunk in self.tensors[name].chunks:
            values = None
            for offsets, box in boxes:
                low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
                ends = [
                    min(a + n, b + m) for a, n, b, m in zip(offsets, box.shape, chunk.offsets, chunk.shape, strict=True)
                ]
                if any(a >= b for a, b in zip(low, ends, strict=True)) or chunk.offsets in seen:
                    continue
                values = self._values(name, chunk) if values is None else values
                target = box[_slices(low, ends, offsets)]
                target.copy_(values[_slices(low, ends, chunk.offsets)])
                missing -= target.numel()
            seen.add(chunk.offsets)
        if missing:
            raise CheckpointError(f"checkpoint {self.folder.name}: lacks {missing:,} elements of {name}")

    def _values(self, name: str, chunk: Chunk) -> Tensor:
        with (self.folder / chunk.file).open("rb") as file:
            file.seek(chunk.start)
            data = file.read(chunk.length)
        try:
            if not data.startswith(ZIP):  # torch.load would take a bare pickle, and only warn
                raise ValueError("no archive of torch.save")
            values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            raise CheckpointError(f"checkpoint {self.folder.name}: {name} in {chunk.file} is no tensor") from error
        wanted = DTYPES[self.tensors[name].dtype]
        if not isinstance(values, Tensor) or (tuple(values.shape), values.dtype) != (chunk.shape, wanted):
            raise CheckpointError(f"checkpoint {self.folder.name}: {name} in {chunk.file} is not what its index says")
        return values


def _slices(low: Sequence[int], ends: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """The box from `low` to `ends`, counted from the origin of another."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, ends, origin, strict=True))


# ------------------------------------------------------------------------------------------------------------ the index


def _check(name: str, stored: Stored, chunk: Chunk) -> None:
    """That a chunk lies within its tensor, and in a file of the checkpoint. Raises ValueError."""
    sides = zip(chunk.offsets, chunk.shape, stored.shape, strict=True)
    inside = all(start >= 0 and side >= 0 and start + side <= whole for start, side, whole in sides)
    if not inside or chunk.start < 0 or chunk.length < 0:
        raise ValueError(f"{name} has a part {list(chunk.shape)} at {list(chunk.offsets)}")
    if Path(chunk.file).name != chunk.file or not chunk.file.endswith(".distcp"):
        raise ValueError(f"{name} is in {chunk.file!r}, which is no file of a checkpoint")


def index_json(tensors: dict[str, Stored]) -> bytes:
    """The content of INDEX."""
    return json.dumps({name: asdict(stored) for name, stored in tensors.items()}, separators=(",", ":")).encode()


def _read_json(folder: Path) -> dict[str, Stored]:
    if (folder / INDEX).stat().st_size > INDEX_BYTES:
        raise ValueError(f"{INDEX} is too large")
    tensors = {}
    for name, entry in json.loads((folder / INDEX).read_text()).items():
        chunks = [
            Chunk(tuple(each["offsets"]), tuple(each["shape"]), each["file"], each["start"], each["length"])
            for each in entry["chunks"]
        ]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of type {entry['dtype']}")
        tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), tuple(chunks))
    return tensors


def _read_pickle(folder: Path) -> dict[str, Stored]:
    if (folder / PICKLED).stat().st_size > INDEX_BYTES:
        raise ValueError(f"{PICKLED} is too large")
    with (folder / PICKLED).open("rb") as file:
        metadata = _Unpickler(file).load()
    return dict(stored_tensors(metadata.state_dict_metadata, metadata.storage_data))


def stored_tensors(described: dict[str, Any], places: dict[Any, Any]) -> Iterator[tuple[str, Stored]]:
    """Out of torch's metadata: what each tensor is, and where each box of it lies."""
    where = {(index.fqn, tuple(index.offset)): place for index, place in places.items() if index.offset is not None}
    for name, each in described.items():
        if not hasattr(each, "chunks"):
            raise ValueError(f"{name} is no tensor")
        chunks = []
        for box in each.chunks:
            place = where[name, tuple(box.offsets)]
            offsets, shape = tuple(map(int, box.offsets)), tuple(map(int, box.sizes))
            chunks.append(Chunk(offsets, shape, str(place.relative_path), int(place.offset), int(place.length)))
        dtype = str(each.properties.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"{name} is of type {dtype}")
        yield name, Stored(dtype, tuple(map(int, each.size)), tuple(chunks))


class _Unpickler(pickle.Unpickler):
    """Knows the classes of torch's checkpoint metadata, none of which does anything when it is made."""

    ALLOWED: dict[str, tuple[str, ...]] = {  # noqa: RUF012
        "torch.distributed.checkpoint.metadata": (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch": ("Size", "float32", "bfloat16", "uint8"),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath",),
    }

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of this project does")
        return super().find_class(module, name)
