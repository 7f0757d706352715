"""A Transformers model with a few of its layers, one of every kind at least: what `verify` runs."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from tptrain.models.cut import WINDOW

LOCAL = ("sliding_window", "attention_chunk_size")
SCALARS = (bool, int, float, str, type(None))
NUMBERS = ("layer_idx", "layer_number", "training")  # what differs between layers of one kind
# Numbers of a config that are not zero where a layer needs others, or has a part in a table of all layers.
BETWEEN_LAYERS = ("hidden_size_per_layer_input", "num_kv_shared_layers", "loop_num_passes")


@dataclass(frozen=True)
class Stack:
    """A model's list of layers."""

    name: str  # "model.layers"; empty where there is no such list
    total: int  # layers of the model
    kinds: tuple[int, ...]  # of each kind of layer the first one, in order

    @property
    def chosen(self) -> tuple[int, ...]:
        """The first layer of every kind, and the last one where there is one kind only."""
        return tuple(sorted({*self.kinds, *((self.total - 1,) if len(self.kinds) == 1 else ())}))


def stack(inner: Any) -> Stack:
    """Of a model that has been built. There is no stack where layers are not in one list, or need each other."""
    total = inner.config.get_text_config().num_hidden_layers
    if any(getattr(inner.config.get_text_config(), field, None) for field in BETWEEN_LAYERS):
        return Stack("", total, tuple(range(total)))
    embedding = inner.get_input_embeddings()
    prefix = next(name for name, module in inner.named_modules() if module is embedding).rpartition(".")[0]
    for name, module in inner.get_submodule(prefix).named_children():
        if isinstance(module, nn.ModuleList) and len(module) == total:
            first: dict[Any, int] = {}
            for i, layer in enumerate(module):
                first.setdefault(_kind(layer), i)
            return Stack(f"{prefix}.{name}" if prefix else name, total, tuple(first.values()))
    return Stack("", total, tuple(range(total)))


def _kind(layer: nn.Module) -> Any:
    """What two layers of one kind have in common: their modules, the shapes of their parameters, and their settings."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)),
            tuple((key, value) for key, value in sorted(vars(module).items()) if _is_setting(key, value)),
        )
        for name, module in layer.named_modules()
    )


def _is_setting(key: str, value: Any) -> bool:
    return isinstance(value, SCALARS) and key not in NUMBERS and not key.startswith("_")


def keep_layers(inner: Any, name: str, layers: tuple[int, ...]) -> None:
    """Leave out all other layers of a stack, in the model and in what its config says of each layer.

    Local attention is cut to fewer keys than `verify`'s sequences have.
    """
    config = inner.config.get_text_config()
    module, total = inner.get_submodule(name), config.num_hidden_layers
    parent, _, leaf = name.rpartition(".")
    setattr(inner.get_submodule(parent), leaf, nn.ModuleList(module[i] for i in layers))
    for key, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == total:
            vars(config)[key] = type(value)(value[i] for i in layers)  # past checks that look at one field alone
    if spec := vars(config).get("_heterogeneity_spec"):  # sizes that some layers have for themselves, by layer
        own = {place: spec.per_layer_overrides.get(i) for place, i in enumerate(layers)}
        spec.per_layer_overrides.clear()
        spec.per_layer_overrides.update({place: sizes for place, sizes in own.items() if sizes is not None})
    vars(config)["num_hidden_layers"] = len(layers)
    for key in LOCAL:
        if isinstance(size := vars(config).get(key), int) and size > WINDOW:
            vars(config)[key] = WINDOW
