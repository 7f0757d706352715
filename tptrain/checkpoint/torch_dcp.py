"""Parts of tensors to files, by torch.distributed.checkpoint.

Importing that takes half as long as importing torch, and no start needs it: `save.py` imports this file when it saves.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import set_crc32_options

from tptrain.checkpoint.commit import CheckpointError, reason
from tptrain.checkpoint.files import BLOCK, MeasuredStream
from tptrain.checkpoint.index import INDEX, index_json, stored_tensors
from tptrain.checkpoint.layout import Box, Part, State
from tptrain.parallel.control import Control


def write(folder: Path, state: State, ranks: Control) -> dict[str, list[Any]]:
    """Returns name, size and checksum of the file that this rank wrote. Raises CheckpointError."""
    # No copy ahead: what is written is on the host, and with CUDA torch would wait for the GPU at each large tensor.
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
    writer.fs = files = _Files()
    set_crc32_options(False)  # one checksum is enough
    try:
        with _without_warnings():
            state_dict_saver.save(_tensors(state), storage_writer=writer, **_over(ranks))
    except CheckpointException as error:
        raise CheckpointError(reason(*(failure for failure, _ in error.failures.values()))) from error
    return {name: measured for name, measured in files.measured.items() if name.endswith(".distcp")}


def _over(ranks: Control) -> dict[str, Any]:
    """torch's arguments for the ranks that save together."""
    return {"process_group": ranks.process_group} if ranks.group else {"no_dist": True}


def _tensors(state: State) -> dict[str, Any]:
    return {name: _Part(part) if isinstance(part, Part) else part for name, part in state.items()}


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """torch.distributed.checkpoint warns of its own internals on every call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield


class _Writer(FileSystemWriter):
    """With an index of ours at the end, in place of torch's, which is a pickle."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for each in results for result in each}
        index = index_json(dict(stored_tensors(metadata.state_dict_metadata, places)))
        (Path(self.path) / INDEX).write_bytes(index)


class _Files(FileSystem):
    """What torch.distributed.checkpoint writes through. `measured`: size and checksum of each file, by its name."""

    def __init__(self) -> None:
        self.measured: dict[str, list[Any]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with MeasuredStream(io.FileIO(path, mode), buffer_size=BLOCK) as stream:
            yield stream
        self.measured[Path(path).name] = [stream.length, stream.digest.hexdigest()]


class _Part(torch.Tensor):
    """Some boxes of a global tensor, as torch.distributed.checkpoint asks for them (`_Checkpointable`)."""

    boxes: list[Box]
    read: Callable[[], Tensor] | None

    @staticmethod
    def __new__(cls, part: Part) -> "_Part":
        wrapper = torch.Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.dtype)  # type: ignore[attr-defined]
        wrapper.boxes, wrapper.read = part.boxes, part.read
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a part of a tensor")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), box.shape) for offsets, box in self.boxes]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(self.dtype), self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Called when the shard is written, and those before it have been."""
        if self.read is not None:
            return self.read()
        box = next(box for offsets, box in self.boxes if tuple(offsets) == tuple(index.offset or ()))
        # With a storage of its own: of a part of a larger one torch writes a copy.
        if box.device.type != "cpu":
            return box
        return torch.from_numpy(box.view(torch.uint8).numpy()).view(box.dtype)  # numpy has no bfloat16
