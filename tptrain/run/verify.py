"""A process of `verify`: `python -m tptrain.run.verify FOLDER reference`, then one `... FOLDER ranks` for each rank.

FOLDER has the config (`config.yaml`), gets the reference's tensors, and at the end what the ranks have seen (RESULT).
"""

import json
import os
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from tptrain.checkpoint.huggingface import load_pretrained
from tptrain.config import Config, UserError, read_config
from tptrain.config.load import write_atomically
from tptrain.config.schema import ParallelConfig
from tptrain.models.cut import Cut, cut_of
from tptrain.ops.table import REFERENCE
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import tp_grid
from tptrain.records.verification import RESULT
from tptrain.run.device import pick_device
from tptrain.run.rank import is_lost_rank
from tptrain.run.rendezvous import connect_ranks, meet
from tptrain.train.trainer import DTYPES
from tptrain.verify.prove import Say, prove, write_reference
from tptrain.verify.reference import Reference
from tptrain.verify.step import Step, token_ids
from tptrain.watch.black_box import BlackBox
from tptrain.watch.supervisor import end_with


def fill(step: Step, config: Config, cut: Cut) -> None:
    """The weights at the start: the model's own, or random ones."""
    if config.verify.weights == "model":
        load_pretrained(config.model, step.model, step.optimizer.state.fill, source=cut.source)
    else:
        step.draw()


def reference(config: Config, folder: Path) -> None:
    """Run the step on one rank, by PyTorch alone."""
    cut = cut_of(config)
    config = replace(config, parallel=ParallelConfig(zero=0), train=replace(config.train, recompute="none"))
    device = pick_device(config, 0, 1)
    tokens = token_ids(cut, config.train.global_batch_size, config.train.seed)
    if config.model.engine == "transformers":
        from tptrain.hf.width import blamed_on_width
        from tptrain.verify.transformers import PlainStep

        with blamed_on_width(config.verify.width, config.model.name):
            write_reference(PlainStep(cut, config, device), tokens, Reference(folder), _say("one rank"))
        return
    mesh = connect(tp_grid(1, 1, cut.spec.kv_heads), device)
    step = Step(cut, config, mesh, replace(REFERENCE, device=device.type))
    fill(step, config, cut)
    write_reference(step, tokens, Reference(folder), _say("one rank"))


def ranks(config: Config, folder: Path) -> None:
    """Run the step as one of the ranks, and compare."""
    cut, box = cut_of(config), BlackBox()
    rendezvous = meet(config, box)
    mesh = connect_ranks(config, box, rendezvous)
    if config.model.engine == "transformers":
        from tptrain.verify.transformers import TransformersStep

        step = TransformersStep(cut, config, mesh, rendezvous.ops)
    else:
        step = Step(cut, config, mesh, rendezvous.ops)
        fill(step, config, cut)
    tokens = token_ids(cut, config.train.global_batch_size, config.train.seed)
    say = _say(f"{mesh.world} ranks") if mesh.is_main else lambda _: None
    comparisons = prove(step, tokens, Reference(folder), mesh, DTYPES[config.train.precision], say)
    if mesh.is_main:
        facts = {"device": _device_name(mesh.device), "torch": torch.__version__, "kernels": rendezvous.ops.backend}
        facts["items"] = [asdict(replace(each, module=cut.source(each.module))) for each in comparisons]
        write_atomically(folder / RESULT, json.dumps(facts))
    dist.destroy_process_group()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _say(who: str) -> Say:
    return lambda what: print(f"{who}: {what}", flush=True)


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches `verify` too, which ends its ranks
    end_with(os.getppid(), signal.SIGKILL)
    folder = Path(arguments[0])
    config = read_config(folder / "config.yaml")
    try:
        (reference if arguments[1] == "reference" else ranks)(config, folder)
    except UserError as error:
        if os.environ["RANK"] == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        return 1  # the other one says why
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
