"""A rank's model with its weights, for whatever is done with it but training."""

from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.checkpoint.load import load_weights
from tptrain.checkpoint.pretrained import read_weights
from tptrain.config import Config
from tptrain.ops.table import Operations
from tptrain.parallel.mesh import Mesh
from tptrain.train.trainer import build_model

if TYPE_CHECKING:
    from tptrain.train.trainer import Model


def model_with_weights(config: Config, checkpoint: Path | None, mesh: Mesh, ops: Operations) -> "Model":
    """With those of a checkpoint, or of `model.path`. Every rank calls it. Raises UserError and CheckpointError."""
    model, store = build_model(config, mesh, ops)
    if checkpoint is None:
        read_weights(config.model, model, store.fill, mesh.box.touch)
    else:
        load_weights(checkpoint, store)
    return model
