"""A step of a Transformers model in tptrain's hands on some ranks, and its distance from one process."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor

from tests import zoo
from tests.distributed import gather_global, mesh
from tests.reference import BETAS, CLIP, DECAY, EPS, LR
from tptrain.config import UserError
from tptrain.config.schema import OptimConfig, padded_vocab_size
from tptrain.hf import gradients, model, region, shard
from tptrain.hf.model import TransformersModel
from tptrain.hf.plan import Plan
from tptrain.nn.cross_entropy import CrossEntropy
from tptrain.nn.parameter import Parameter, parameters, sharding, use
from tptrain.nn.store import Store
from tptrain.ops.table import REFERENCE
from tptrain.optim.adamw import Optimizer
from tptrain.parallel.group import Group
from tptrain.parallel.mesh import Mesh
from tptrain.train.runner import Runner
from tptrain.train.schedule import plain

FLOOR = 1e-4  # of the norm of all gradients: a smaller one is held against this. Some are zero in exact arithmetic
Distances = dict[str, float]


@dataclass
class Reference:
    """A step in one process."""

    config: hf.PreTrainedConfig
    tokens: Tensor  # (B, T + 1)
    weights: dict[str, Tensor]  # parameters and saved buffers
    loss: float
    logits: Tensor  # (B, T, V)
    grads: dict[str, Tensor]
    norm: float
    stepped: dict[str, Tensor]  # parameters after a step of AdamW; none where they are not asked for


def reference(family: str, stepped: bool = False, **changes: Any) -> Reference:
    """Of the family's small model with `changes` of its config."""
    small, whole, tokens = zoo.config(family, **changes), zoo.model(family, **changes), zoo.tokens()
    loss, logits = zoo.loss_and_logits(whole, tokens)
    loss.backward()
    saved = whole.state_dict()
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    weights |= {name: b.detach().clone() for name, b in whole.named_buffers() if name in saved}
    grads = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), CLIP).item()
    result = Reference(small, tokens, weights, loss.item(), logits.detach(), grads, norm, {})
    if stepped:
        groups = [
            {"params": [p for p in whole.parameters() if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in whole.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=False, fused=False).step()
        result.stepped = {name: p.detach().clone() for name, p in whole.named_parameters()}
    return result


class Engine:
    """The model of a config with these weights on this rank, ready for a step."""

    def __init__(
        self,
        config: Any,
        weights: Mapping[str, Tensor],
        plan: Plan | None = None,
        recompute: bool = False,
        dtype: torch.dtype = torch.float32,
        frozen: str = "",
        propose: bool | None = None,
    ) -> None:
        """`plan`: entries of the user; `dtype`: of the weights and of the computation; `frozen`: a part of the names of
        parameters that are not trained; `propose`: see `TransformersModel`.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        kv_heads = getattr(config.get_text_config(), "num_key_value_heads", None) or world
        self.mesh = _mesh(world, kv_heads)
        self.model = TransformersModel(config, self.mesh, plan, recompute, propose=propose)
        for name, p in parameters(self.model):
            if frozen and frozen in name:
                p.requires_grad_(False)
        store = Store(self.model, dtype)
        store.initialise(lambda name, p: slice_of(weights[name], p))
        self.model.settle()
        settings = OptimConfig(beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY)
        self.optimizer = Optimizer(store, settings, self.mesh, zero=False)
        head, vocab_size, rule = self.model.lm_head, self.model.vocab_size, self.model.rule
        loss = CrossEntropy(head.weight, vocab_size, self.mesh, REFERENCE, rule.cap, head.bias)
        self.runner = Runner(self.model, loss, self.optimizer.reducer)

    def step(self, tokens: Tensor) -> float:
        """The loss of a batch (B, T + 1); gradients are complete then, and weights as before."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:].flatten()  # (B, T), (B*T,)
        self.optimizer.state.zero_grad()
        torch.manual_seed(2)  # as in `zoo.loss_and_logits`
        total = self.runner.run(plain(1, self.runner.units), lambda _: (inputs, targets), 1 / targets.numel())
        self.optimizer.reducer.finish()
        return total.item()

    def logits(self, tokens: Tensor) -> Tensor:
        """Of a batch (B, T + 1): (B, T, V), gathered from all ranks, without padding."""
        torch.manual_seed(2)
        with torch.no_grad():
            logits = self.model.logits(self.model(tokens[:, :-1]))  # (N, V/tp)
        layout = sharding(self.mesh, (len(logits), padded_vocab_size(self.model.vocab_size)), {1: "tp"})
        whole = gather_global(logits, layout, self.mesh)[:, : self.model.vocab_size]
        return whole.view(len(tokens), -1, self.model.vocab_size)

    def gradients(self) -> dict[str, Tensor]:
        """This rank's slices, by name; zero where the step has computed none."""
        trained = {name: p for name, p in parameters(self.model) if p.main_grad is not None}
        return {
            name: torch.zeros_like(p.main_grad) if p.overwrite else p.main_grad.clone()
            for name, p in trained.items()
            if p.main_grad is not None
        }


def distances(right: Reference, mutation: str = "", **settings: Any) -> Distances:
    """Relative distance of this rank's loss, logits, gradients and, where the reference has made one, step. All are
    infinite where a mutation makes the forward or backward pass impossible. `settings`: of the `Engine`.
    """
    try:
        with MUTATIONS[mutation]() if mutation else nullcontext():
            return _distances(right, **settings)
    except UserError:  # of a shape; every rank raises it
        if not mutation:
            raise
        return {"shapes": float("inf")}


def refusal(right: Reference, plan: Plan) -> str:
    """What a plan with a mistake is refused with; empty where it is not."""
    try:
        Engine(right.config, right.weights, plan)
    except UserError as error:
        return str(error)
    return ""


def collectives(right: Reference, **settings: Any) -> list[str]:
    """Those of a step, in their order: which, and of what shape."""
    engine, noted, enter = Engine(right.config, right.weights, **settings), [], Group.enter

    def note(self: Group, op: str, x: Tensor | None = None) -> int:
        noted.append(f"{op} {self.axis} {None if x is None else tuple(x.shape)}")
        return enter(self, op, x)

    with patch.object(Group, "enter", note):
        engine.step(right.tokens)
    return noted


def _distances(right: Reference, **settings: Any) -> Distances:
    engine = Engine(right.config, right.weights, **settings)
    values = {"loss": abs(engine.step(right.tokens) / right.loss - 1)}
    grads, named = engine.gradients(), dict(parameters(engine.model))
    for name, grad in grads.items():
        # A slice against the slice of the reference, on each rank: a wrong replica cannot hide.
        whole = right.grads.get(name, torch.zeros_like(right.weights[name]))
        values[f"grad {name}"] = distance(grad, slice_of(whole, named[name]), FLOOR * right.norm)
    values["logits"] = distance(engine.logits(right.tokens), right.logits[..., : engine.model.vocab_size])
    if right.stepped:
        norm, _ = engine.optimizer.reducer.norm_and_flags()
        values["norm"] = abs(norm.item() / right.norm - 1)
        engine.optimizer.reducer.clip(norm, CLIP)
        engine.optimizer.step(LR)
        for name in grads:
            stepped = slice_of(right.stepped[name], named[name])
            values[f"step {name}"] = distance(named[name].detach().view(stepped.shape), stepped)
    return values


@functools.cache
def _mesh(world: int, kv_heads: int) -> Mesh:
    """Groups stay for all cases of a rank."""
    return mesh(world, kv_heads)


def slice_of(whole: Tensor, p: Parameter) -> Tensor:
    """This rank's slice of a tensor that is laid out as Transformers has it; rows of padding are zero."""
    layout = p.sharding
    if whole.dim() == len(layout.shape) and whole.dim() > 0 and len(whole) < layout.shape[0]:
        whole = torch.cat([whole, whole.new_zeros(layout.shape[0] - len(whole), *whole.shape[1:])])
    place = zip(layout.offsets, layout.local_shape, strict=True)
    return whole.view(layout.shape)[tuple(slice(start, start + length) for start, length in place)]


def distance(x: Tensor, right: Tensor, floor: float = 1e-30) -> float:
    """Relative, in the 2-norm."""
    return ((x.double() - right.double()).norm() / right.double().norm().clamp(min=floor)).item()


# ------------------------------------------------------------------------------------------------------------ mutations


def _drop_an_entrance() -> AbstractContextManager:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        for weight_gradient in ctx.waiting:
            weight_gradient()
        return grad, None, None

    return patch.object(region._Enter, "backward", staticmethod(backward))


def _drop_the_sum_of_a_rotary_key() -> AbstractContextManager:
    return patch.object(region._EnterLast, "backward", staticmethod(lambda ctx, grad: (grad, None, None)))


def _drop_an_exit() -> AbstractContextManager:
    return patch.object(region._Leave, "forward", staticmethod(lambda ctx, x, group: x.clone()))


def _keep_partial_gradients() -> AbstractContextManager:
    return patch.object(model, "summed_over", lambda p, kinds: p.sharding.summed)


def _sum_every_whole_gradient() -> AbstractContextManager:
    return patch.object(
        model, "summed_over", lambda p, kinds: gradients.summed_over(p, {**kinds, id(p): gradients.PARTIAL})
    )


def _bias_on_every_rank() -> AbstractContextManager:
    right = region.Region.row

    def row(self: region.Region, x: Tensor, weight: Parameter, bias: Parameter | None) -> Tensor:
        y = right(self, x, weight, None)
        return y if bias is None else y + use(bias) * dist.get_world_size()

    return patch.object(region.Region, "row", row)


def _cut_packed_as_one() -> AbstractContextManager:
    return patch.object(shard, "PACKED", 1)


def _keep_the_groups() -> AbstractContextManager:
    return patch.object(shard.Sharder, "_count_groups", lambda self, attention: None)


def _sum_a_gather_backward() -> AbstractContextManager:
    right = region._Gather.backward

    def backward(ctx: Any, grad: Tensor) -> Any:
        total, work = region._sum(grad, ctx.group)
        work.wait()
        return right(ctx, total)

    return patch.object(region._Gather, "backward", staticmethod(backward))


def _split_without_gathering() -> AbstractContextManager:
    """The gradient of other ranks' features is zero."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        size, place = ctx.group.size, ctx.group.ranks.index(dist.get_rank())
        return torch.cat([grad if i == place else torch.zeros_like(grad) for i in range(size)], -1), None, None

    return patch.object(region._Split, "backward", staticmethod(backward))


def _identity_on_every_rank() -> AbstractContextManager:
    return patch.dict(shard.CONNECT, moe_identity_expert=lambda region, module, model: module.forward)


def _order_of_ranks_reversed() -> AbstractContextManager:
    """Gathered features in the wrong order."""

    def gathered(x: Tensor, group: Any) -> Tensor:
        parts, work = region.all_gather(x.reshape(1, *x.shape), group)
        work.wait()
        return parts.flip(0).movedim(0, -2).reshape(*x.shape[:-1], -1)

    return patch.object(region, "_gathered", gathered)


MUTATIONS: dict[str, Callable[[], AbstractContextManager]] = {
    "drop the all-reduce of an entrance": _drop_an_entrance,
    "drop the all-reduce of a rotary key": _drop_the_sum_of_a_rotary_key,
    "drop the all-reduce of an exit": _drop_an_exit,
    "keep partial gradients partial": _keep_partial_gradients,
    "sum every whole gradient": _sum_every_whole_gradient,
    "add the row-parallel bias on every rank": _bias_on_every_rank,
    "cut packed matrices as one": _cut_packed_as_one,
    "keep the number of queries to a key": _keep_the_groups,
    "sum the gradient of a gather": _sum_a_gather_backward,
    "split without gathering the gradient": _split_without_gathering,
    "count an identity expert on every rank": _identity_on_every_rank,
    "gather in another order": _order_of_ranks_reversed,
}
