"""One step of a cut model of Transformers with all that it computes laid open: as one plain model, and on ranks.

The plain model is Transformers' own, trained by PyTorch alone: nothing of it is tptrain's but the weights that it gets.
Items: see step.py. Outputs are those of the layers and of the modules that a layer consists of, and the gradients to
them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tptrain.checkpoint import safetensors
from tptrain.checkpoint.transformers import load_converted, read_whole
from tptrain.config import Config
from tptrain.hf.model import TransformersModel, build, fill_buffers, on_meta, read_config
from tptrain.hf.weights import sources
from tptrain.hf.width import narrow
from tptrain.models.cut import BATCHES, SEQUENCES, Cut
from tptrain.models.safetensors import TensorFiles
from tptrain.nn.parameter import Parameter, parameters
from tptrain.nn.store import Store
from tptrain.ops.table import Operations
from tptrain.optim.adamw import Optimizer
from tptrain.parallel.mesh import Mesh
from tptrain.train.runner import Runner
from tptrain.train.schedule import plain
from tptrain.train.trainer import DTYPES, cross_entropy
from tptrain.verify.outputs import Outputs, packed_as_one
from tptrain.verify.step import LR, Item, finish_gradients, first_step, random_values, slice_item


def config_of(cut: Cut, config: Config) -> Any:
    """Transformers' config of the smaller model, which still has all of its layers."""
    smaller = read_config(config.model.source, config.model.dropout, config.verify.vocab)
    narrow(smaller, cut.widths)
    return smaller


def norm_weights(inner: Any) -> set[str]:
    """Names of the weights of norms, which are near 1."""
    return {f"{name}.weight" for name, module in inner.named_modules() if "norm" in type(module).__name__.lower()}


def names_in_part(cut: Cut) -> Callable[[str], str | None]:
    """The name in the cut model of a parameter of the whole one; None where it is not there."""
    places = {str(layer): str(place) for place, layer in enumerate(cut.layers)}

    def name_in_part(name: str) -> str | None:
        if not cut.stack or not name.startswith(f"{cut.stack}."):
            return name
        number, _, rest = name.removeprefix(f"{cut.stack}.").partition(".")
        return f"{cut.stack}.{places[number]}.{rest}" if number in places else None

    return name_in_part


def buffers(inner: Any) -> list[Item]:
    """Those that follow from the config."""
    saved = inner.state_dict().keys()
    return [
        Item(name, "buffer", value.detach().float().clone(), tuple(slice(0, n) for n in value.shape), 0)
        for name, value in inner.named_buffers()
        if value.is_floating_point() and name not in saved
    ]


