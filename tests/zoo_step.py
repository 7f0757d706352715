"""One step of a family's small model: alone, cut by Transformers, and cut by tptrain. Runs on ranks of `zoo_pool`."""

import copy
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests import parity, zoo
from tests import reference as ref
from tests.engine import FLOOR, Engine, slice_of
from tptrain.config import ModelConfig
from tptrain.nn.parameter import parameters

hf.logging.set_verbosity(logging.CRITICAL)
hf.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="transformers")
warnings.filterwarnings("ignore", module="torch.distributed.tensor")
IN_A_LAYER = re.compile(r"\.\d+\.")
ALLOWED = 1e-3  # relative, of the loss and of the gradients


@dataclass
class Step:
    """What one process computes."""

    loader: str  # Transformers' class that loads the model
    tokens: Tensor
    weights: dict[str, Tensor]
    loss: float
    logits: Tensor
    grads: dict[str, Tensor]

    @property
    def norm(self) -> float:
        return sum(grad.double().square().sum().item() for grad in self.grads.values()) ** 0.5


@dataclass
class Distance:
    """How far a rank's step is from that of one process, relative."""

    loss: float
    logits: float
    grad: float
    parameter: str  # whose gradient is the farthest
    weight: float = 0.0  # the farthest of the weights, before the step
    cut: tuple[int, int] = (0, 0)  # parameters of layers: of how many a rank has a slice, how many get a gradient
    share: float = 0.0  # of the elements
    proposed: bool = False  # whether tptrain proposed cuts that neither the model's plan has nor the user's


def worst(ranks: list[Distance]) -> Distance:
    """The rank that is farthest."""
    return max(ranks, key=lambda each: max(_or_infinity(each.loss), _or_infinity(each.grad)))


def difference(of: Distance) -> str:
    """What is farther than allowed, in words; empty where nothing is."""
    if _or_infinity(of.weight) > ALLOWED:
        return f"loads other weights: {of.weight:.0e}; loss {of.loss:.0e}, gradient of {of.parameter} {of.grad:.0e}"
    if _or_infinity(of.loss) > ALLOWED:
        return f"loss {of.loss:.0e}, logits {of.logits:.0e}, gradient of {of.parameter} {of.grad:.0e}"
    return f"gradient of {of.parameter} {of.grad:.0e}" if _or_infinity(of.grad) > ALLOWED else ""


def alone(family: str, folder: Path, kv_heads: int = zoo.KV_HEADS) -> tuple[float, float]:
    """Computes a step, saves it and the model in `folder`. Returns the loss, and how far the model is from what is
    there: the largest distance of a weight after saving and loading."""
    model = zoo.model(family) if kv_heads == zoo.KV_HEADS else zoo.model(family, num_key_value_heads=kv_heads)
    tokens = zoo.tokens()
    model.save_pretrained(folder)
    loss, logits = zoo.loss_and_logits(model, tokens)
    loss.backward()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights |= {name: b.detach() for name, b in model.named_buffers() if name in model.state_dict()}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    automatic = (
        type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    )  # not a text model of which only the whole's config is
    loader = "AutoModelForCausalLM" if automatic else type(model).__name__
    step = Step(loader, tokens, weights, loss.item(), logits.detach(), grads)
    torch.save(step, folder / "step.pt")
    again = _load(step, folder)
    return step.loss, max(_distance(p.detach(), weights[name]) for name, p in again.named_parameters())


def theirs(folder: Path) -> Distance:
    """Transformers' own tensor parallelism over all ranks, against the step in `folder`."""
    step: Step = torch.load(folder / "step.pt", weights_only=False)
    config = DistributedConfig(tp_size=dist.get_world_size())
    model = _load(step, folder, distributed_config=config).train()
    own = dict(model.named_parameters())
    orders = {name: _order(_whole(p.detach()), step.weights[name], p) for name, p in own.items()}
    weight = max(_distance(_whole(p.detach())[orders[name]], step.weights[name]) for name, p in own.items())
    loss, logits = zoo.loss_and_logits(model, step.tokens)
    loss.backward()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, sorted(name for name, p in own.items() if p.grad is not None))
    on_all = set.intersection(*map(set, everywhere))
    grads = {name: _whole(p.grad)[orders[name]] for name, p in own.items() if p.grad is not None and name in on_all}
    grad, parameter = _worst_grad(step, grads)
    in_layers = {name: p for name, p in own.items() if IN_A_LAYER.search(name) and name in step.grads}
    cut = {name: p for name, p in in_layers.items() if _is_cut(p)}
    elements = sum(p.numel() for p in in_layers.values())
    return Distance(
        abs(float(_whole(loss.detach())) / step.loss - 1),
        _distance(_whole(logits.detach()), step.logits),
        grad,
        parameter,
        weight,
        (len(cut), len(in_layers)),
        sum(p.numel() for p in cut.values()) / max(elements, 1),
    )


