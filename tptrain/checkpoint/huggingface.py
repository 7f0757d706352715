"""Weights between Hugging Face's names and layouts and ours: slices of a directory in, whole tensors out."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor
from tqdm import tqdm

from tptrain.checkpoint import safetensors
from tptrain.config.schema import ModelConfig
from tptrain.models.directory import keys, tensors
from tptrain.models.families.keys import Key
from tptrain.models.safetensors import Entry, problem
from tptrain.models.settings import decoder_spec
from tptrain.models.spec import DecoderSpec
from tptrain.nn.decoder import Decoder, on_meta
from tptrain.nn.parameter import Parameter, parameters
from tptrain.parallel.mesh import Mesh

VOCABULARY = ("embed_tokens.weight", "lm_head.weight")  # whose rows are padded
AT_ONCE = 2**19  # elements that are read, summed and stored at a time: they stay in the processor's cache
TRANSPOSED_AT_ONCE = 2**23  # of a transposed tensor, whose rows of the file are read in shorter pieces

Fill = Callable[[str, Parameter, int, Tensor], None]  # name, slice, first element, values: `Store.fill`
Shapes = Mapping[str, tuple[int, ...]]  # of our parameters, global and padded


def shapes(spec: DecoderSpec) -> Shapes:
    """Of a decoder's parameters, by name."""
    return {name: p.sharding.shape for name, p in parameters(on_meta(spec))}


def shapes_of(model: ModelConfig) -> Shapes:
    """Of the parameters of a model of either engine, by name."""
    if model.engine != "transformers":
        return shapes(decoder_spec(model))
    from tptrain.hf.model import on_meta as transformers_on_meta

    return {name: p.sharding.shape for name, p in parameters(transformers_on_meta(model))}


def by_tensor(where: Iterable[Key]) -> dict[str, list[Key]]:
    """Keys by Hugging Face's names: what each of their tensors holds."""
    groups: dict[str, list[Key]] = {}
    for key in where:
        groups.setdefault(key.theirs, []).append(key)
    return groups


def their_shape(group: list[Key], ours: Shapes, spec: DecoderSpec) -> tuple[int, ...]:
    """Of the tensor that holds these parameters."""
    rows = sum(_rows(key.ours, ours, spec) for key in group)
    shape = (rows, *ours[group[0].ours][1:])
    return shape[::-1] if group[0].transposed else shape


def _rows(name: str, ours: Shapes, spec: DecoderSpec) -> int:
    """A parameter's rows without padding."""
    return spec.vocab_size if name in VOCABULARY else ours[name][0]


# ------------------------------------------------------------------------------------------------------------------- in


@dataclass(frozen=True)
class _Part:
    """A run of rows of a rank's slice, as it lies in a file."""

    start: int  # its first element's place in the slice
    entry: Entry
    rows: tuple[int, int]  # of the file's tensor, or its columns where that is transposed
    columns: tuple[int, int] | None  # None: of a vector
    transposed: bool

    def read(self, reader: safetensors.Reader) -> Tensor:
        """(rows, columns) or (rows,), in the file's precision."""
        if self.transposed and self.columns is not None:
            return reader.read(self.entry, self.columns, self.rows).t()
        return reader.read(self.entry, self.rows, self.columns)


