"""The output head of a Transformers model: ours computes the loss from its input, so the model never makes logits.

What the model does to its logits afterwards is found out by a trial: the head is replaced by one that returns numbers
that are known, and what comes out is read.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tptrain.config import UserError
from tptrain.nn.cross_entropy import capped
from tptrain.nn.parameter import Parameter

LARGE = 1e7  # a logit beyond every cap
POINTS = (-30.0, -3.0, -0.5, 0.25, 1.0, 7.0, 50.0, LARGE)  # logits of the trial


@dataclass(frozen=True)
class LogitRule:
    """Logits z become scale * z, and that cap * tanh(scale * z / cap) where there is a cap."""

    scale: float = 1.0
    cap: float | None = None

    def capped(self, z: Tensor) -> Tensor:
        """Of logits that are scaled already."""
        return capped(z, self.cap)


class Head:
    """Stands in for the model's output head: keeps its input."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.input: Tensor | None = None
        self.output: Tensor | None = None  # of a trial
        linear.forward = self._forward  # type: ignore[method-assign]

    @property
    def weight(self) -> Parameter:
        return cast(Parameter, self.linear.weight)

    @property
    def bias(self) -> Parameter | None:
        return cast(Parameter | None, self.linear.bias)

    def _forward(self, input: Tensor) -> Tensor:
        self.input = input
        return input if self.output is None else self.output

    def input_of(self, model: Any, tokens: Tensor) -> Tensor:
        """Of a forward pass of the model over (B, T) token ids: (B, T, D)."""
        model(input_ids=tokens, use_cache=False)
        x, self.input = self.input, None
        assert x is not None, "the model has not called its head"
        return x


def logit_rule(model: Any, head: Head, tokens: Tensor) -> tuple[Tensor, LogitRule]:
    """The head's input (1, T, D) with its graph, and what the model does to logits. Raises UserError where that is
    something else than a scale and a cap.
    """
    rows = model.config.get_text_config().vocab_size
    logits = torch.zeros(1, tokens.shape[1], rows, device=tokens.device)
    logits[..., : len(POINTS)] = torch.tensor(POINTS)
    head.output = logits
    result = model(input_ids=tokens, use_cache=False).logits[0, -1, : len(POINTS)].detach()
    x, head.input, head.output = head.input, None, None
    assert x is not None, "the model has not called its head"
    if result.is_meta:  # a dry run, which has no numbers
        return x, LogitRule()
    result = result.double().cpu()
    points = torch.tensor(POINTS, dtype=torch.float64)
    scale = (result[3] / points[3]).item()
    rule = LogitRule(1.0 if abs(scale - 1) < 1e-6 else scale)
    if not torch.allclose(result, scale * points, rtol=1e-4):
        cap = result[-1].item()
        slope = cap / points[3].item() * torch.atanh(result[3] / cap).item()
        rule = LogitRule(1.0 if abs(slope - 1) < 1e-5 else slope, cap)
        if not torch.allclose(result, cap * torch.tanh(rule.scale * points / cap), rtol=1e-4):
            raise UserError(f"model.path: {type(model).__name__} changes its logits in a way that is not known here.")
    if rule.scale != 1.0 and head.bias is not None:
        raise UserError(f"model.path: {type(model).__name__} scales its logits, and its head has a bias.")
    return x, rule
