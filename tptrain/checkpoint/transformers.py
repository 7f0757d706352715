"""Weights of a Transformers model between a Hugging Face directory and ours: slices in, whole tensors out.

What is one tensor of the directory is read by slices. What Transformers converts out of several (a layer's experts) is
read whole, a group at a time, and cut then.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tptrain.checkpoint import safetensors
from tptrain.checkpoint.huggingface import AT_ONCE, Fill, bit_sum, digest, fill_padding
from tptrain.config import UserError
from tptrain.hf.model import TransformersModel
from tptrain.hf.weights import Group, revert, sources
from tptrain.models.safetensors import INTEGERS, Entry, problem
from tptrain.nn.parameter import Parameter, parameters

# ------------------------------------------------------------------------------------------------------------------- in


def load_converted(
    entries: Mapping[str, Entry],
    model: TransformersModel,
    fill: Fill,
    alive: Callable[[], None] = lambda: None,
    whole: Any = None,
    name_in_part: Callable[[str], str | None] = lambda name: name,
) -> str:
    """Read this rank's slices of a directory's tensors into `fill`, and return a digest of all weights.

    Every rank calls it. The digest does not depend on the topology. Raises UserError for a directory that has not what
    the model needs. `whole`: the directory's model, where `model` is a part of it, in which a parameter has the name
    that `name_in_part` gives, if it is there.
    """
    ours, whole = dict(parameters(model)), whole or model.whole
    sums, dtypes = dict.fromkeys(ours, 0), {}
    total = sum(p.sharding.size for p in ours.values())
    with (
        closing(safetensors.Reader()) as reader,
        tqdm(
            desc="reading weights", total=total, unit=" weights", unit_scale=True, disable=model.mesh.disable_bar
        ) as bar,
    ):
        for group in sources(whole, entries):
            for name, start, values in _slices(group, entries, ours, model, whole, reader, name_in_part):
                p, dtypes[name] = ours[name], entries[group.tensors[0][0]].dtype
                sums[name] += bit_sum(values, p)
                fill(name, p, start, values)
                bar.update(values.numel())
                alive()
    for name, p in ours.items():
        if name in model.vocabulary:
            fill_padding(name, p, model.vocab_size, fill)
    return digest(model.mesh, ours, sums, dtypes)


class ConvertedSlices:
    """This rank's slices of a directory's weights, by the parameter."""

    def __init__(self, entries: Mapping[str, Entry], model: TransformersModel) -> None:
        """Raises UserError for a directory that has not what the model needs."""
        self.entries, self.model, self.parameters = entries, model, dict(parameters(model))
        self.groups: dict[str, Group] = {}  # that a parameter comes out of
        with closing(safetensors.Reader()) as reader:
            for group in sources(model.whole, entries):
                if entries[group.tensors[0][0]].dtype in INTEGERS:
                    _check_table(group, entries, model, reader, group.target)
                else:
                    converted = group.convert(model.whole, lambda name: torch.empty(entries[name].shape, device="meta"))
                    self.groups |= dict.fromkeys(converted, group)

    def read(self, name: str, reader: safetensors.Reader) -> Iterator[tuple[str, int, Tensor]]:
        """A parameter's, without padding, and those of others that come with it, in runs: name, first element in the
        slice, values.
        """
        model = self.model
        return _slices(self.groups[name], self.entries, self.parameters, model, model.whole, reader, lambda each: each)


def _slices(
    group: Group,
    entries: Mapping[str, Entry],
    ours: Mapping[str, Parameter],
    model: TransformersModel,
    whole: Any,
    reader: safetensors.Reader,
    name_in_part: Callable[[str], str | None],
) -> Iterator[tuple[str, int, Tensor]]:
    """This rank's slices of a group's parameters, in runs: name, first element in the slice, values."""
    name = name_in_part(group.target)
    if entries[group.tensors[0][0]].dtype in INTEGERS:
        _check_table(group, entries, model, reader, name)
        return
    if name is None or (group.converter is None and name not in ours):  # or a tied head, which some directories have
        return
    if group.converter is None and len(ours[name].sharding.shape) in (1, 2):
        entry = entries[group.tensors[0][0]]
        _check_shape(entry, name, ours[name], model)
        for start, values in _runs(entry, ours[name], reader):
            yield name, start, values
        return
    for converted, value in group.convert(whole, lambda each: read_whole(entries[each], reader)).items():
        target = name_in_part(converted)
        if target is not None and target in ours:
            layout = ours[target].sharding
            place = zip(layout.offsets, layout.local_shape, strict=True)
            part = value.view(layout.shape)[tuple(slice(first, first + length) for first, length in place)]
            yield target, 0, part.contiguous()


def _check_table(
    group: Group,
    entries: Mapping[str, Entry],
    model: TransformersModel,
    reader: safetensors.Reader,
    name: str | None,
) -> None:
    """Raises UserError for a table of whole numbers that does not follow from the config: checkpoints have none."""
    tables = dict(model.inner.named_buffers())
    if name is None:
        return
    entry = entries[group.tensors[0][0]]
    if name not in tables or not torch.equal(read_whole(entry, reader).cpu(), tables[name].cpu()):
        raise UserError(
            f"model.path: {entry.file.name} has {name}, a table of whole numbers that does not follow from "
            "config.json. Models with such tables are not trained."
        )


def read_whole(entry: Entry, reader: safetensors.Reader) -> Tensor:
    """A tensor of a directory, in its own shape, which may have no dims, and precision; with memory of its own."""
    if not entry.shape:
        return reader.read(Entry(entry.file, entry.dtype, (1,), entry.start), (0, 1), own=True).view(())
    return reader.read(entry, (0, entry.shape[0]), own=True).view(entry.shape)


def _check_shape(entry: Entry, name: str, p: Parameter, model: TransformersModel) -> None:
    rows = model.vocab_size if name in model.vocabulary else p.sharding.shape[0]
    expected = (rows, *p.sharding.shape[1:])
    if entry.shape != expected:
        raise problem(entry.file, f"has {name} of {list(entry.shape)}, where config.json asks for {list(expected)}")


def _runs(entry: Entry, p: Parameter, reader: safetensors.Reader) -> Iterator[tuple[int, Tensor]]:
    """This rank's slice, without padding, in runs of at most AT_ONCE elements."""
    layout = p.sharding
    first, inner = layout.offsets[0], math.prod(layout.local_shape[1:])
    columns = (layout.offsets[1], layout.offsets[1] + inner) if len(layout.shape) == 2 else None
    last, step = min(first + layout.local_shape[0], entry.shape[0]), max(1, AT_ONCE // inner)
    for start in range(first, last, step):
        yield (start - first) * inner, reader.read(entry, (start, min(start + step, last)), columns)


# ------------------------------------------------------------------------------------------------------------------ out


class Converted:
    """The tensors of a directory out of the whole parameters of a model, which has no memory itself.

    `shapes`: of the directory's tensors.
    """

    def __init__(self, model: TransformersModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model, self.ours = model, dict(parameters(model))
        self.shapes = dict(shapes)
        self.targets: dict[str, tuple[str, ...]] = {}  # the parameters that a tensor comes from
        everything = dict(model.inner.named_parameters(remove_duplicate=False))
        names = {id(p): name for name, p in self.ours.items()}
        for group in sources(model.whole, shapes):
            converted = group.convert(model.whole, lambda name: torch.empty(shapes[name], device="meta"))
            targets = tuple(names[id(everything[name])] for name in converted)  # a tied head's is the embedding
            self.targets |= {name: targets for name, _ in group.tensors}

    def values(self, names: list[str], value: Callable[[str], Tensor]) -> Iterator[Tensor]:
        """These tensors, one by one; `value` gives a parameter, whole and padded."""

        @lru_cache(maxsize=1)  # the tensors of a group come one after another
        def group(targets: tuple[str, ...]) -> dict[str, Tensor]:
            return revert(self.model.whole, {name: self._in_module(name, value(name)) for name in targets})

        for name in names:
            tensors = group(self.targets[name])
            if name not in tensors and len(tensors) > 1:
                raise RuntimeError(f"Transformers does not convert back to {name}, but to {', '.join(tensors)}")
            yield tensors[name] if name in tensors else next(iter(tensors.values()))

    def _in_module(self, name: str, whole: Tensor) -> Tensor:
        """A stored parameter in the shape that its module has, without padding."""
        whole = whole.view(self.ours[name].shape_in_module)
        return whole[: self.model.vocab_size] if name in self.model.vocabulary else whole
