"""One step of a cut model on whatever mesh is there, with all that it computes laid open.

What it computes is a list of items in the order in which a step comes to them: outputs of modules, the loss, the
gradient to each module's input and those of its parameters, the gradient norm, parameters after the update. An item
knows where this rank's part of it lies in the whole, as one rank has it.

Shapes: see nn/decoder.py; S sequences of a step over all dp ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tptrain.config import Config
from tptrain.models.cut import BATCHES, SEQUENCES, Cut
from tptrain.models.spec import DecoderSpec
from tptrain.nn.decoder import Decoder, Stream
from tptrain.nn.parameter import Parameter, initial_values, parameters
from tptrain.nn.store import Store
from tptrain.ops.table import Operations
from tptrain.optim.adamw import Optimizer
from tptrain.parallel.collectives import NOTHING, all_gather
from tptrain.parallel.mesh import Mesh
from tptrain.train.runner import MicroBatch, Runner
from tptrain.train.trainer import DTYPES, cross_entropy, micro_batches

LR = 1e-2  # of the update, which AdamW's eps makes about half as large
NEAR = 0.1  # standard deviation of the vectors: norms about 1 (or 0), biases about 0

Place = tuple[slice, ...]  # in the whole tensor


@dataclass(frozen=True)
class Item:
    """This rank's part of something that a step computes."""

    module: str
    what: str  # output, input gradient, gradient, ...
    value: Tensor
    place: Place
    depth: int  # modules that the step has passed to come here: rounding grows with it
    hint: str = ""  # the kind of mistake that this module invites, where no other is recognised

    @property
    def key(self) -> str:
        """The name of the whole tensor."""
        return f"{self.module} {self.what}"


class Recorder(Runner):
    """Runs a schedule and keeps what comes out of every segment, forward and backward."""

    def __init__(self, model: Decoder, optimizer: Optimizer, ops: Operations, recompute: str, first: int) -> None:
        """`first`: of all tokens of a step, this dp rank's first one."""
        super().__init__(model, cross_entropy(model, ops), optimizer.reducer, recompute)
        self.decoder = model
        self.names = ["embed_tokens", *self._layer_names(recompute == "full"), "norm"]  # of the segments
        self.items: list[Item] = []
        self.next = first  # the first token of the micro-batch that begins next
        self.starts: dict[int, int] = {}  # of a micro-batch's tokens, by the id of its state

    def _layer_names(self, whole: bool) -> Iterator[str]:
        for i in range(len(self.decoder.spec.layers)):
            yield from [f"layers.{i}"] if whole else [f"layers.{i}.self_attn", f"layers.{i}.mlp"]

    def _forward(self, micro: MicroBatch, segment: int) -> None:
        if segment == 0:
            self.starts[id(micro)] = self.next
            self.next += micro.stream.x.numel()
        super()._forward(micro, segment)
        stream = micro.stream
        if stream.branch is not None:
            stream.branch.work.wait()
            micro.stream = Stream(stream.x, replace(stream.branch, work=NOTHING))
        with torch.no_grad():
            x = stream.x if micro.stream.branch is None else micro.stream.branch.wait()
            self._keep(micro, self.names[segment], "output", x, segment)
            if layer := self._layer_of("mlp", segment):
                self._keep(micro, layer, "output", stream.x + x, segment)

    def _layer_of(self, half: str, segment: int) -> str:
        """The layer whose half a segment is; empty where it is no such half, or where this is not the reference. That
        has whole layers as well: where layers are recomputed, ranks have nothing smaller.
        """
        layer, _, own = self.names[segment].rpartition(".")
        return layer if own == half and self.model.mesh.world == 1 else ""

    def _loss(self, micro: MicroBatch, scale: float) -> Tensor:
        x, start, depth = micro.stream.x, self.starts[id(micro)], len(self.segments)
        rows = slice(start, start + len(micro.targets))
        with torch.no_grad():
            logits = self.decoder.logits(x)[:, : self.loss.columns].clone()  # (N, v)
            losses = self.loss.losses(x, micro.targets)  # (N,)
        columns = slice(self.loss.first, self.loss.first + self.loss.columns)
        self.items.append(Item("lm_head", "output", logits, (rows, columns), depth))
        self.items.append(Item("loss", "of each token", losses, (rows,), depth))
        total = super()._loss(micro, scale)
        self._keep(micro, "lm_head", "input gradient", micro.gradients[0], depth)
        return total

    def _backward(self, micro: MicroBatch, segment: int) -> None:
        super()._backward(micro, segment)
        depth = 2 * len(self.segments) - segment
        for gradient, what in zip(micro.gradients, ("input gradient", "branch's gradient"), strict=False):
            self._keep(micro, self.names[segment], what, gradient, depth)
        if layer := self._layer_of("self_attn", segment):
            self._keep(micro, layer, "input gradient", micro.gradients[0], depth)

    def _keep(self, micro: MicroBatch, module: str, what: str, x: Tensor, depth: int) -> None:
        """Of (n, D): all of a micro-batch's tokens or, with sequence parallelism, this rank's part of them."""
        mesh, start = self.model.mesh, self.starts[id(micro)]
        start += mesh.index("tp") * len(x) if mesh.sequence_parallel else 0
        place = slice(start, start + len(x)), slice(0, x.shape[1])
        self.items.append(Item(module, what, x.detach().clone(), place, depth))


