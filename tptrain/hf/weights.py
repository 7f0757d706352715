"""Which tensors of a Hugging Face directory a model's parameters come from, and back, by Transformers' own conversions.

Most parameters are one tensor, perhaps under another name. Others are made of several, such as the experts of a layer:
Transformers' code converts those, a group at a time.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from tptrain.config import UserError
from tptrain.models.directory import and_more

ANEW = " Fetch it anew."


@dataclass
class Group:
    """Tensors of a directory that are converted together, in their order, with the pattern of each."""

    target: str  # the first parameter that comes out of it
    converter: WeightConverter | None  # None: one tensor, which is the parameter
    tensors: list[tuple[str, str]] = field(default_factory=list)  # name in the directory, pattern

    def convert(self, model: Any, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The group's parameters, whole; `read` gives a tensor of the directory. `model` is not cut."""
        if self.converter is None:
            return {self.target: read(self.tensors[0][0])}
        converter: Any = copy.deepcopy(self.converter)
        for name, pattern in self.tensors:
            converter.add_tensor(self.target, name, pattern, read(name))
        converted = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def sources(model: Any, tensors: Iterable[str]) -> list[Group]:
    """The groups of a directory's tensors. Notes in the model which conversions they need, for `revert`.

    Raises UserError for a directory that lacks a tensor of the model or has one that is none of its.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    known = model.state_dict()
    groups: dict[str, Group] = {}
    strangers = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target not in known:
            strangers.append(name)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        groups.setdefault(target, Group(target, converter)).tensors.append((name, pattern or name))
    # Transformers 5.5 does not note which were used, and reverts them all.
    model._weight_conversions = [each for each in conversions if getattr(each, "_was_used", True)]
    _check(model, known, groups, strangers)
    return list(groups.values())


def revert(model: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole parameters of one group as tensors of the directory."""
    return revert_weight_conversion(model, dict(parameters))


Shapes = Mapping[str, tuple[int, ...]]


def check_shapes(model: Any, groups: Iterable[Group], tensors: Shapes, parameters: Shapes) -> None:
    """Raises UserError where a directory's tensors of these shapes do not make up all parameters of those."""
    complete: set[str] = set()
    for group in groups:
        names = ", ".join(dict.fromkeys(pattern for _, pattern in group.tensors))
        if odd := _odd_one(group, tensors):
            name, shape, usual = odd
            raise UserError(f"model.path: has {name} of {list(shape)}, where others like it have {list(usual)}.{ANEW}")
        try:
            converted = group.convert(model, lambda name: torch.empty(tensors[name], device="meta"))
        except Exception as error:  # whatever Transformers' code makes of tensors that do not go together
            raise UserError(
                f"model.path: the tensors of {group.target} ({names}) do not go together: one is missing, or has "
                f"another shape.{ANEW}"
            ) from error
        for name, value in converted.items():
            shape, expected = tuple(value.shape), parameters.get(name)
            if expected is not None and shape != expected:
                what = name if group.converter is None else f"tensors that make {name} ({names})"
                raise UserError(
                    f"model.path: has {what} of {list(shape)}, where config.json asks for {list(expected)}.{ANEW}"
                )
        complete |= converted.keys()
    _check_missing(sorted(parameters.keys() - complete - _tied(model)))


def _odd_one(group: Group, tensors: Shapes) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """A tensor of another shape than most of its pattern: its name, its shape, and theirs."""
    for wanted in dict.fromkeys(pattern for _, pattern in group.tensors):
        shapes = {name: tensors[name] for name, pattern in group.tensors if pattern == wanted}
        ((usual, _),) = Counter(shapes.values()).most_common(1)
        if odd := next((name for name, shape in shapes.items() if shape != usual), None):
            return odd, shapes[odd], usual
    return None


def _check(model: Any, known: Mapping[str, Tensor], groups: Mapping[str, Group], strangers: list[str]) -> None:
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    others = [name for name in strangers if not any(re.search(pattern, name) for pattern in ignored)]
    if others:
        raise UserError(
            f"model.path: has the tensor {others[0]}{and_more(others)}, which {type(model).__name__} does not know: "
            "the model would not be what its authors trained."
        )
    several = any(group.converter is not None and len(group.converter.target_patterns) > 1 for group in groups.values())
    _check_missing([] if several else sorted(known.keys() - groups.keys() - _tied(model)))  # else see `check_shapes`


def _tied(model: Any) -> set[str]:
    """Names of parameters that are others once more."""
    everything = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return everything - {name for name, _ in model.named_parameters()}


def _check_missing(names: list[str]) -> None:
    if names:
        raise UserError(f"model.path: lacks the tensor {names[0]}{and_more(names)}.{ANEW}")
