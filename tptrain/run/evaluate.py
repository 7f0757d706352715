"""One rank of an evaluation as a process. Nobody supervises it, and it writes nothing."""

from pathlib import Path

import torch.distributed as dist

from tptrain.checkpoint.load import load_weights
from tptrain.checkpoint.pretrained import read_weights
from tptrain.config import Config
from tptrain.run.rendezvous import connect_ranks, meet
from tptrain.train.evaluate import Evaluation, evaluate
from tptrain.train.trainer import build_model, cross_entropy
from tptrain.watch.black_box import BlackBox


def run(config: Config, checkpoint: Path | None) -> tuple[Evaluation, bool]:
    """Evaluate a checkpoint, or the weights of `model.path`, as one rank, whose place the environment tells.

    Returns also whether this is rank 0. Raises UserError, CheckpointError and RendezvousError.
    """
    box = BlackBox()
    rendezvous = meet(config, box)
    mesh = connect_ranks(config, box, rendezvous)
    model, store = build_model(config, mesh, rendezvous.ops)
    if checkpoint is None:
        read_weights(config.model, model, store.fill, box.touch)
    else:
        load_weights(checkpoint, store)
    result = evaluate(config, model, cross_entropy(model, rendezvous.ops))
    dist.destroy_process_group()
    return result, mesh.is_main
