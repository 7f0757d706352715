"""What comes out of the modules of a model of Transformers, and the gradients to that, in the order of a step."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tptrain.hf.model import TransformersModel
from tptrain.hf.plan import style_of
from tptrain.models.cut import Cut
from tptrain.nn.parameter import parameters
from tptrain.verify.step import Item

PACKED = re.compile("gate_up|up_gate")  # in names of parameters


class Outputs:
    """Notes what comes out of a model's layers and of the modules in them, and the gradients to that."""

    def __init__(self, inner: Any, cut: Cut, hints: Mapping[str, str] | None = None) -> None:
        """`cut.stack` names the layers; where it is empty, only the embedding and the last norm are looked at. `hints`:
        the kind of mistake that a parameter invites, in whatever is beside it.
        """
        self.stack, self.hints = cut.stack, hints or {}
        self.names = ["embedding"]
        self.modules: list[nn.Module] = [inner.get_input_embeddings()]
        for name, module in inner.named_modules():
            depth = name.removeprefix(cut.stack).count(".")
            if cut.stack and name.startswith(f"{cut.stack}.") and depth <= 2:
                self.names.append(name)
                self.modules.append(module)
        self.embedding = next(name for name, module in inner.named_modules() if module is self.modules[0])
        self.width = inner.config.get_text_config().hidden_size
        self.first = self.tokens = 0  # of the micro-batch whose forward pass is under way; 0 tokens: none is
        self.forward: list[Item] = []
        self.backward: list[Item] = []
        for name, module in zip(self.names, self.modules, strict=True):
            module.register_forward_hook(lambda _, inputs, output, name=name: self._note(name, output))

    def begin(self, first: int, tokens: int) -> None:
        """A forward pass over so many tokens begins, the `first` one counted over the whole step."""
        self.first, self.tokens = first, tokens

    def end(self) -> None:
        """It is over: layers that run again in the backward pass are not noted again."""
        self.tokens = 0

    def _note(self, name: str, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, Tensor) or x.numel() != self.tokens * self.width or not self.tokens:
            return
        place = slice(self.first, self.first + self.tokens), slice(0, self.width)
        depth, around = self.names.index(name), name.rpartition(".")[0]
        inside = (f"{name}.", f"{around}.") if around != self.stack else (f"{name}.",)
        hint = next((hint for each, hint in self.hints.items() if each.startswith(inside)), "")

        def item(what: str, value: Tensor, depth: int) -> Item:
            return Item(name, what, value.detach().reshape(-1, self.width).clone(), place, depth, hint)

        self.forward.append(item("output", x, depth))
        if x.requires_grad:
            last = 2 * len(self.names) - depth
            x.register_hook(lambda grad: self.backward.append(item("output gradient", grad, last)))

    def in_order(self, gradients: list[Item]) -> Iterator[Item]:
        """All that has been noted, and each parameter's gradient after those to the module that it is nearest to: in
        the order of a backward pass.
        """
        yield from self.forward
        visited = list(dict.fromkeys(item.module for item in self.forward))[::-1]  # layers before what they consist of
        nearest: dict[str, list[Item]] = {name: [] for name in ["", *visited]}
        for item in gradients:
            name = item.module
            name = "embedding" if name.startswith(f"{self.embedding}.") else name
            while name and name not in nearest:
                name = name.rpartition(".")[0]
            nearest[name].append(item)
        for name in nearest:  # first the head and what is in no layer
            yield from (item for item in self.backward if item.module == name)
            yield from nearest[name]


def packed_as_one(model: TransformersModel) -> dict[str, str]:
    """By name, a hint on each parameter that has the name of a gate and an up matrix and is cut as one matrix."""
    hints = {}
    for name, _ in parameters(model):
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        if PACKED.search(leaf) and "colwise" in (style_of(model.plan, name), style_of(model.plan, f"{module}.{leaf}")):
            hints[name] = f"{leaf} holds gate and up, and is cut as one matrix: its style is packed_colwise"
    return hints