def ours(family: str, folder: Path) -> Distance:
    """tptrain's step over all ranks, against the step in `folder`."""
    step: Step = torch.load(folder / "step.pt", weights_only=False)
    source = hf.AutoConfig.from_pretrained(folder).to_dict()
    case = ref.Case(family, ModelConfig(path="DIR", source=copy.deepcopy(source), dropout=0.0))
    weights, grads = ref.to_ours(case, step.weights), ref.to_ours(case, step.grads)
    logits = step.logits[..., : ref.VOCAB]
    # `distances` also steps the weights, from which nothing is taken here.
    reference = ref.Reference(weights, step.tokens, step.loss, logits, grads, step.norm, weights)
    with patch.object(ref, "BATCH", zoo.BATCH):
        values = parity.distances(case, reference, parity.Topology(dist.get_world_size()))
    farthest = max((name for name in values if name.startswith("grad ")), key=lambda name: _or_infinity(values[name]))
    return Distance(values["loss"], values["logits"], values[farthest], farthest.removeprefix("grad "))


def engine(folder: Path, propose: bool | None = None) -> Distance:
    """The step of Transformers' model in tptrain's hands over all ranks, against the step in `folder`."""
    step: Step = torch.load(folder / "step.pt", weights_only=False)
    own = Engine(_load_config(folder), step.weights, propose=propose)
    loss = own.step(step.tokens)
    logits = own.logits(step.tokens)
    named, farthest, counts = dict(parameters(own.model)), ("", 0.0), [0, 0, 0, 0]
    for name, grad in own.gradients().items():
        p = named[name]
        right = slice_of(step.grads.get(name, torch.zeros_like(step.weights[name])), p)
        distance = _or_infinity(_distance(grad, right, FLOOR * step.norm))
        farthest = max(farthest, (name, distance), key=lambda each: each[1])
        if IN_A_LAYER.search(name) and name in step.grads:
            cut, size = p.sharding.local_shape != p.sharding.shape, step.weights[name].numel()
            counts = [a + b for a, b in zip(counts, (cut, 1, cut * size, size), strict=True)]
    return Distance(
        abs(loss / step.loss - 1),
        _distance(logits, step.logits),
        farthest[1],
        farthest[0],
        0.0,
        (counts[0], counts[1]),
        counts[2] / max(1, counts[3]),
        bool(own.model.proposed),
    )


def _load_config(folder: Path) -> hf.PreTrainedConfig:
    config = hf.AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    return config


def _load(step: Step, folder: Path, **settings: Any) -> hf.PreTrainedModel:
    return getattr(hf, step.loader).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **settings
    )


def _worst_grad(step: Step, grads: dict[str, Tensor]) -> tuple[float, str]:
    """A gradient that is absent on a rank, and there in the step alone, is infinitely far."""
    distances = {}
    for name, weight in step.weights.items():
        right = step.grads.get(name, torch.zeros_like(weight))
        if name in grads:
            distances[name] = _distance(grads[name], right, FLOOR * step.norm)
        elif right.any():
            distances[name] = float("inf")
    name = max(distances, key=lambda name: _or_infinity(distances[name]))
    return _or_infinity(distances[name]), name


def _is_cut(p: Tensor) -> bool:
    """Whether this rank has a slice of `p` only."""
    return isinstance(p, DTensor) and p.to_local().numel() < p.numel()


def _order(whole: Tensor, right: Tensor, p: Tensor) -> tuple[slice | Tensor, ...]:
    """The index that puts `whole` in the order of `right`. Ranks may hold the rows of packed weights in another order
    than one process does; what they compute is the same."""
    if not isinstance(p, DTensor) or whole.shape != right.shape or torch.equal(whole, right):
        return (slice(None),)
    dim = next((getattr(each, "dim", 0) for each in p.placements), 0) % whole.dim()
    key, right_key = (x.movedim(dim, 0).flatten(1)[:, 0] for x in (whole, right))
    order = torch.empty(len(key), dtype=torch.long)
    order[right_key.argsort()] = key.argsort()
    return (*(slice(None),) * dim, order)


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _distance(x: Tensor, right: Tensor, floor: float = 1e-30) -> float:
    if x.shape != right.shape:
        return float("inf")
    return ((x.double() - right.double()).norm() / right.double().norm().clamp(min=floor)).item()


def _or_infinity(distance: float) -> float:
    """NaN is as far as it gets."""
    return distance if distance == distance else float("inf")
