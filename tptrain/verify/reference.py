"""What one rank has computed, as whole tensors in files: ranks map them and read their parts."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tptrain.verify.step import Item


class Reference:
    """Tensors in a folder, by their keys, as float32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, items: Iterable[Item]) -> None:
        """Items of a run of one rank: parts of a tensor, one for each micro-batch, in the order of its rows."""
        wholes: dict[str, list[Item]] = {}
        for item in items:
            wholes.setdefault(item.key, []).append(item)
        for key, parts in wholes.items():
            whole = torch.cat([part.value.float().cpu() for part in parts]) if parts[0].place else parts[0].value.cpu()
            np.save(self._file(key), whole.numpy(), allow_pickle=False)

    def has(self, key: str) -> bool:
        return self._file(key).exists()

    def modules(self, what: str) -> list[str]:
        """Of which there is an item of this sort."""
        ending = f"-{what.replace(' ', '-')}.npy"
        return sorted(file.name.removesuffix(ending) for file in self.folder.glob(f"*{ending}"))

    def whole(self, key: str) -> Tensor:
        """Not to be written to."""
        return torch.from_numpy(np.load(self._file(key), mmap_mode="c", allow_pickle=False))

    def part(self, item: Item) -> Tensor:
        """Where the item's value lies in the whole."""
        return self.whole(item.key)[item.place]

    def _file(self, key: str) -> Path:
        return self.folder / f"{key.replace(' ', '-')}.npy"
