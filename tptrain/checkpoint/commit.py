"""Which checkpoints there are, and whether they are whole: folders and their commit markers."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tptrain.checkpoint.files import measure

COMMIT = "commit.json"


class CheckpointError(Exception):
    """A checkpoint could not be written. Earlier ones are untouched."""


@dataclass(frozen=True)
class Commit:
    """What `commit.json` says."""

    step: int
    samples: int  # training sequences consumed: the position in the data
    world: int
    tp: int
    data: str  # digest of the packed tokens
    updates: int  # of the weights: fewer than steps where train.on_nan=skip left some out
    files: dict[str, list[Any]]  # name -> [bytes, xxh3_128 hex]


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first. Says nothing of whether their bytes are still good."""
    return [path for path in step_folders(folder) if (path / COMMIT).exists()]


def step_folders(folder: Path) -> list[Path]:
    """Oldest first, committed or not. A folder of any other name is not ours."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)), key=step_of)


def read_commit(path: Path) -> Commit | str:
    """The commit marker of a checkpoint, or what is wrong with it."""
    try:
        content = json.loads((path / COMMIT).read_text())
        body = content["commit"]
        if content["xxh3_128"] != body_digest(body):
            return f"{COMMIT}: its checksum differs from the one written in it"
        return Commit(**body)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{COMMIT}: unreadable ({type(error).__name__}: {error})"


def damage(file: Path, length: int, digest: str) -> str | None:
    """What is wrong with a file of a checkpoint, or None."""
    try:
        if (actual := file.stat().st_size) != length:
            return f"{file.name}: {actual} bytes instead of {length}"
        if (actual_digest := measure(file)[1]) != digest:
            return f"{file.name}: checksum {actual_digest} instead of {digest}"
    except FileNotFoundError:
        return f"{file.name}: missing"
    except OSError as error:
        return f"{file.name}: unreadable ({error.strerror})"
    return None


def body_digest(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
