"""One rank of the import of a Hugging Face directory as a process."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from tptrain.checkpoint.commit import Commit
from tptrain.checkpoint.layout import weights_state
from tptrain.checkpoint.pretrained import read_weights
from tptrain.checkpoint.save import write_checkpoint
from tptrain.config import Config
from tptrain.models.directory import adopt
from tptrain.models.safetensors import TensorFiles
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
    assert config.model.directory is not None
    dtypes = {entry.dtype for entry in TensorFiles(Path(config.model.directory), integers=True).entries.values()}
    precision = "bf16" if dtypes == {"BF16"} else "fp32"
    config = replace(config, train=replace(config.train, precision=precision))
    model, store = build_model(config, mesh, rendezvous.ops)

    def claim() -> None:
        folder.mkdir(parents=True)
        adopt(config)

    mesh.control.main_first(claim)
    read_weights(config.model, model, store.fill, box.touch)
    commit = Commit(0, 0, mesh.world, mesh.size("tp"), "", 0, {}, optimizer=False)
    write_checkpoint(folder / "checkpoints", weights_state(store), commit, config, mesh)
    dist.destroy_process_group()
    return mesh.is_main
