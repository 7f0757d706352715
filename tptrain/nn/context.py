"""What the layers need to know of a batch beside its hidden states.

Shapes: see decoder.py.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tptrain.models.spec import RotarySpec
from tptrain.nn.rotary import rotary_table

if TYPE_CHECKING:
    from tptrain.nn.attention import Attention

Tables = dict[tuple[RotarySpec, int, int], Tensor]  # rotary positions, by (rotary, d, T)


class Context:
    """B whole sequences of T tokens, at positions 0 to T - 1. Generation has a context of its own, with a cache."""

    def __init__(self, T: int, device: torch.device, tables: Tables) -> None:
        """`tables`: of the decoder, so that layers and batches share them."""
        self.T, self.device, self.tables = T, device, tables
        self.rows = (-1, T)  # of tokens, as the rotation turns them

    def positions(self, B: int) -> Tensor:
        """The position in its sequence of each token: (N,)."""
        return torch.arange(self.T, device=self.device).repeat(B)

    def rotation(self, rotary: RotarySpec, d: int) -> Tensor:
        """(2, T, 1, d/2): cosines and sines of position x frequency, float32, for d turned dims."""
        key = rotary, d, self.T
        if key not in self.tables:
            for other in [other for other in self.tables if other[:2] == key[:2]]:
                del self.tables[other]  # one length at a time
            self.tables[key] = rotary_table(rotary, d, torch.arange(self.T), self.T).to(self.device)
        return self.tables[key]

    def attend(self, layer: "Attention", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, H/tp, d), k and v (B, T, K/tp, d) -> (B, T, H/tp, d)."""
        spec = layer.spec
        window = spec.window if spec.window is not None and spec.window < self.T else None
        if (window, spec.scale, spec.softcap) == (None, None, None):
            return layer.ops.attention(q, k, v)
        return layer.ops.masked_attention(q, k, v, window, spec.scale, spec.softcap)
