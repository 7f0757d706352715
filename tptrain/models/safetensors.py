"""What tensors a Hugging Face directory has: the headers of its safetensors files, and their index. Imports no torch.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, little-endian; the
header, which gives dtype, shape and place of each tensor; then their bytes, in row-major order. Nothing in it is code.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tptrain.config import UserError
from tptrain.config.pretrained import read_json

BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # of an element, by the format's name of its type
INTEGERS = {"I64": 8, "I32": 4}  # as well, of tables that some models of Transformers have beside their weights
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEADER_BYTES = 100 * 2**20  # at most, as in the safetensors library


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    file: Path
    dtype: str  # a key of BYTES
    shape: tuple[int, ...]
    start: int  # of its bytes in the file


class TensorFiles:
    """The tensors of a directory, by name. Every problem is a UserError that names the file."""

    def __init__(self, folder: Path, integers: bool = False) -> None:
        """`integers`: tensors of whole numbers may be among them."""
        self.folder, sizes = folder, BYTES | (INTEGERS if integers else {})
        self.entries: dict[str, Entry] = {}
        listed = _index(folder)
        for file in sorted(set(listed.values())) if listed else [SINGLE]:
            for name, entry in _header(folder / file, sizes).items():
                if name in self.entries:
                    raise problem(entry.file, f"has {name}, and so has {self.entries[name].file.name}")
                self.entries[name] = entry
        for name, file in listed.items():
            if name not in self.entries or self.entries[name].file != folder / file:
                raise problem(folder / INDEX, f"says that {name} is in {file}, which lacks it")
        for name in self.entries.keys() - (listed or self.entries).keys():
            raise problem(self.entries[name].file, f"has {name}, which {INDEX} does not list")


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file, by the index; empty where there is none, and one file has all."""
    path = folder / INDEX
    if not path.exists():
        if (folder / SINGLE).exists():
            return {}
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        advice = f" Convert {others[0]} to safetensors: pickles are not read." if others else ""
        raise UserError(f"model.path={folder}: has no {SINGLE} and no {INDEX}.{advice}")
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise problem(path, "is no index: weight_map must map names of tensors to names of files")
    for file in set(listed.values()):
        if Path(file).name != file or file in ("", ".", ".."):
            raise problem(path, f"names the file {file!r}, which is not in the directory")
        if not (folder / file).is_file():
            raise problem(path, f"names the file {file}, which is missing")
    return listed


def _header(file: Path, sizes: Mapping[str, int]) -> dict[str, Entry]:
    try:
        total = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if total < 8 or length > min(total - 8, HEADER_BYTES):
                raise problem(file, f"is truncated or no safetensors file: {total} bytes, and a header of {length}")
            header = json.loads(opened.read(length), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise problem(file, f"has a damaged header ({error})") from error
    except OSError as error:
        raise problem(file, f"cannot be read ({error.strerror})") from error
    if not isinstance(header, dict):
        raise problem(file, "has a damaged header (no object)")
    header.pop("__metadata__", None)
    entries, places = {}, []
    for name, described in header.items():
        try:
            dtype, shape, (start, stop) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise problem(file, f"has a damaged entry for {name}") from error
        if dtype not in sizes:
            raise problem(file, f"has {name} in {dtype}; only {', '.join(BYTES)} can be trained")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise problem(file, f"has a damaged entry for {name}")
        if stop - start != math.prod(shape) * sizes[dtype]:
            raise problem(file, f"has {stop - start} bytes for {name}, which is {dtype} of {list(shape)}")
        entries[name] = Entry(file, dtype, shape, 8 + length + start)
        places.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(places):
        if start != end:
            raise problem(file, f"has a gap or an overlap before {name}, at byte {8 + length + start}")
        end = stop
    if 8 + length + end != total:
        raise problem(file, f"has {total} bytes instead of {8 + length + end}: truncated, or with something behind it")
    return entries


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where a name comes twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} comes twice")
    return value


def problem(file: Path, text: str) -> UserError:
    return UserError(f"model.path={file.parent}: {file.name} {text}. Fetch it anew.")
