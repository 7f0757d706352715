"""The operations of `reference.py` by torch.compile, each on its first call: one pass over memory, the same results."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tptrain.ops import reference
from tptrain.ops.table import Operations

SHAPES = 64  # for which a function may be compiled: of layers and heads, of a last chunk, a last batch of a validation


class Compiled:
    """A function that is compiled when it is first called. torch caches the code on disk."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.code: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.code is None:
            torch._dynamo.config.recompile_limit = SHAPES
            self.code = torch.compile(self.function, dynamic=False, fullgraph=True)
        # Detached: whether autograd looks on makes no other code.
        return self.code(*(each.detach() if isinstance(each, Tensor) else each for each in arguments))


def eager(table: Operations) -> Operations:
    """The table with nothing compiled, for shapes that are many: each would be by itself, and only so many may be."""
    plain = {name: each.function for name, each in vars(table).items() if isinstance(each, Compiled)}
    if isinstance(table.statistics, partial):
        plain |= {"statistics": reference.statistics, "logit_gradient_": reference.logit_gradient_}
    return replace(table, **plain)


def compile_table(table: Operations) -> Operations:
    """The table with every operation compiled, but for attention, which PyTorch has fused."""
    names = ["rms_norm", "rms_norm_backward", "add_rms_norm", "add_rms_norm_backward", "gate_product"]
    names += ["gate_product_backward", "rotate", "rotate_qkv", "rotate_qkv_backward"]
    return replace(
        table,
        backend="torch.compile",
        **{name: Compiled(getattr(reference, name)) for name in names},
        statistics=partial(reference.statistics, rows=Compiled(reference.row_statistics)),
        logit_gradient_=partial(reference.logit_gradient_, softmax_=Compiled(reference.scaled_softmax_)),
    )
