"""Over which ranks each parameter's gradient is a sum, read off the graph of one forward pass.

A gradient is *complete* on every rank at the model's output. Behind an exit of a region (`region.py`; the backward pass
comes to it first) each rank has its own features, and what it computes of a gradient is *partial*: of parameters and
activations that all ranks have alike, the gradient is the sum of those. The region's entrance sums. So each step of the
backward pass is one or the other, and a parameter that is whole on every rank and reached by partial gradients is to be
summed, whatever the plan says of it. One that both kinds reach is a mistake in the plan: an entrance is missing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tptrain.config import UserError
from tptrain.hf import region
from tptrain.nn.parameter import Parameter

COMPLETE, PARTIAL, MIXED = "complete", "partial", "mixed"
# What a gradient is behind each of a region's functions, by what it is when it comes there; all else is a mistake.
CROSSINGS: dict[type, Mapping[str, str]] = {
    region._Enter: {PARTIAL: COMPLETE},
    region._EnterLast: {MIXED: COMPLETE},
    region._Split: {PARTIAL: COMPLETE},
    region._Leave: {COMPLETE: PARTIAL},
    region._Row: {COMPLETE: PARTIAL},
    region._Gather: {COMPLETE: PARTIAL},
}


@contextmanager
def noted_modules(model: nn.Module) -> Iterator[dict[Any, str]]:
    """While it lasts: which module each step of the graph is the last of."""
    names: dict[Any, str] = {}
    hooks = []
    for name, module in model.named_modules():

        def note(_: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            for each in output if isinstance(output, tuple) else (output,):
                if isinstance(each, Tensor) and each.grad_fn is not None:
                    names.setdefault(each.grad_fn, name)

        hooks.append(module.register_forward_hook(note))
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def gradient_kinds(output: Tensor, modules: Mapping[Any, str], name_of: Callable[[Any], str]) -> dict[int, str]:
    """What each parameter's gradient is, by its id: COMPLETE or PARTIAL. Raises UserError for a plan with a mistake.

    `output`: of the forward pass, with its graph; `modules`: as `noted_modules` has noted them.
    """
    kinds: dict[Any, str] = {}
    reached: list[tuple[Any, str, str]] = [(output.grad_fn, COMPLETE, "")]  # step, kind, the module it is in
    inside: dict[Any, str] = {}  # the module that each step is in
    mixed: list[str] = []  # modules to whose output gradients of both kinds come, the last module first
    while reached:
        step, kind, module = reached.pop()
        module = modules.get(step, module)
        before = kinds.get(step, kind)
        kind = kind if kind == before else MIXED
        if step in kinds and kind == before:
            continue
        kinds[step], inside[step] = kind, module
        if kind == MIXED and step in modules:
            mixed.append(module)
        crossing = CROSSINGS.get(getattr(step, "_forward_cls", type(None)))
        if crossing is not None:
            kind = crossing.get(kind, kind)
        reached.extend((following, kind, module) for following, _ in step.next_functions if following is not None)
    for step, kind in kinds.items():
        variable = getattr(step, "variable", None)
        crossing = CROSSINGS.get(getattr(step, "_forward_cls", type(None)))
        if (variable is not None and kind == MIXED) or (crossing is not None and kind not in crossing):
            raise _mistake(next(iter(mixed), "") or name_of(variable) or inside[step])
    return {id(step.variable): kind for step, kind in kinds.items() if hasattr(step, "variable")}


def _mistake(module: str) -> UserError:
    return UserError(
        f"model.tp_plan: the gradient to {module or 'the model'} would be complete in part and partial in part. A "
        "module that all ranks compute alike feeds one that is cut and no column-parallel linear. Cut both or none."
    )


def summed_over(p: Parameter, kinds: Mapping[int, str]) -> tuple[str, ...]:
    """The axes over which a parameter's gradient is a sum."""
    whole = not p.sharding.cuts
    return ("tp",) if whole and kinds.get(id(p)) == PARTIAL else p.sharding.summed


def refuse(name: str, p: Parameter) -> None:
    """For a parameter that the forward pass which was looked at did not reach: its gradient may be partial."""
    raise RuntimeError(f"{name} gets a gradient of an unknown kind: the forward pass at the start did not reach it")


@torch.no_grad()
def receive(p: Parameter) -> None:
    """Move a gradient that autograd has computed into the float32 memory; our own functions have put theirs there."""
    if p.grad is not None:
        p.add_grad(p.grad)
        p.grad = None
