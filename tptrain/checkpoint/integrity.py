"""Whether the checkpoints of a run are whole: commit marker, checksums, and every parameter of the model."""

import math
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from tptrain.checkpoint.commit import CheckpointError, Commit, damage, read_commit
from tptrain.checkpoint.huggingface import shapes_of
from tptrain.checkpoint.index import Index
from tptrain.config import UserError, read_config
from tptrain.records.run_dir import COMMIT, step_folders


def check_all(folders: list[Path]) -> Iterator[tuple[Path, str, bool]]:
    """Of each checkpoint what it is, in words, and whether that is as it should be. All bytes are read."""
    for folder in folders:
        if not (folder / COMMIT).exists():
            yield folder, "never committed (a save was cut off); it is not used", True
            continue
        problem = problem_of(folder)
        commit = read_commit(folder)
        if problem is not None or not isinstance(commit, Commit):
            yield folder, f"damaged: {problem}", False
            continue
        size = sum(length for length, _ in commit.files.values())
        files = f"{len(commit.files)} files, {size / 1e6:,.1f} MB"
        yield folder, f"whole: {files}, saved by {commit.world} ranks with tp={commit.tp}", True


def checkpoints_of(folder: Path) -> list[Path]:
    """A checkpoint itself, or those of a run. Raises UserError where there are none."""
    folders = [folder] if (folder / COMMIT).exists() else step_folders(folder / "checkpoints")
    if not folders:
        raise UserError(f"{folder}: has no checkpoint yet.")
    return folders


def problem_of(folder: Path) -> str | None:
    """What is wrong with a committed checkpoint, or None."""
    commit = read_commit(folder)
    if not isinstance(commit, Commit):
        return commit
    files = tqdm(commit.files.items(), desc=folder.name, unit=" files", leave=False, disable=None)
    for name, measured in files:
        if (problem := damage(folder / name, *measured)) is not None:
            return problem
    try:
        index = Index(folder)
        ours = shapes_of(read_config(folder / "config.yaml").model)
    except (CheckpointError, UserError) as error:
        return str(error)
    for name, shape in ours.items():
        stored = index.tensors.get(f"model/{name}")
        if stored is None or stored.shape != shape:
            return f"{name} is missing" if stored is None else f"{name} is {list(stored.shape)}, not {list(shape)}"
        boxes = {each.offsets: each.shape for each in stored.chunks}
        if sum(map(math.prod, boxes.values())) != math.prod(shape):
            return f"{name} is there in part only"
    return None
