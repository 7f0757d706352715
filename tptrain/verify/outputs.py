"""What comes out of the modules of a Transformers model, and the gradients to that, noted by hooks."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tptrain.models.cut import Cut
from tptrain.verify.step import Item


class Outputs:
    """Notes what comes out of a model's layers and of the modules in them, and the gradients to that."""

    def __init__(self, inner: Any, cut: Cut) -> None:
        """`cut.stack` names the layers; where it is empty, only the embedding and the last norm are looked at."""
        self.names = ["embedding"]
        self.modules: list[nn.Module] = [inner.get_input_embeddings()]
        for name, module in inner.named_modules():
            depth = name.removeprefix(cut.stack).count(".")
            if cut.stack and name.startswith(f"{cut.stack}.") and depth <= 2:
                self.names.append(name)
                self.modules.append(module)
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
        depth = self.names.index(name)

        def item(what: str, value: Tensor, depth: int) -> Item:
            return Item(name, what, value.detach().reshape(-1, self.width).clone(), place, depth)

        self.forward.append(item("output", x, depth))
        if x.requires_grad:
            last = 2 * len(self.names) - depth
            x.register_hook(lambda grad: self.backward.append(item("output gradient", grad, last)))

    def in_order(self, gradients: list[Item]) -> Iterator[Item]:
        """All that has been noted, and each parameter's gradient after those to the layer that it is in."""
        yield from self.forward
        left = list(gradients)
        for name in ["", *reversed(self.names)]:  # first the head and what is in no layer
            yield from (item for item in self.backward if item.module == name)
            if name.count(".") <= 2 or not name:
                own = [item for item in left if item.module.startswith(f"{name}.")] if name else []
                yield from own
                left = [item for item in left if item not in own]
        yield from left
