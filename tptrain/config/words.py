"""Words of a command line that are settings of the command itself, beside the overrides for Hydra."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tptrain.config.errors import UserError
from tptrain.config.validate import check_bounds

T = TypeVar("T")


def split(
    words: Sequence[str], kind: type[T], texts: Mapping[str, Callable[[Any, str], Any]]
) -> tuple[T, set[str], list[str]]:
    """The settings of a dataclass, the keys of it that are there, and the words that are none of them.

    `texts`: of keys whose values are not read as YAML, what comes of the value so far and a text. Raises UserError.
    """
    defaults: Any = kind()
    keys = {item.name for item in dataclasses.fields(defaults)}
    read, values, others = dict[str, Any](), dict[str, Any](), list[str]()
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in keys:
            others.append(word)
        elif key in texts:
            read[key] = texts[key](read.get(key, getattr(defaults, key)), value)
        else:
            values[key] = None if value == "null" else value
    try:
        settings: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    settings = dataclasses.replace(settings, **read)
    check_bounds(settings, "")
    return cast(T, settings), read.keys() | values.keys(), others


def as_typed(_: Any, text: str) -> str:
    return text


def one_more(before: list[str], text: str) -> list[str]:
    """For a key that may come repeatedly."""
    return [*before, text]


def listed(_: Any, text: str) -> list[str]:
    """[a,b] or a,b."""
    parts = text.removeprefix("[").removesuffix("]").split(",")
    return [part.strip() for part in parts if part.strip()]
