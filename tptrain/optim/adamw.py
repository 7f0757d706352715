"""The optimizer step: AdamW on float32 masters, and the new weights."""

import torch
from torch import Tensor, nn

from tptrain.config.schema import OptimConfig
from tptrain.nn.store import Store
from tptrain.optim.reduce import Reducer
from tptrain.optim.state import TrainingState
from tptrain.parallel.collectives import all_gather
from tptrain.parallel.mesh import Mesh


class Optimizer:
    """Trains a store's parameters. Making one gives them gradients, masters and moments."""

    def __init__(self, store: Store, config: OptimConfig, mesh: Mesh, zero: bool) -> None:
        self.config, self.mesh = config, mesh
        self.zero = zero and mesh.size("dp") > 1
        part, parts = (mesh.index("dp"), mesh.size("dp")) if self.zero else (0, 1)
        self.state = TrainingState(store, part, parts)
        self.reducer = Reducer(self.state, mesh, self.zero)
        self.adamw = _adamw(self.state, config)

    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """Update the masters and publish them. Where `skip` is 1 the masters stay as they are."""
        if skip is not None:
            self.adamw.found_inf = skip  # type: ignore[attr-defined]
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Masters to weights: rounded to the compute precision, and gathered over dp."""
        gathering = []
        for state in self.state.blocks:
            own = state.weights[state.own]
            if own.dtype != torch.float32:
                own.copy_(state.master)
            if self.zero:
                gathering.append(all_gather(own, self.mesh.group("dp"), out=state.weights)[1])
        for work in gathering:
            work.wait()

    @property
    def updates(self) -> int:
        """Updates of the weights so far: fewer than steps where some were skipped."""
        entry = next(iter(self.adamw.state.values()), None)  # none where all of this rank's parts are padding
        return 0 if entry is None else int(entry["step"].item())

    @updates.setter
    def updates(self, value: int) -> None:
        for entry in self.adamw.state.values():
            entry["step"].fill_(value)


def _adamw(state: TrainingState, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over this rank's parts of blocks.

    Vectors are not decayed. The moments exist from the start, as float32 like the masters, so that a checkpoint always
    has the same entries.
    """
    decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    entries = {}
    for block in state.blocks:
        for decay, run in block.runs(block.own, lambda each: each.decay):
            place = slice(run.start - block.own.start, run.stop - block.own.start)
            master = nn.Parameter(block.master[place])
            master.grad = block.grads[run]
            decayed[decay].append(master)
            moments = {moment: tensor[place] for moment, tensor in block.moments.items()}
            entries[master] = {"step": torch.zeros((), device=master.device)} | moments
    groups = [
        {"params": decayed[True], "weight_decay": config.weight_decay},
        {"params": decayed[False], "weight_decay": 0.0},
    ]
    betas = config.beta1, config.beta2
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    adamw.state.update(entries)
    return adamw
