"""One rank of an evaluation as a process. Nobody supervises it, and it writes nothing."""

from pathlib import Path

import torch.distributed as dist

from tptrain.config import Config
from tptrain.run.rendezvous import connect_ranks, meet
from tptrain.run.weights import model_with_weights
from tptrain.train.evaluate import Evaluation, evaluate
from tptrain.train.trainer import cross_entropy
from tptrain.watch.black_box import BlackBox


def run(config: Config, checkpoint: Path | None) -> tuple[Evaluation, bool]:
    """Evaluate a checkpoint, or the weights of `model.path`, as one rank, whose place the environment tells.

    Returns also whether this is rank 0. Raises UserError, CheckpointError and RendezvousError.
    """
    box = BlackBox()
    rendezvous = meet(config, box)
    mesh = connect_ranks(config, box, rendezvous)
    model = model_with_weights(config, checkpoint, mesh, rendezvous.ops)
    result = evaluate(config, model, cross_entropy(model, rendezvous.ops))
    dist.destroy_process_group()
    return result, mesh.is_main
