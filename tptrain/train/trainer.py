"""A rank's model, data and optimizer, and one step of them."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tptrain.config import Config
from tptrain.config.schema import micro_batch_size
from tptrain.data.order import TokenData
from tptrain.data.packing import prepare
from tptrain.hf import check_installed
from tptrain.models.settings import decoder_spec
from tptrain.nn.cross_entropy import CrossEntropy
from tptrain.nn.decoder import Decoder
from tptrain.nn.parameter import initial_values
from tptrain.nn.store import Store
from tptrain.ops.table import Operations
from tptrain.optim.adamw import Optimizer
from tptrain.optim.schedule import learning_rate
from tptrain.parallel.collectives import all_reduce_
from tptrain.parallel.mesh import Mesh
from tptrain.train.runner import Runner
from tptrain.train.schedule import Schedule, overlapped, plain

if TYPE_CHECKING:  # Transformers is imported where its models are trained
    from tptrain.hf.model import TransformersModel

    Model = Decoder | TransformersModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def new_model(config: Config, mesh: Mesh, ops: Operations) -> "Model":
    """Without memory for its weights. Every rank calls it."""
    if config.model.engine != "transformers":
        return Decoder(decoder_spec(config.model), mesh, ops)
    check_installed()
    from tptrain.hf.model import of_config

    return of_config(config, mesh, ops)


def build_model(config: Config, mesh: Mesh, ops: Operations) -> tuple["Model", Store]:
    """The model and the memory of its weights, without values. Every rank calls it."""
    model = new_model(config, mesh, ops)
    store = Store(model, DTYPES[config.train.precision], mesh.size("dp"))
    if not isinstance(model, Decoder):
        model.settle()
    return model, store


def cross_entropy(model: "Model", ops: Operations, kind: type[CrossEntropy] = CrossEntropy) -> CrossEntropy:
    """The loss of a model's output head."""
    head = model.output_head
    return kind(head.weight, head.vocab_size, model.mesh, ops, head.softcap, head.bias)


def micro_batches(config: Config, mesh: Mesh) -> tuple[int, Schedule]:
    """Into how many parts a micro-batch is cut, and the schedule that runs them."""
    return (2, overlapped) if config.parallel.overlap and mesh.size("tp") > 1 else (1, plain)


@dataclass
class Trainer:
    """The parts of a run on one rank."""

    config: Config
    mesh: Mesh
    data: TokenData
    model: "Model"
    optimizer: Optimizer
    loss: CrossEntropy

    def __post_init__(self) -> None:
        self.parts, self.schedule = micro_batches(self.config, self.mesh)
        self.size = micro_batch_size(self.config, self.mesh.size("dp"))  # sequences of a micro-batch
        self.runner = Runner(self.model, self.loss, self.optimizer.reducer, self.config.train.recompute)

    def to_device(self, tokens: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(b, T + 1) ids -> inputs (b, T) and targets (b*T,), on the device."""
        ids = torch.from_numpy(tokens)
        if self.mesh.device.type == "cuda":  # from other memory the copy would wait for the GPU
            ids = ids.pin_memory()
        ids = ids.to(self.mesh.device, non_blocking=True)
        return ids[:, :-1], ids[:, 1:].flatten()

    def step(
        self, step: int, wants_stop: Callable[[], bool] = lambda: False, before_update: Callable[[], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Do optimizer step number `step`, the first being 1; `before_update` is called before weights change.

        Returns this dp rank's summand of the mean loss in nats, a scalar, and (2,): the gradient norm before clipping,
        and how many ranks want to stop.
        """
        train, optimizer, reducer = self.config.train, self.optimizer, self.optimizer.reducer
        optimizer.state.zero_grad()
        share = train.global_batch_size // self.mesh.size("dp")
        size = self.size // self.parts
        actions = self.schedule(share // size, self.runner.units)
        tokens_in_step = train.global_batch_size * train.seq_len
        total = self.runner.run(actions, self._batches(step, share, size), 1 / tokens_in_step)
        reducer.finish()
        norm = reducer.norm_and_flags(wants_stop())
        reducer.clip(norm[0], self.config.optim.grad_clip)
        # On the device, no wait for it: the update is left out where this is 1.
        skip = (~norm[0].isfinite()).float() if train.on_nan == "skip" else None
        if before_update is not None:
            before_update()
        optimizer.step(learning_rate(self.config.optim, step, train.steps), skip)
        return total, norm

    def _batches(self, step: int, share: int, size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """This dp rank's micro-batches of a step, of `size` sequences each; the next one is read ahead."""
        everyone = self.config.train.global_batch_size
        first = (step - 1) * everyone + self.mesh.index("dp") * share  # a global sample index

        def batch(number: int) -> tuple[Tensor, Tensor]:
            start = first + number * size
            tokens = self.data.samples(start, size)
            is_last = start + size >= first + share
            self.data.prefetch(first + everyone if is_last else start + size, size)
            return self.to_device(tokens)

        return batch

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean cross entropy in nats a token over the first held-out sequences, the same on every rank."""
        train, held_out, dp = self.config.train, self.data.validation, self.mesh.size("dp")
        count = min(train.eval_sequences, len(held_out))
        total = torch.zeros((), device=self.mesh.device)
        first = self.mesh.index("dp")
        own = range(first, first + -(-count // dp) * dp, dp)  # as many on every rank
        for start in range(0, len(own), self.size):
            indices = own[start : start + self.size]
            tokens = np.stack([held_out.sequence(min(index, count - 1)) for index in indices])
            inputs, targets = self.to_device(tokens)
            losses = self.loss.losses(self.model(inputs), targets)
            total += losses.view(len(tokens), -1)[: sum(index < count for index in indices)].sum()
            self.mesh.box.touch()
        all_reduce_(total, self.mesh.group("dp")).wait()
        return total.item() / (count * train.seq_len)


def build(config: Config, mesh: Mesh, ops: Operations, say: Callable[[str], None] = print) -> Trainer:
    """Data, model, gradients and optimizer, without values of the weights.

    Raises UserError for data that cannot be trained on.
    """
    folder = mesh.control.main_first(lambda: prepare(config.data, say, mesh.box.touch))
    data = TokenData(folder, config.train.seq_len, config.train.seed)
    torch.manual_seed(config.train.seed)
    model, store = build_model(config, mesh, ops)
    optimizer = Optimizer(store, config.optim, mesh, config.parallel.zero == 1)
    loss = cross_entropy(model, ops)
    return Trainer(config, mesh, data, model, optimizer, loss)


def initialise(trainer: Trainer) -> None:
    """Set the weights of step 0, drawn on all of this rank's cores."""
    seed, cores = trainer.config.train.seed, len(os.sched_getaffinity(0))
    trainer.optimizer.state.initialise(lambda name, p: initial_values(name, p, seed, cores))


def parameter_counts(model: "Model") -> tuple[int, int]:
    """Parameters of the model, and of this rank's slices."""
    layouts = [p.sharding for p in model.parameters()]  # type: ignore[attr-defined]
    return sum(math.prod(layout.shape) for layout in layouts), sum(layout.size for layout in layouts)
