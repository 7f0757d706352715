"""A rank's state as parts of global tensors, so that it can be loaded at any topology."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tptrain.nn.store import Store
from tptrain.optim.state import TrainingState
from tptrain.parallel.mesh import Mesh

Box = tuple[list[int], Tensor]  # offsets in the global tensor, and the elements


@dataclass(frozen=True)
class Part:
    """What this rank has of a global tensor."""

    shape: tuple[int, ...]  # global
    boxes: list[Box]
    dtype: torch.dtype
    read: Callable[[], Tensor] | None = None  # the elements of the one box, which is on the meta device until then


State = dict[str, Part | Tensor]  # by name; what is a whole tensor is this rank's own


def flat(state: TrainingState) -> list[dict[str, Tensor]]:
    """The masters and moments of each block that this rank updates."""
    return [{"model": block.master.detach(), **block.moments} for block in state.blocks]


def training_state(state: TrainingState, tensors: list[dict[str, Tensor]]) -> State:
    """What is written, or loaded into, in place: this rank's part of every parameter and moment.

    `tensors`: `flat`, or a copy of it. What is frozen has no moments, and is taken where it lies.
    """
    parts: State = {}
    for block, kinds in zip(state.blocks, tensors, strict=True):
        for piece in block.pieces:
            layout = piece.p.sharding
            for kind, tensor in kinds.items():
                name = f"model/{piece.name}" if kind == "model" else f"optim/{piece.name}/{kind}"
                boxes = _boxes(layout.local_shape, layout.offsets, piece.start, tensor[piece.place])
                parts[name] = Part(layout.shape, boxes, torch.float32)
    return parts | weights_state(state.store, trained=False)


def weights_state(store: Store, trained: bool = True) -> State:
    """The weights as they lie, for what needs no optimizer; without `trained`, the frozen ones only."""
    parts: State = {}
    for block in store.blocks:
        for member in block.members:
            if trained or not member.p.requires_grad:
                layout = member.p.sharding
                weights = member.p.detach().view(layout.local_shape)  # packed matrices have one dim less in a module
                parts[f"model/{member.name}"] = Part(layout.shape, [(list(layout.offsets), weights)], weights.dtype)
    return parts


def _boxes(shape: tuple[int, ...], offsets: tuple[int, ...], start: int, flat: Tensor) -> list[Box]:
    """A run of a slice's elements, which begins at its `start`-th in row-major order, as boxes of the global tensor.

    In a matrix there are at most three: the first and the last row may be cut.
    """
    inner = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]  # elements of one index along a dim
    boxes: list[Box] = []
    done = 0
    while done < len(flat):
        place = [(start + done) // inner[dim] % shape[dim] for dim in range(len(shape))]
        # The outermost dim along which whole indices follow: nothing of the inner ones is behind us, enough is left.
        dim = next(
            dim for dim in range(len(shape)) if (start + done) % inner[dim] == 0 and len(flat) - done >= inner[dim]
        )
        count = min(shape[dim] - place[dim], (len(flat) - done) // inner[dim])
        extent = [1] * dim + [count, *shape[dim + 1 :]]
        box = flat[done : done + count * inner[dim]].view(extent)
        boxes.append(([first + index for first, index in zip(offsets, place, strict=True)], box))
        done += box.numel()
    return boxes


def rng_state(mesh: Mesh) -> dict[str, Tensor]:
    state = {f"rng/{mesh.rank}/cpu": torch.get_rng_state()}
    if mesh.device.type == "cuda":
        state[f"rng/{mesh.rank}/cuda"] = torch.cuda.get_rng_state(mesh.device)
    return state