class PlainStep:
    """The reference: Transformers' model on one device, trained by PyTorch."""

    def __init__(self, cut: Cut, config: Config, device: torch.device) -> None:
        self.cut, self.config, self.device = cut, config, device
        self.dtype = DTYPES[config.train.precision]
        source = config_of(cut, config)
        layers = cut.layers if cut.stack else None
        self.inner = build(source, layers)
        self.shapes = dict(parameters(on_meta(config.model, source, layers)))
        self._give_memory()
        fill_buffers(self.inner, device)
        self.inner.train()
        self._fill()
        self.outputs = Outputs(self.inner, cut)
        self.gradients: dict[str, Tensor] = {}

    def _give_memory(self) -> None:
        """To the parameters, without values; a tied one stays one."""
        whole = {
            p: nn.Parameter(torch.empty(p.shape, dtype=self.dtype, device=self.device)) for p in self.inner.parameters()
        }
        for module in self.inner.modules():
            for key, p in module._parameters.items():
                if p is not None:
                    module._parameters[key] = whole[p]

    @torch.no_grad()
    def _fill(self) -> None:
        ours = dict(self._stored())
        if self.config.verify.weights != "model":
            norms = norm_weights(self.inner)
            for name, p in ours.items():
                values = random_values(name, self.shapes[name], self.config.train.seed, float(name in norms))
                values = values.view(self.shapes[name].shape_in_module)
                p.copy_(values[: len(p)] if p.dim() else values)  # without the padding of a vocabulary
            return
        assert self.config.model.directory is not None
        entries = TensorFiles(Path(self.config.model.directory), integers=True).entries
        name_in_part = names_in_part(self.cut)
        whole = build(read_config(self.config.model.source, self.config.model.dropout))
        with closing(safetensors.Reader()) as reader:
            for group in sources(whole, entries):
                if name_in_part(group.target) is None:
                    continue
                for name, value in group.convert(whole, lambda each: read_whole(entries[each], reader)).items():
                    if (target := name_in_part(name)) in ours:
                        ours[target].copy_(value)

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint has: parameters, and buffers that do not follow from the config."""
        yield from self.inner.named_parameters()
        yield from ((name, buffer) for name, buffer in self.inner.named_buffers() if name in self.shapes)

    def _items(self, what: str, values: dict[str, Tensor], depth: int) -> list[Item]:
        """Of parameters, in the shape that they are stored in."""
        items = []
        for name, value in values.items():
            shape = self.shapes[name].sharding.shape
            shape = (len(value), *shape[1:]) if len(shape) == value.dim() > 0 else shape
            items.append(Item(name, what, value.detach().view(shape), tuple(slice(0, n) for n in shape), depth))
        return items

    def weights(self, what: str = "at the start") -> list[Item]:
        values = {name: p.clone() for name, p in self._stored()}
        items = self._items(what, values, 0)
        return [*items, *buffers(self.inner)] if what == "at the start" else items

    def forward_and_backward(self, tokens: Tensor) -> list[Item]:
        """Of (S, T + 1) ids. The gradients of micro-batches are added in float32."""
        head: list[Item] = []
        first = 0
        for rows in tokens.to(self.device).split(SEQUENCES):
            inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
            self.outputs.begin(first, inputs.numel())
            logits = self.inner(input_ids=inputs, use_cache=False).logits.flatten(0, 1)  # (N, V)
            self.outputs.end()
            losses = F.cross_entropy(logits.float(), targets, reduction="none")  # (N,)
            (losses.sum() / tokens[:, 1:].numel()).backward()
            head += head_items(logits.detach(), losses.detach(), first, 0, len(self.outputs.names))
            first += inputs.numel()
            for name, p in self.inner.named_parameters():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                self.gradients[name] = self.gradients.get(name, 0.0) + grad.float()
                p.grad = None
        trained = {name: grad for name, grad in self.gradients.items() if self.shapes[name].requires_grad}
        return [*self.outputs.in_order([*head, *self._items("gradient", trained, 2 * len(self.outputs.names))])]

    def norm(self) -> Item:
        squares = [g.double().square().sum() for n, g in self.gradients.items() if self.shapes[n].requires_grad]
        value = torch.stack(squares).sum().sqrt().float()
        return Item("gradient norm", "before clipping", value, (), 2 * len(self.outputs.names))

    @torch.no_grad()
    def update(self, norm: float) -> list[Item]:
        """Clip the gradients to half of their norm and do AdamW's first step, on float32 masters."""
        trained = [name for name in self.gradients if self.shapes[name].requires_grad]
        named = dict(self.inner.named_parameters())
        masters = {name: nn.Parameter(named[name].detach().float()) for name in trained}
        for name, master in masters.items():
            master.grad = self.gradients[name] * min(1.0, norm / 2 / (norm + 1e-6))
        optim, count = self.config.optim, sum(math.prod(p.sharding.shape) for p in self.shapes.values())
        groups = [
            {
                "params": [m for n, m in masters.items() if (len(self.shapes[n].sharding.shape) > 1) == matrices],
                "weight_decay": optim.weight_decay if matrices else 0.0,
            }
            for matrices in (True, False)
        ]
        eps = norm / 2 / math.sqrt(count)
        torch.optim.AdamW(groups, lr=LR, betas=(optim.beta1, optim.beta2), eps=eps).step()
        for name, master in masters.items():
            named[name].copy_(master)
        return self.weights("after the step")


def head_items(logits: Tensor, losses: Tensor, first: int, column: int, depth: int) -> list[Item]:
    """Of (N, v) logits from a column on, and (N,) losses, of tokens from the `first` on."""
    rows, columns = slice(first, first + len(losses)), slice(column, column + logits.shape[1])
    return [
        Item("lm_head", "output", logits, (rows, columns), depth),
        Item("loss", "of each token", losses, (rows,), depth),
    ]


