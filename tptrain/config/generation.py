"""The words after `generate`: which are its own, and which are overrides for Hydra."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from tptrain.config.errors import UserError
from tptrain.config.schema import GenerateConfig
from tptrain.config.words import as_typed, one_more, split

TEXTS = {"prompt": as_typed, "prompt_file": as_typed, "stop": one_more}


def split_words(words: Sequence[str]) -> tuple[GenerateConfig, list[str]]:
    """The settings of `generate`, and the words that are none of them. Raises UserError."""
    settings, keys, others = split(words, GenerateConfig, TEXTS)
    _check(settings, keys)
    return settings, others


def _check(settings: GenerateConfig, keys: set[str]) -> None:
    if settings.prompt is not None and settings.prompt_file is not None:
        raise UserError("prompt_file: prompt= is there, too. Give one of them.")
    for key in ("top_k", "top_p", "seed"):
        if settings.temperature == 0 and key in keys:
            raise UserError(f"{key}: temperature=0 takes the likeliest token whatever it is. Give temperature=1.")
    if "" in settings.stop:
        raise UserError("stop=: empty, and every text has that. Leave it out.")


def prompts(settings: GenerateConfig, stdin: TextIO) -> list[dict[str, Any]]:
    """Each with "prompt", a text, or with "messages", a chat; what else a JSON object of `prompt_file` has is kept.

    Raises UserError where there is none, or one cannot be read.
    """
    if settings.prompt is not None:
        return [{"prompt": settings.prompt}]
    name = settings.prompt_file
    if name is None and stdin.isatty():
        raise UserError('prompt: not set. Give prompt="...", prompt_file=FILE, or a prompt each line on stdin.')
    if name in (None, "-"):
        name, text = "stdin", stdin.read()
    else:
        try:
            text = Path(cast(str, name)).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt_file={name}: cannot be read: {error}.") from error
    rows = [_row(line, f"{name}, line {i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not rows:
        raise UserError(f"prompt_file={name}: has no prompt.")
    return rows


def check_prompt(which: str, tokens: int, positions: int) -> None:
    """Raises UserError for a prompt that is empty or longer than the model's positions; `which` names it."""
    if tokens == 0:
        raise UserError(f"{which}: empty, and this model has no token that begins a text. Give a word or more.")
    if tokens >= positions:
        raise UserError(f"{which}: {tokens:,} tokens, and the model has {positions:,} positions. Shorten it.")


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line) if line.lstrip().startswith("{") else None
    except ValueError:
        row = None
    if not isinstance(row, dict) or not row.keys() & {"prompt", "messages"}:
        return {"prompt": line}
    if "messages" in row:
        right = isinstance(row["messages"], list) and all(isinstance(each, dict) for each in row["messages"])
        if not right or "prompt" in row:
            raise UserError(f"{where}: messages is a list of objects, and comes without prompt.")
    elif not isinstance(row["prompt"], str):
        raise UserError(f"{where}: prompt is no text.")
    return row
