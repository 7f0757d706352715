"""A Hugging Face directory: which tensors it has, and a run's own copy of all but those."""

import json
import re
import shutil
from collections.abc import Container
from pathlib import Path

from tptrain.config import Config, UserError
from tptrain.config.load import write_atomically
from tptrain.config.pretrained import directory
from tptrain.config.schema import MODEL_FILES, TENSORS, ModelConfig
from tptrain.models.families.keys import Key
from tptrain.models.safetensors import Entry, TensorFiles
from tptrain.models.settings import decoder_spec, family

DIGEST = "weights.digest"  # in that copy: of the weights that the run began with
PARTIAL = f".{MODEL_FILES}"  # that copy in a run directory while it is made
OWN_FILES = (TENSORS, DIGEST)  # which are not the model's
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
FILE_BYTES = 64 * 2**20  # a larger file is not part of a model's description
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\battn\.(masked_)?bias|\battention\.(masked_)?bias)$")  # not parameters


def fetch_weights(model: ModelConfig) -> None:
    """Fetch the weights of a model of the hub into the directory of its other files, unless all of them are there.

    Raises UserError.
    """
    assert model.path is not None
    assert model.directory is not None
    if Path(model.path).is_dir():
        return
    try:
        TensorFiles(Path(model.directory), integers=True)
    except UserError:
        directory(model.path, Path(model.directory).name, weights=True)  # of the same commit, which names the folder


def check_weights(model: ModelConfig) -> None:
    """Have the weights of a native model here, and see that they are its tensors. Raises UserError."""
    fetch_weights(model)
    tensors(model)


def tensors(model: ModelConfig) -> dict[str, Entry]:
    """The tensors of a model's directory by the names of its family. Raises UserError for one that lacks or has more.

    A model may have been saved without its head's prefix (`wte.weight` for `transformer.wte.weight`), and with buffers
    that follow from its config.json.
    """
    assert model.directory is not None
    entries = TensorFiles(Path(model.directory)).entries
    needed = {key.theirs for key in keys(model).values()}
    names = {name: file_name(name, entries) for name in needed}
    missing = sorted(name for name in needed if names[name] not in entries)
    if missing:
        raise UserError(f"model.path={model.path}: lacks the tensor {missing[0]}{and_more(missing)}. Fetch it anew.")
    others = sorted(name for name in entries.keys() - set(names.values()) if not BUFFERS.search(name))
    if decoder_spec(model).tied:  # some files have the head all the same
        others = [name for name in others if name != "lm_head.weight"]
    if others:
        raise UserError(
            f"model.path={model.path}: has the tensor {others[0]}{and_more(others)}, which model_type="
            f"{model.source['model_type']} does not know: the model would not be what its authors trained."
        )
    return {name: entries[names[name]] for name in needed}


def keys(model: ModelConfig) -> dict[str, Key]:
    """Where each of our parameters lies, by our name."""
    return {key.ours: key for key in family(model).keys(decoder_spec(model))}


def file_name(name: str, names: Container[str]) -> str:
    """A tensor's name in the files: the family's, or that without the head's prefix."""
    return name if name in names else name.split(".", 1)[1]


def and_more(names: list[str]) -> str:
    """What a message says of all but the first, which it names."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def adopt(config: Config) -> None:
    """Copy the directory's files, but for the weights, into the run directory, unless an import has done so; the config
    then names the copies. Raises UserError where they cannot be written.
    """
    model, target = config.model, Path(config.run.dir) / MODEL_FILES
    assert model.directory is not None
    source = Path(model.directory)
    if not target.exists():
        _copy(source, target)
    if config.data.tokenizer == str(source / "tokenizer.json"):
        config.data.tokenizer = str(target / "tokenizer.json")


def _copy(source: Path, target: Path) -> None:
    """A model's files, but for the weights, and TENSORS: `target` appears whole or not at all."""
    partial = target.with_name(PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of a launch that was killed
    try:
        partial.mkdir()
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.endswith(WEIGHTS) and file.stat().st_size <= FILE_BYTES:
                shutil.copyfile(file, partial / file.name)
        entries = TensorFiles(source, integers=True).entries
        written = {name: [entry.dtype, entry.file.name, *entry.shape] for name, entry in entries.items()}
        write_atomically(partial / TENSORS, json.dumps(written, indent=0))
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = f"{error.strerror}: {error.filename}"
        raise UserError(f"run.dir={target.parent}: cannot copy {source} into it ({reason}). Make room.") from error
