"""One rank of the import of a Hugging Face directory as a process."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from tptrain.checkpoint.commit import Commit
from tptrain.checkpoint.huggingface import load_pretrained
from tptrain.checkpoint.layout import weights_state
from tptrain.checkpoint.save import write_checkpoint
from tptrain.config import Config
from tptrain.models.directory import adopt, tensors
from tptrain.run.rendezvous import connect_ranks, meet
from tptrain.train.trainer import build_model
from tptrain.watch.black_box import BlackBox


def run(config: Config) -> bool:
    """Write `run.dir`/checkpoints/step-00000000 out of `model.path`, and the model's other files beside it.

    Every rank reads and writes its slices, in bf16 where all tensors are, else in fp32. Returns whether this is rank 0.
    Raises UserError, CheckpointError and RendezvousError.
    """
    box, folder = BlackBox(), Path(config.run.dir)
    rendezvous = meet(config, box)
    mesh = connect_ranks(config, box, rendezvous)
    precision = "bf16" if {entry.dtype for entry in tensors(config.model).values()} == {"BF16"} else "fp32"
    config = replace(config, train=replace(config.train, precision=precision))
    model, store = build_model(config, mesh, rendezvous.ops)

    def claim() -> None:
        folder.mkdir(parents=True)
        adopt(config)

    mesh.control.main_first(claim)
    load_pretrained(config.model, model, store.fill, box.touch)
    commit = Commit(0, 0, mesh.world, mesh.size("tp"), "", 0, {}, optimizer=False)
    write_checkpoint(folder / "checkpoints", weights_state(store), commit, config, mesh)
    dist.destroy_process_group()
    return mesh.is_main
