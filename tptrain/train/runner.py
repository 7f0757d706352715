"""Runs the actions of a schedule on one rank: each segment has a graph of its own, cut from its neighbours'."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tptrain.nn.context import Context
from tptrain.nn.cross_entropy import CrossEntropy
from tptrain.nn.decoder import Segment, Stream
from tptrain.nn.linear import PendingSum
from tptrain.optim.reduce import Reducer
from tptrain.parallel.mesh import Mesh
from tptrain.train.schedule import Action, Backward, Forward, Loss, Reduce

Batch = Callable[[int], tuple[Tensor, Tensor]]  # number of a micro-batch -> inputs (b, T), targets (b*T,)


class Model(Protocol):
    """What is run: tptrain's decoder, or a model of Transformers."""

    mesh: Mesh

    def segments(self, recompute: str = "none") -> list[Segment]: ...

    def context(self, tokens: Tensor) -> Context: ...


@dataclass
class _Graph:
    """What a segment's forward pass leaves for its backward pass."""

    outputs: list[tuple[int, GradientEdge]]  # which of the stream's tensors needs a gradient, and where it enters
    entry: list[Tensor]  # filled by the backward pass: the gradients to the stream that came in
    inputs: Stream | None = None  # instead of a graph, where the forward pass is to be run again


@dataclass
class MicroBatch:
    """One that is under way."""

    context: Context
    targets: Tensor
    stream: Stream  # the last segment's output
    graphs: dict[int, _Graph] = field(default_factory=dict)  # by segment
    gradients: list[Tensor] = field(default_factory=list)  # to the last segment's output that is still to be run back


class _Cut(torch.autograd.Function):
    """The entrance of a segment's graph: gradients that arrive here go into `entry` and no further."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, entry: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.entry, ctx.count = entry, len(tensors)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        ctx.entry.extend(grads)
        return None, None, *[None] * ctx.count


class Runner:
    """Runs a model's segments. Nothing is run back below the lowest segment that has a trained parameter."""

    def __init__(self, model: Model, loss: CrossEntropy, reducer: Reducer, recompute: str = "none") -> None:
        self.model, self.loss, self.reducer = model, loss, reducer
        self.segments, self.again = model.segments(recompute), recompute == "full"
        trained = [any(p.requires_grad for p in segment.parameters) for segment in self.segments]
        self.lowest = trained.index(True) if True in trained else len(trained)
        self.anchor = torch.empty(0, requires_grad=True)  # autograd looks at a cut because of it

    @property
    def units(self) -> list[str]:
        """The unit of each segment."""
        return [segment.unit for segment in self.segments]

    def run(self, actions: Sequence[Action], batch: Batch, scale: float) -> Tensor:
        """Add the gradients of `scale` times the micro-batches' summed cross entropy; returns that, a scalar."""
        under_way: dict[int, MicroBatch] = {}
        total = torch.zeros((), device=self.model.mesh.device)
        for action in actions:
            match action:
                case Forward(number, segment):
                    if segment == 0:
                        tokens, targets = batch(number)
                        under_way[number] = MicroBatch(self.model.context(tokens), targets, Stream(tokens))
                    self._forward(under_way[number], segment)
                case Loss(number):
                    total += self._loss(under_way[number], scale)
                    self.model.mesh.box.touch()
                case Backward(number, segment):
                    self._backward(under_way[number], segment)
                    if segment == 0:
                        del under_way[number]
                case Reduce(unit):
                    self.reducer.begin(unit)
        assert not under_way, "a schedule that ends before its last backward pass"
        return total

    def _forward(self, micro: MicroBatch, segment: int) -> None:
        if segment < self.lowest:
            with torch.no_grad():
                micro.stream = self.segments[segment].forward(micro.stream, micro.context)
        elif self.again and 0 < segment < len(self.segments) - 1:
            micro.graphs[segment] = _Graph([], [], micro.stream)
            with torch.no_grad():
                micro.stream = self.segments[segment].forward(micro.stream, micro.context)
        else:
            micro.graphs[segment], micro.stream = self._graph(micro, segment, micro.stream)

    def _graph(self, micro: MicroBatch, segment: int, inputs: Stream) -> tuple[_Graph, Stream]:
        """Run a segment with autograd; what comes out is cut from its graph."""
        entry: list[Tensor] = []
        if segment > self.lowest:
            x, *ys = _Cut.apply(self.anchor, entry, *_tensors(inputs))  # type: ignore[misc]
            inputs = Stream(x, _carried(inputs.branch, ys[0]) if ys else None)
        outputs = self.segments[segment].forward(inputs, micro.context)
        edges = [(i, get_gradient_edge(y)) for i, y in enumerate(_tensors(outputs)) if y.requires_grad]
        x, *ys = (tensor.detach() for tensor in _tensors(outputs))
        return _Graph(edges, entry), Stream(x, _carried(outputs.branch, ys[0]) if ys else None)

    def _loss(self, micro: MicroBatch, scale: float) -> Tensor:
        needs_gradient = self.lowest < len(self.segments)
        loss, grad = self.loss.backward(micro.stream.x, micro.targets, scale, needs_gradient)
        micro.gradients, micro.stream = [grad], Stream(micro.stream.x.new_empty(0))
        return loss

    def _backward(self, micro: MicroBatch, segment: int) -> None:
        if segment < self.lowest:
            return
        graph = micro.graphs.pop(segment)
        if graph.inputs is not None:
            graph, _ = self._graph(micro, segment, graph.inputs)
        gradients, micro.gradients = micro.gradients, []
        if graph.outputs:
            torch.autograd.backward([edge for _, edge in graph.outputs], [gradients[i] for i, _ in graph.outputs])
        micro.gradients = graph.entry


def _tensors(stream: Stream) -> list[Tensor]:
    return [stream.x] if stream.branch is None else [stream.x, stream.branch.y]


def _carried(branch: PendingSum | None, y: Tensor) -> PendingSum:
    """The branch, with `y` in place of its tensor: the same memory, another graph."""
    assert branch is not None
    return replace(branch, y=y)
