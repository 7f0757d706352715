"""Gradients of the whole model out of each rank's: sums over the axes that each parameter names and over dp, the norm,
and clipping. The loss is divided by the global token count, so sums of gradients are averages.
"""

import torch
from torch import Tensor

from tptrain.optim.state import TrainingState
from tptrain.parallel.collectives import Work, all_gather, all_reduce_, reduce_scatter
from tptrain.parallel.mesh import Mesh


class Reducer:
    """Sums gradients block by block: as soon as one is complete, or all of them at the end of a step."""

    def __init__(self, state: TrainingState, mesh: Mesh, zero: bool) -> None:
        """`zero`: each dp rank gets the sum of its own part of a block only."""
        self.state, self.mesh, self.zero = state, mesh, zero
        self.units = {block.block.unit: block for block in state.blocks}
        self.pending: dict[str, Work] = {}  # by unit

    def begin(self, unit: str) -> None:
        """Start to sum a unit's gradients over the ranks that each computed a part. Nothing where all is frozen."""
        if unit not in self.units:
            return
        state = self.units[unit]
        state.forget_absent()
        for summed, run in state.runs(slice(0, len(state.grads)), lambda each: each.summed):
            for axis in summed:
                all_reduce_(state.grads[run], self.mesh.group(axis)).wait()
        group = self.mesh.group("dp")
        if self.zero:
            self.pending[unit] = reduce_scatter(state.grads, group, out=state.grads[state.own])[1]
        else:
            self.pending[unit] = all_reduce_(state.grads, group)

    def finish(self) -> None:
        """Sum what has not been summed yet, and wait for all of it."""
        for unit in reversed(self.units):
            if unit not in self.pending:
                self.begin(unit)
        for work in self.pending.values():
            work.wait()
        self.pending.clear()

    def norm_and_flags(self, flag: bool = False) -> Tensor:
        """The 2-norm of the global gradient and the number of ranks that raised the flag: (2,), the same on every rank.

        Each dp rank sums the squares of a part. The flag is a rank's wish to stop, which so costs no collective. All
        ranks' summands are gathered and added in the order of the ranks, so no backend decides on the rounding.
        """
        dp, dp_rank = self.mesh.size("dp"), self.mesh.index("dp")
        total = torch.zeros(1, 2, device=self.mesh.device)
        for state in self.state.blocks:
            total[0, 0] += state.square_sum(state.part(dp_rank, dp))
        total[0, 1] = float(flag)
        everyone, gathering = all_gather(total, self.mesh.group("world"))  # (world, 2)
        gathering.wait()
        total = everyone.sum(0)
        total[0].sqrt_()
        return total

    def clip(self, norm: Tensor, largest: float) -> None:
        """Scale the gradients so that the global norm is at most `largest`; 0 leaves them."""
        if largest > 0:
            scale = (largest / (norm + 1e-6)).clamp(max=1.0)  # stays on the device: no wait for the gpu
            for state in self.state.blocks:
                state.grads[state.own].mul_(scale)
