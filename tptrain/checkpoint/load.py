"""Loading checkpoints, at whatever topology they were saved."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tptrain.checkpoint.commit import CheckpointError, Commit, damage, read_commit
from tptrain.checkpoint.index import Index
from tptrain.checkpoint.layout import flat, rng_state, training_state, weights_state
from tptrain.nn.store import Store
from tptrain.optim.adamw import Optimizer
from tptrain.parallel.mesh import Mesh
from tptrain.records.run_dir import COMMIT, committed, step_folders


def load_newest(folder: Path, optimizer: Optimizer, mesh: Mesh, say: Callable[[str], None]) -> Commit | None:
    """Load the newest checkpoint that is committed and undamaged, at whatever topology it was saved.

    Every rank calls it; `say` gets a line on each checkpoint that is passed over. None where there is no good one.
    """
    candidates = mesh.control.main_first(lambda: committed(folder))
    unfinished = [path for path in step_folders(folder) if not (path / COMMIT).exists()]
    if unfinished:
        say(f"warning: ignoring {', '.join(path.name for path in unfinished)}: never committed (a save was cut off)")
    for path in reversed(candidates):
        commit = mesh.control.main_first(partial(read_commit, path))
        if isinstance(commit, str):
            problem = commit
        else:  # each rank reads a part of the files
            names = sorted(commit.files)[mesh.rank :: mesh.world]
            own = next(filter(None, (damage(path / name, *commit.files[name]) for name in names)), None)
            problem = next(filter(None, mesh.control.gather(own)), None)
        if problem is None:
            assert isinstance(commit, Commit)
            _read(path, optimizer, mesh, commit)
            return commit
        say(f"warning: checkpoint {path.name} is damaged and is not used: {problem}")
    if candidates:
        raise CheckpointError(f"none of the {len(candidates)} checkpoints in {folder} is whole; see the lines above")
    return None


def _read(path: Path, optimizer: Optimizer, mesh: Mesh, commit: Commit) -> None:
    same_ranks = commit.world == mesh.world
    index = Index(path)
    rng = {name: state for name, state in rng_state(mesh).items() if same_ranks and name in index.tensors}
    state = training_state(optimizer.state, flat(optimizer.state))
    if not commit.optimizer:
        state, rng = {name: part for name, part in state.items() if name.startswith("model/")}, {}
    index.load({**state, **rng})
    optimizer.updates = commit.updates
    optimizer.publish()
    # At another world size there is no such thing as "the" state of a rank, and a run on CPUs has none of a GPU: the
    # seeded one stays.
    for name, value in rng.items():
        if name.endswith("/cuda"):
            torch.cuda.set_rng_state(value, mesh.device)
        else:
            torch.set_rng_state(value)


def load_weights(path: Path, store: Store) -> None:
    """The weights of a checkpoint, into a model that is not trained. Raises CheckpointError."""
    Index(path).load(weights_state(store))