class Slices:
    """This rank's slices of a directory's weights. It reads those and nothing else, some at a time."""

    def __init__(self, config: ModelConfig, model: Decoder, source: Callable[[str], str] = lambda name: name) -> None:
        """`source`: the directory's name of a parameter, where the model is a part of it with names of its own.

        Raises UserError for a directory that has not what the model needs.
        """
        entries, known = tensors(config), keys(config)
        self.parameters = dict(parameters(model))
        ours = {name: p.sharding.shape for name, p in self.parameters.items()}
        self.keys = {name: replace(known[source(name)], ours=name) for name in ours}
        self.entries = {name: entries[key.theirs] for name, key in self.keys.items()}
        self.rows = {name: _rows(name, ours, model.spec) for name in ours}  # without padding
        for theirs, group in by_tensor(self.keys.values()).items():
            if entries[theirs].shape != (shape := their_shape(group, ours, model.spec)):
                actual, expected = list(entries[theirs].shape), list(shape)
                raise problem(entries[theirs].file, f"has {theirs} of {actual}, where config.json asks for {expected}")

    def read(self, name: str, reader: safetensors.Reader) -> Iterator[tuple[str, int, Tensor]]:
        """A parameter's, without padding, in runs: its name, the run's first element in the slice, values."""
        for part in self._parts(name):
            yield name, part.start, part.read(reader)

    def _parts(self, name: str) -> Iterator[_Part]:
        """Of at most AT_ONCE elements each."""
        layout, key = self.parameters[name].sharding, self.keys[name]
        first, inner = layout.offsets[0], math.prod(layout.local_shape[1:])
        columns = (layout.offsets[1], layout.offsets[1] + layout.local_shape[1]) if len(layout.shape) == 2 else None
        step = max(1, (TRANSPOSED_AT_ONCE if key.transposed else AT_ONCE) // inner)
        for start, place, length in key.runs(first, min(first + layout.local_shape[0], self.rows[name])):
            for done in range(0, length, step):
                run = place + done, place + min(done + step, length)
                yield _Part((start + done - first) * inner, self.entries[name], run, columns, key.transposed)


def load_pretrained(
    config: ModelConfig,
    model: Decoder,
    fill: Fill,
    alive: Callable[[], None] = lambda: None,
    source: Callable[[str], str] = lambda name: name,
) -> str:
    """Read this rank's slices of a directory's weights into `fill`, and return a digest of all weights.

    Every rank calls it. The digest does not depend on the topology. `source`: see `Slices`. Raises UserError for a
    directory that has not what the model needs.
    """
    slices = Slices(config, model, source)
    ours, sums = slices.parameters, dict.fromkeys(slices.parameters, 0)
    total = sum(p.sharding.size for p in ours.values())
    with (
        closing(safetensors.Reader()) as reader,
        tqdm(
            desc="reading weights", total=total, unit=" weights", unit_scale=True, disable=model.mesh.disable_bar
        ) as bar,
    ):
        for name, p in ours.items():
            for _, start, values in slices.read(name, reader):
                sums[name] += bit_sum(values, p)
                fill(name, p, start, values)
                bar.update(values.numel())
                alive()
            fill_padding(name, p, slices.rows[name], fill)
    return digest(model.mesh, ours, sums, {name: entry.dtype for name, entry in slices.entries.items()})


def fill_padding(name: str, p: Parameter, rows: int, fill: Fill) -> None:
    """Zeros in this rank's rows from that number of the whole parameter on: the vocabulary's padding, if any."""
    local = p.sharding.local_shape[0]
    padding = min(p.sharding.offsets[0] + local - rows, local)
    if padding > 0:
        elements = padding * (p.sharding.size // local)
        fill(name, p, p.sharding.size - elements, torch.zeros(elements))


def bit_sum(values: Tensor, p: Parameter) -> int:
    """The sum modulo 2**64 of the elements' bits as integers: of the parts of a tensor, however it is cut, the same.

    A matrix is summed by words of 8 bytes where up to 64 ranks cut none in two; by numpy, which wraps without a cast.
    """
    layout, size = p.sharding, values.dtype.itemsize
    word = 8 if len(layout.shape) == 2 and layout.shape[1] * size % (8 * 64) == 0 else size
    integers = values.contiguous().view(-1).view(torch.uint8).numpy().view(f"i{word}")
    return int(integers.sum(dtype=np.int64))


def digest(mesh: Mesh, ours: Mapping[str, Parameter], sums: Mapping[str, int], dtypes: Mapping[str, str]) -> str:
    """Of all weights: every slice is counted once, however many ranks hold it. `sums`: of the bits of this rank's
    slices; `dtypes`: of the tensors in the files.
    """
    whole, totals = xxhash.xxh3_128(), dict.fromkeys(sums, 0)
    slices = {(name, p.sharding.offsets): sums[name] for name, p in ours.items()}
    everywhere = mesh.control.gather(slices if mesh.index("dp") == 0 else {})
    for (name, _), value in {place: value for each in everywhere for place, value in each.items()}.items():
        totals[name] += value
    for name, p in sorted(ours.items()):
        total = totals[name] % 2**64
        whole.update(f"{name} {dtypes[name]} {p.sharding.shape} {total}\n".encode())
    return whole.hexdigest()


# ------------------------------------------------------------------------------------------------------------------ out


def to_theirs(spec: DecoderSpec, where: Iterable[Key], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our whole tensors by Hugging Face's names, without padding. Raises KeyError."""
    sizes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    return {name: join(spec, group, sizes, ours.__getitem__) for name, group in by_tensor(where).items()}


def join(spec: DecoderSpec, group: list[Key], sizes: Shapes, value: Callable[[str], Tensor]) -> Tensor:
    """The tensor that holds these parameters; `value` gives each, whole and padded."""
    if len(group) == 1 and group[0].block is None:
        part = value(group[0].ours)[: _rows(group[0].ours, sizes, spec)]
        return part.t().contiguous() if group[0].transposed else part
    tensor = None
    for key in group:
        part, rows = value(key.ours), _rows(key.ours, sizes, spec)
        if tensor is None:
            shape = their_shape(group, sizes, spec)
            tensor = torch.empty(shape[::-1] if key.transposed else shape, dtype=part.dtype)
        for start, place, length in key.runs(0, rows):
            tensor[place : place + length] = part[start : start + length]
    assert tensor is not None
    return (tensor.t() if group[0].transposed else tensor).contiguous()


def to_ours(spec: DecoderSpec, where: Iterable[Key], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's whole tensors by our names: (out, in), the vocabulary padded with zeros. Raises KeyError."""
    sizes, ours = shapes(spec), {}
    for key in where:
        tensor = theirs[key.theirs].t() if key.transposed else theirs[key.theirs]
        rows = _rows(key.ours, sizes, spec)
        part = torch.cat([tensor[place : place + length] for _, place, length in key.runs(0, rows)])
        padding = sizes[key.ours][0] - rows
        ours[key.ours] = F.pad(part, (0, 0, 0, padding)) if padding else part
    return ours
