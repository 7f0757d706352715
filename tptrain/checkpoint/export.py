"""A checkpoint as a Hugging Face directory, in memory for one tensor at a time."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tptrain.checkpoint import safetensors
from tptrain.checkpoint.commit import CheckpointError
from tptrain.checkpoint.huggingface import Shapes, by_tensor, join, shapes, their_shape
from tptrain.checkpoint.index import Index
from tptrain.checkpoint.integrity import problem_of
from tptrain.checkpoint.layout import Part
from tptrain.config import Config, UserError, read_config
from tptrain.config.schema import MODEL_FILES
from tptrain.hf import check_installed
from tptrain.models.directory import OWN_FILES, TENSORS, file_name
from tptrain.models.families.keys import Key
from tptrain.models.settings import decoder_spec, family, family_of_settings
from tptrain.models.spec import DecoderSpec
from tptrain.nn.parameter import parameters
from tptrain.records.run_dir import CARD

SHARD_BYTES = 5 * 10**9  # of a file, where the run did not begin with a directory whose files say more
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of an export, by train.precision


def export(checkpoint: Path, out: Path, verify: bool = True) -> None:
    """Write the model of a committed checkpoint as AutoModelForCausalLM.from_pretrained takes it.

    `verify`: read all of the checkpoint first, to see that its bytes are what was written. `out` appears whole or not
    at all. Raises UserError where it exists, or where the checkpoint is damaged.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already, and nothing is written over. Choose another name.")
    config = read_config(checkpoint / "config.yaml")
    if verify:
        _check(checkpoint)
    kept = checkpoint.parent.parent / MODEL_FILES
    contents = _contents(config, kept)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            target = Path(folder) / "model"
            target.mkdir()
            _write_others(config, kept, target)
            _add_card(checkpoint.parent.parent / CARD, target / "README.md")
            _write_weights(contents, Index(checkpoint), target)
            target.rename(out)
    except CheckpointError as error:
        raise UserError(f"{error}") from error


def _check(checkpoint: Path) -> None:
    """Raises UserError unless the checkpoint is whole."""
    if (problem := problem_of(checkpoint)) is not None:
        raise UserError(f"{checkpoint}: is damaged: {problem}. Export another checkpoint.")


@dataclass
class _Contents:
    """What is to be written: files, and what gives the values of some tensors in them, in order and in any type.

    `values` is called with names and with what gives a parameter of ours, whole and padded.
    """

    ours: Shapes
    parts: list[safetensors.Shard]
    values: Callable[[list[str], Callable[[str], Tensor]], Iterator[Tensor]]


def _contents(config: Config, kept: Path) -> _Contents:
    """Names, types and files as in the directory that the run began with; else the family's names, in one type."""
    if not config.model.path:
        spec = decoder_spec(config.model)
        ours, groups = shapes(spec), by_tensor(family_of_settings(config.model).keys(spec))
        dtype = DTYPES[config.train.precision]
        parts = safetensors.shards({n: (dtype, their_shape(g, ours, spec)) for n, g in groups.items()}, SHARD_BYTES)
        return _Contents(ours, parts, partial(_joined, spec, groups, ours))
    if not (kept / TENSORS).exists():
        raise UserError(f"{kept}: is missing, and the tokenizer and the rest of the model are there. Restore it.")
    written: dict[str, list[Any]] = json.loads((kept / TENSORS).read_text())  # name -> dtype, file and shape
    contents = _converted if config.model.engine == "transformers" else _native
    ours, known, values = contents(config, written)
    files: dict[str, safetensors.Shard] = {}
    for name, (dtype, file, *_) in written.items():
        if name in known:  # else a buffer, which follows from config.json
            files.setdefault(file, safetensors.Shard(file)).add(name, safetensors.DTYPES[dtype], known[name])
    return _Contents(ours, list(files.values()), values)


def _native(config: Config, written: dict[str, list[Any]]) -> tuple[Shapes, Shapes, Any]:
    """The shapes of our parameters and of the directory's tensors, and what gives their values."""
    spec = decoder_spec(config.model)
    ours, keys = shapes(spec), family(config.model).keys(spec)
    groups = {file_name(name, written): group for name, group in by_tensor(keys).items()}
    if spec.tied and "lm_head.weight" in written:  # the same matrix once more
        groups["lm_head.weight"] = next(g for g in groups.values() if g[0].ours == "embed_tokens.weight")
    known = {name: their_shape(group, ours, spec) for name, group in groups.items()}
    return ours, known, partial(_joined, spec, groups, ours)


def _joined(
    spec: DecoderSpec, groups: dict[str, list[Key]], ours: Shapes, names: list[str], value: Callable[[str], Tensor]
) -> Iterator[Tensor]:
    for name in names:
        yield join(spec, groups[name], ours, value)


def _converted(config: Config, written: dict[str, list[Any]]) -> tuple[Shapes, Shapes, Any]:
    """As `_native`, of a model that is Transformers'."""
    check_installed()
    from tptrain.checkpoint.transformers import Converted
    from tptrain.hf.model import on_meta

    model = on_meta(config.model)
    converted = Converted(model, {name: tuple(shape) for name, (_, _, *shape) in written.items()})
    known = {name: converted.shapes[name] for name in converted.targets}
    return {name: p.sharding.shape for name, p in parameters(model)}, known, converted.values


def _add_card(card: Path, readme: Path) -> None:
    """What `verify` has seen of the run's model, at the end of the model's own README."""
    if card.exists():
        before = readme.read_text().rstrip() + "\n\n" if readme.exists() else ""
        readme.write_text(before + card.read_text())


def _write_weights(contents: _Contents, index: Index, target: Path) -> None:
    ours = contents.ours

    def value(name: str) -> Tensor:
        stored = f"model/{name}"
        whole = torch.empty(ours[name], dtype=index.dtype(stored))
        index.load({stored: Part(ours[name], [([0] * whole.dim(), whole)], whole.dtype)})
        return whole

    total = sum(len(part.tensors) for part in contents.parts)
    with tqdm(desc="exporting", total=total, unit=" tensors", disable=None) as bar:

        def values(part: safetensors.Shard) -> Iterator[Tensor]:
            tensors = contents.values(list(part.tensors), value)
            for (dtype, _), tensor in zip(part.tensors.values(), tensors, strict=True):
                yield tensor.to(dtype)
                bar.update()

        for part in contents.parts:
            safetensors.write_shard(target, part, values(part))
    if len(contents.parts) > 1:
        safetensors.write_index(target, contents.parts)


def _write_others(config: Config, kept: Path, target: Path) -> None:
    """config.json, tokenizer and whatever else the run has of its model."""
    if config.model.path:
        for file in sorted(kept.iterdir()):
            if file.name not in OWN_FILES:
                shutil.copyfile(file, target / file.name)
        return
    settings = family_of_settings(config.model).to_config(decoder_spec(config.model))
    settings["dtype"] = str(DTYPES[config.train.precision]).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if config.data.tokenizer != "bytes" and Path(config.data.tokenizer).exists():
        shutil.copyfile(config.data.tokenizer, target / "tokenizer.json")
