"""A rank's state as parts of global tensors: what torch.distributed.checkpoint writes, and loads at any topology."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tptrain.buckets import Bucket, Piece
from tptrain.mesh import Mesh
from tptrain.optim import MOMENTS, Optimizer


def flat(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """The masters and moments of each bucket that this rank updates."""
    return [
        {
            "model": bucket.master.detach(),
            **{moment: optimizer.adamw.state[bucket.master][moment] for moment in MOMENTS},
        }
        for bucket in optimizer.buckets
    ]


def state_dict(buckets: list[Bucket], tensors: list[dict[str, Tensor]], tp_rank: int) -> dict[str, Any]:
    """What dcp writes from or loads into, in place: this rank's part of every parameter and moment."""
    state: dict[str, Any] = {}
    for bucket, kinds in zip(buckets, tensors, strict=True):
        for piece in bucket.pieces:
            for kind, tensor in kinds.items():
                name = f"model/{piece.name}" if kind == "model" else f"optim/{piece.name}/{kind}"
                state[name] = _Part(piece.p.spec.shape, _rectangles(piece, tensor[piece.place], tp_rank))
    return state


def _rectangles(piece: Piece, flat: Tensor, tp_rank: int) -> list[tuple[list[int], Tensor]]:
    """A run of a slice's elements as at most three boxes of the global tensor: (offsets, elements) of each.

    In a matrix the first and the last row may be cut.
    """
    spec, start = piece.p.spec, piece.start
    width = spec.local_shape[-1] if len(spec.shape) == 2 else 1
    boxes, done = [], 0
    while done < len(flat):
        row, column = divmod(start + done, width)
        rows = 1 if column else max(1, (len(flat) - done) // width)
        columns = min(width - column, len(flat) - done)
        place = [row, column][: len(spec.shape)]
        place[spec.dim] += spec.start(tp_rank)
        shape = [rows, columns][: len(spec.shape)]
        boxes.append((place, flat[done : done + rows * columns].view(shape)))
        done += rows * columns
    return boxes


class _Part(torch.Tensor):
    """Some boxes of a global tensor, as torch.distributed.checkpoint asks for them (`_Checkpointable`)."""

    boxes: list[tuple[list[int], Tensor]]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], boxes: list[tuple[list[int], Tensor]]) -> "_Part":
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.boxes = boxes
        return made

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
                tensor_data=TensorWriteData(chunk, TensorProperties(torch.float32), self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        box = next(box for offsets, box in self.boxes if tuple(offsets) == tuple(index.offset or ()))
        # With a storage of its own: of a part of a larger one torch writes a copy.
        return torch.from_numpy(box.numpy()) if box.device.type == "cpu" else box


def rng_state(mesh: Mesh) -> dict[str, Tensor]:
    state = {f"rng/{mesh.rank}/cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        state[f"rng/{mesh.rank}/cuda"] = torch.cuda.get_rng_state(mesh.device)
    return state