class TransformersStep:
    """The model on ranks, with our linears, collectives, loss and optimizer."""

    def __init__(self, cut: Cut, config: Config, mesh: Mesh, ops: Operations) -> None:
        self.cut, self.config, self.mesh = cut, config, mesh
        source = config_of(cut, config)
        again, layers = config.train.recompute == "full", cut.layers if cut.stack else None
        self.model = TransformersModel(source, mesh, config.model.tp_plan, again, layers, ops)
        self.store = Store(self.model, DTYPES[config.train.precision], mesh.size("dp"))
        self.model.settle()
        self.optimizer = Optimizer(self.store, config.optim, mesh, config.parallel.zero == 1)
        self.loss = cross_entropy(self.model, ops)
        self.runner = _Recorder(
            self.model, self.loss, self.optimizer, Outputs(self.model.inner, cut, packed_as_one(self.model))
        )
        self.fill()

    def fill(self) -> None:
        """Set the weights at the start: the model's own, or random ones."""
        config, state = self.config, self.optimizer.state
        if config.verify.weights != "model":
            norms = norm_weights(self.model.inner)
            state.initialise(lambda name, p: random_values(name, p, config.train.seed, float(name in norms)))
            return
        assert config.model.directory is not None
        entries = TensorFiles(Path(config.model.directory), integers=True).entries
        whole = build(read_config(config.model.source, config.model.dropout))
        load_converted(entries, self.model, state.fill, whole=whole, name_in_part=names_in_part(self.cut))

    def weights(self, what: str = "at the start") -> list[Item]:
        items = [self._of_parameter(name, p, what, p.detach(), 0) for name, p in parameters(self.model)]
        return [*items, *buffers(self.model.inner)] if what == "at the start" else items

    def forward_and_backward(self, tokens: Tensor) -> list[Item]:
        """Of (S, T + 1) ids, the same on every rank."""
        index, dp = self.mesh.index("dp"), self.mesh.size("dp")
        rows = tokens.chunk(dp)[index].to(self.mesh.device)
        batches = [(each[:, :-1], each[:, 1:].flatten()) for each in rows.chunk(BATCHES)]
        self.runner.next = index * SEQUENCES * BATCHES * self.cut.length
        self.optimizer.state.zero_grad()
        self.runner.run(plain(len(batches), self.runner.units), batches.__getitem__, 1 / tokens[:, 1:].numel())
        finish_gradients(self.optimizer)
        depth = 2 * len(self.runner.outputs.names)
        gradients = [
            self._of_parameter(name, p, "gradient", p.main_grad, depth)
            for name, p in parameters(self.model)
            if p.main_grad is not None
        ]
        return list(self.runner.outputs.in_order([*self.runner.head, *gradients]))

    def norm(self) -> Item:
        value = self.optimizer.reducer.norm_and_flags()[0]
        return Item("gradient norm", "before clipping", value, (), 2 * len(self.runner.outputs.names))

    def update(self, norm: float) -> list[Item]:
        """The parameters after it; see `first_step`."""
        first_step(self.optimizer, norm)
        depth = 2 * len(self.runner.outputs.names)
        return [replace(item, depth=depth) for item in self.weights("after the step")]

    def _of_parameter(self, name: str, p: Parameter, what: str, value: Tensor, depth: int) -> Item:
        rows = self.model.vocab_size if name in self.model.vocabulary else None
        return slice_item(name, p, what, value, depth, rows)


class _Recorder(Runner):
    """Runs micro-batches and notes what comes out."""

    def __init__(self, model: TransformersModel, loss: Any, optimizer: Optimizer, outputs: Outputs) -> None:
        super().__init__(model, loss, optimizer.reducer)
        self.transformers, self.outputs = model, outputs
        self.head: list[Item] = []
        self.next = self.start = 0

    def _forward(self, micro: Any, segment: int) -> None:
        self.start, tokens = self.next, micro.stream.x.numel()
        self.next += tokens
        self.outputs.begin(self.start, tokens)
        super()._forward(micro, segment)
        self.outputs.end()

    def _loss(self, micro: Any, scale: float) -> Tensor:
        with torch.no_grad():
            logits = self.transformers.logits(micro.stream.x)[:, : self.loss.columns].clone()  # (N, v)
            losses = self.loss.losses(micro.stream.x, micro.targets)  # (N,)
        self.head += head_items(logits, losses, self.start, self.loss.first, len(self.outputs.names))
        return super()._loss(micro, scale)