class Step:
    """A cut model with all that one step takes."""

    def __init__(self, cut: Cut, config: Config, mesh: Mesh, ops: Operations) -> None:
        assert isinstance(cut.spec, DecoderSpec)
        self.mesh, self.seed = mesh, config.train.seed
        self.sequences = SEQUENCES * BATCHES  # of this dp rank
        self.model = Decoder(cut.spec, mesh, ops)
        self.store = Store(self.model, DTYPES[config.train.precision], mesh.size("dp"))
        self.optimizer = Optimizer(self.store, config.optim, mesh, config.parallel.zero == 1)
        self.parts, self.schedule = micro_batches(config, mesh)
        first = mesh.index("dp") * self.sequences * cut.length
        self.recorder = Recorder(self.model, self.optimizer, ops, config.train.recompute, first)

    def draw(self) -> None:
        """Random weights, none of them 0 or 1 by rule: that would hide mistakes."""

        self.optimizer.state.initialise(
            lambda name, p: random_values(name, p, self.seed, centre=p.init_constant or 0.0)
        )

    def weights(self, what: str = "at the start") -> list[Item]:
        """The parameters, without the vocabulary's padding, which takes no part."""
        return [self._of_parameter(name, p, what, p.detach(), 0) for name, p in parameters(self.model)]

    def forward_and_backward(self, tokens: Tensor) -> list[Item]:
        """Of (S, T + 1) ids, the same on every rank."""
        dp = self.mesh.size("dp")
        rows = tokens.chunk(dp)[self.mesh.index("dp")].to(self.mesh.device)
        batches = [(each[:, :-1], each[:, 1:].flatten()) for each in rows.chunk(BATCHES * self.parts)]
        self.optimizer.state.zero_grad()
        actions = self.schedule(len(batches), self.recorder.units)
        self.recorder.run(actions, batches.__getitem__, 1 / tokens[:, 1:].numel())
        finish_gradients(self.optimizer)
        return list(self._in_order())

    def _in_order(self) -> Iterator[Item]:
        """Items of the run, and after those of each segment its parameters' gradients."""
        recorder = self.recorder
        names = {id(p): (name, p) for name, p in parameters(self.model)}
        backward = [item for item in recorder.items if "gradient" in item.what]
        yield from (item for item in recorder.items if "gradient" not in item.what)
        segments = [("lm_head", list(self.model.lm_head.parameters()))]
        segments += list(zip(recorder.names, (each.parameters for each in recorder.segments), strict=True))[::-1]
        for number, (module, members) in enumerate(segments):
            for p in members:
                if module == "lm_head" and self.model.spec.tied:  # complete only once the embedding has added its part
                    continue
                name, own = names[id(p)]
                if own.main_grad is not None:
                    yield self._of_parameter(name, own, "gradient", own.main_grad, len(recorder.segments) + number)
            yield from (item for item in backward if module in (item.module, f"{item.module}.self_attn"))

    def norm(self) -> Item:
        """Of all gradients, before clipping."""
        value = self.optimizer.reducer.norm_and_flags()[0]
        return Item("gradient norm", "before clipping", value, (), 2 * len(self.recorder.segments))

    def update(self, norm: float) -> list[Item]:
        """The parameters after it; see `first_step`."""
        first_step(self.optimizer, norm)
        return [replace(item, depth=2 * len(self.recorder.segments)) for item in self.weights("after the step")]

    def _of_parameter(self, name: str, p: Parameter, what: str, value: Tensor, depth: int) -> Item:
        rows = self.model.spec.vocab_size if name in ("embed_tokens.weight", "lm_head.weight") else None
        return slice_item(name, p, what, value, depth, rows)


def random_values(name: str, p: Parameter, seed: int, centre: float = 0.0) -> Tensor:
    """Of a rank's slice at the start, around `centre`: none of them 0 or 1 by rule, which would hide mistakes."""
    p.init_constant, p.init_std = None, NEAR if len(p.sharding.shape) <= 1 else p.sharding.shape[-1] ** -0.5
    return initial_values(name, p, seed) + centre


def finish_gradients(optimizer: Optimizer) -> None:
    """Sum the gradients over the ranks; with ZeRO-1, where a dp rank gets the sum of its part only, gather all."""
    optimizer.reducer.finish()
    if optimizer.zero:
        for state in optimizer.state.blocks:
            all_gather(state.grads[state.own], optimizer.mesh.group("dp"), out=state.grads)[1].wait()


def first_step(optimizer: Optimizer, norm: float) -> None:
    """Clip the gradients to half of their norm and do AdamW's first step.

    That step is lr * g / (|g| + eps), so that a tiny eps would make full steps of the rounding in gradients near zero:
    it is the gradients' root mean square here.
    """
    optimizer.reducer.clip(optimizer.reducer.norm_and_flags()[0], norm / 2)
    count = sum(math.prod(p.sharding.shape) for _, p in parameters(optimizer.state.store.model))
    for group in optimizer.adamw.param_groups:
        group["eps"] = norm / 2 / math.sqrt(count)
    optimizer.step(LR)


def slice_item(name: str, p: Parameter, what: str, value: Tensor, depth: int, rows: int | None = None) -> Item:
    """Of a parameter's slice, or of something in its shape; `rows`: of the whole one without a vocabulary's padding,
    which takes no part.
    """
    layout, value = p.sharding, value.view(p.sharding.local_shape)
    ends = list(layout.local_shape)
    if rows is not None:
        ends[0] = max(0, min(ends[0], rows - layout.offsets[0]))
        value = value[: ends[0]]
    place = tuple(slice(start, start + length) for start, length in zip(layout.offsets, ends, strict=True))
    return Item(name, what, value, place, depth)


def token_ids(cut: Cut, sequences: int, seed: int) -> Tensor:
    """(S, T + 1) random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(cut.spec.vocab_size, (sequences, cut.length + 1), generator=generator)
