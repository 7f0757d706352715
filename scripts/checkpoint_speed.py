"""How fast a checkpoint is written and read on this disk: `python scripts/checkpoint_speed.py FOLDER [MODEL]`.

One rank, model gpt2 unless told: 1.5 GB of weights and moments. The stall is how long a save holds training up: what
`Saver.save` takes, and then the wait for the copy of the state before the weights may change, after a forward and
backward pass as short as there is (a micro-batch of one sequence of 256 tokens). That pass is timed with and without a
save beside it. The whole save is the time to the commit marker with nothing beside it, which is what one in the
foreground would cost. `dd` writes as many zeros to the same folder, to the disk (conv=fdatasync).
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tptrain.checkpoint.load import load_newest
from tptrain.checkpoint.save import Saver
from tptrain.config import load_config
from tptrain.models.cost import CHECKPOINT_BYTES
from tptrain.models.sizes import sizes
from tptrain.nn.decoder import parameter_count
from tptrain.ops.choose import choose
from tptrain.ops.node_cache import node_cache
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import tp_grid
from tptrain.records.run_dir import step_folder
from tptrain.train.schedule import plain
from tptrain.train.trainer import build, initialise

ROUNDS = 5


def main(folder: Path, model: str) -> None:
    data = ["data=stdlib", "data.tokenizer=bytes"]
    small = ["train.micro_batch_size=1", "train.global_batch_size=1", "train.seq_len=256"]
    config = load_config([f"model={model}", f"run.dir={folder}", "checkpoint.keep=1", *data, *small])
    mesh = connect(tp_grid(1, 1, 1), torch.device("cpu"))
    trainer = build(config, mesh, choose("cpu", config.train.compile, node_cache()))
    initialise(trainer)
    for block in trainer.optimizer.state.blocks:
        for tensor in block.moments.values():
            tensor.normal_()  # zeros would be written faster on some file systems
    saver = Saver(folder, trainer.optimizer, config, "data", mesh)
    size = CHECKPOINT_BYTES * parameter_count(sizes(config.model))
    batch, actions = trainer.to_device(trainer.data.samples(0, 1)), plain(1, trainer.runner.units)
    taken: dict[str, list[float]] = {name: [] for name in ("call", "pass", "beside", "wait", "save", "load", "dd")}

    def timed(name: str, work: Callable[[], Any]) -> None:
        began = time.perf_counter()
        work()
        taken[name].append(time.perf_counter() - began)

    def disk() -> None:
        dd = ["dd", "if=/dev/zero", f"of={folder / 'zeros'}", "bs=4M", f"count={size // 2**22}", "conv=fdatasync"]
        subprocess.run([*dd, "status=none"], check=True)

    for step in range(1, ROUNDS + 2):
        timed("pass", lambda: trainer.runner.run(actions, lambda _: batch, 1.0))
        timed("call", partial(saver.save, 2 * step))
        timed("beside", lambda: trainer.runner.run(actions, lambda _: batch, 1.0))
        timed("wait", saver.wait_for_copy)
        saver.finish()
        timed("save", lambda step=step: (saver.save(2 * step + 1), saver.finish()))
        timed("load", lambda: load_newest(folder, trainer.optimizer, mesh, print))
        timed("dd", disk)
        (folder / "zeros").unlink()
    shutil.rmtree(step_folder(folder, 2 * ROUNDS + 3))
    # The first round makes the buffers.
    call, alone, beside, wait, save, load, dd = (median(seconds[1:]) for seconds in taken.values())
    print(f"{model}: {size / 1e9:.2f} GB; medians of {ROUNDS} rounds")
    print(f"stall  {call + wait:7.3f} s, {(call + wait) / save:.1%} of a whole save")
    print(f"pass   {beside:7.3f} s beside the save, {alone:.3f} s without it")
    print(f"save   {save:7.3f} s, {size / save / 1e6:,.0f} MB/s, {dd / save:.0%} of dd's rate")
    print(f"load   {load:7.3f} s, {size / load / 1e6:,.0f} MB/s, checksums verified")
    print(f"dd     {dd:7.3f} s, {size / dd / 1e6:,.0f} MB/s")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    main(place, sys.argv[2] if len(sys.argv) > 2 else "gpt2")
