"""What a Hugging Face directory says before a weight is read: its config.json and its tokenizer. Imports no torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.config.errors import UserError

JSON_BYTES = 64 * 2**20  # of a tokenizer.json at most; a config.json has some thousands
CONFIG_BYTES = 4 * 2**20
DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE*"]  # files of a model beside its weights
WEIGHTS = "*.safetensors"


def directory(path: str, revision: str | None, weights: bool = False) -> Path:
    """The directory of a model: `path` itself, or where the hub's cache has the model of that name, fetched if need be;
    its `weights` only on request, for they are large.

    Raises UserError where there is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"model.revision={revision}: only models of the hub have one, and {path} is a directory.")
        return folder.absolute()
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"model.path={path}: no such directory, and no name of the hub (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [*DESCRIPTION, *([WEIGHTS] if weights else [])]
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"model.path={path}: not in the hub's cache, and the hub does not answer. Fetch it where there is "
            f"internet: `hf download {path}`."
        ) from error
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise UserError(f"model.path={path}: the hub refuses it: {str(error).splitlines()[0]}") from error


def read_json(path: Path, largest: int = JSON_BYTES) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file is missing, too large or something else."""
    try:
        if (size := path.stat().st_size) > largest:
            raise UserError(f"model.path={path.parent}: {path.name} has {size:,} bytes, which is no {path.name}.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model.path={path.parent}: has no {path.name}. Name a Hugging Face directory.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.path={path.parent}: {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"model.path={path.parent}: {path.name} is no JSON object.")
    return content


# ----------------------------------------------------------------------------------------------------------- tokenizer


@dataclass(frozen=True)
class TokenizerRules:
    """The tokens that stand around a document, as the model has seen them."""

    bos: str | None  # before it
    eos: str | None  # after it


def tokenizer_rules(folder: Path) -> TokenizerRules:
    """By tokenizer_config.json, else by config.json's ids; a BOS only where the tokenizer itself puts one."""
    tokenizer = read_json(folder / "tokenizer.json")
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    config = read_json(folder / "config.json", CONFIG_BYTES)
    texts = {entry["id"]: entry["content"] for entry in tokenizer.get("added_tokens", [])}

    def token(name: str) -> str | None:
        value = settings.get(f"{name}_token")
        if isinstance(value, dict):  # the older spelling
            value = value.get("content")
        if value is None and not settings:
            number = config.get(f"{name}_token_id")
            value = texts.get(number[0] if isinstance(number, list) else number)
        return value

    bos, first = token("bos"), list(_leading(tokenizer.get("post_processor")))
    adds = settings.get("add_bos_token")
    puts_bos = bool(first) if adds is None else bool(adds)
    return TokenizerRules((bos or next(iter(first), None)) if puts_bos else None, token("eos"))


def _leading(processor: Any) -> Iterator[str]:
    """Special tokens that a post-processor of a tokenizer.json puts before a single text."""
    if not isinstance(processor, dict):
        return
    for each in processor.get("processors", []):
        yield from _leading(each)
    for piece in processor.get("single", []):
        if "SpecialToken" not in piece:
            return
        yield piece["SpecialToken"]["id"]
