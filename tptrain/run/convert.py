"""One rank of the import of a Hugging Face directory as a process."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from tptrain.checkpoint.commit import Commit
from tptrain.checkpoint.pretrained import weights_to_write
from tptrain.checkpoint.save import write_checkpoint
from tptrain.config import Config
from tptrain.models.directory import adopt
from tptrain.models.safetensors import TensorFiles
from tptrain.ops.table import Operations
from tptrain.parallel.mesh import Mesh
from tptrain.run.rendezvous import connect_ranks, meet
from tptrain.train.trainer import DTYPES, new_model
from tptrain.watch.black_box import BlackBox


def run(config: Config) -> bool:
    """Import `model.path` as one of the ranks. Returns whether this is rank 0.

    Raises UserError, CheckpointError and RendezvousError.
    """
    box = BlackBox()
    rendezvous = meet(config, box)
    mesh = connect_ranks(config, box, rendezvous)
    write(config, mesh, rendezvous.ops)
    dist.destroy_process_group()
    return mesh.is_main


def write(config: Config, mesh: Mesh, ops: Operations) -> None:
    """Write `run.dir`/checkpoints/step-00000000 out of `model.path`, and the model's other files beside it.

    Every rank calls it, and reads and writes its slices, a parameter at a time, in bf16 where all tensors are, else in
    fp32. Raises UserError and CheckpointError.
    """
    assert config.model.directory is not None
    dtypes = {entry.dtype for entry in TensorFiles(Path(config.model.directory), integers=True).entries.values()}
    precision = "bf16" if dtypes == {"BF16"} else "fp32"
    config, folder = replace(config, train=replace(config.train, precision=precision)), Path(config.run.dir)

    def claim() -> None:
        folder.mkdir(parents=True)
        adopt(config)

    with weights_to_write(config.model, new_model(config, mesh, ops), DTYPES[precision]) as state:
        mesh.control.main_first(claim)
        commit = Commit(0, 0, mesh.world, mesh.size("tp"), "", 0, {}, optimizer=False)
        write_checkpoint(folder / "checkpoints", state, commit, config, mesh)
