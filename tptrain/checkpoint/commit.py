"""Whether a checkpoint is whole: its commit marker and its checksums."""

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tptrain.checkpoint.files import measure
from tptrain.records.run_dir import COMMIT


class CheckpointError(Exception):
    """A checkpoint could not be written. Earlier ones are untouched."""


def reason(*errors: BaseException) -> str:
    """Why a checkpoint could not be written, in one sentence."""
    for error in errors:
        # torch's zip writer reports a full disk as a RuntimeError of its own
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "file write failed" in str(error):
            return "no space left on the device. Free some, or lower checkpoint.keep, and launch again"
    return "; ".join(str(e) if isinstance(e, CheckpointError) else f"{type(e).__name__}: {e}" for e in errors)


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
    optimizer: bool = True  # whether the moments are there; not in a model that was imported


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
