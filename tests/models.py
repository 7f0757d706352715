"""A small decoder with all that training needs, on whatever mesh is there."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tptrain.config.schema import ModelConfig, OptimConfig
from tptrain.models.settings import decoder_spec
from tptrain.models.spec import DecoderSpec
from tptrain.nn.cross_entropy import CrossEntropy
from tptrain.nn.decoder import Decoder
from tptrain.nn.store import Store
from tptrain.ops.table import REFERENCE, Operations
from tptrain.optim.adamw import Optimizer
from tptrain.parallel.mesh import Mesh
from tptrain.train.runner import Runner
from tptrain.train.schedule import Schedule, plain
from tptrain.train.trainer import cross_entropy


@dataclass
class Training:
    model: Decoder
    store: Store
    optimizer: Optimizer
    loss: CrossEntropy
    runner: Runner

    def backward(self, tokens: Tensor, scale: float, schedule: Schedule = plain, batches: int = 1) -> Tensor:
        """Forward and backward of (B, T + 1) ids, in equal micro-batches; returns the loss times `scale`."""
        parts = [(each[:, :-1], each[:, 1:].flatten()) for each in tokens.chunk(batches)]
        return self.runner.run(schedule(batches, self.runner.units), parts.__getitem__, scale)


def training(
    config: ModelConfig,
    grid: Mesh,
    *,
    zero: bool = False,
    recompute: str = "none",
    dtype: torch.dtype = torch.float32,
    optim: OptimConfig | None = None,
    ops: Operations = REFERENCE,
    frozen: tuple[str, ...] = (),
    spec: DecoderSpec | None = None,
) -> Training:
    """`frozen`: parts of names; parameters that have one of them are not trained. `spec`: instead of the config's."""
    model = Decoder(spec or decoder_spec(config), grid, ops)
    for name, p in model.named_parameters():
        p.requires_grad_(not any(part in name for part in frozen))
    store = Store(model, dtype, grid.size("dp"))
    optimizer = Optimizer(store, optim or OptimConfig(), grid, zero)
    loss = cross_entropy(model, ops)
    return Training(model, store, optimizer, loss, Runner(model, loss, optimizer.reducer, recompute))
