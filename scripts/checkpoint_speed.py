"""How fast a checkpoint is written and read on this disk: `python scripts/checkpoint_speed.py FOLDER [MODEL]`.

One rank, model gpt2 unless told: 1.5 GB of weights and moments. The stall is how long `Saver.save` holds training up;
the whole save is the time to the commit marker, and what a save in the foreground would cost. `dd` writes as many zeros
to the same folder, to the disk (conv=fdatasync).
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from tptrain.checkpoint import Saver, load_newest, step_folder
from tptrain.config import load_config
from tptrain.config.sizes import checkpoint_bytes
from tptrain.mesh import make_mesh
from tptrain.model import Decoder
from tptrain.optim import Optimizer

ROUNDS = 3


def main(folder: Path, model: str) -> None:
    config = load_config([f"model={model}", f"run.dir={folder}", "checkpoint.keep=1"])
    mesh = make_mesh(1, 1, torch.device("cpu"))
    optimizer = Optimizer(Decoder(config.model, mesh), config.optim, mesh, torch.float32, zero=False)
    for bucket in optimizer.buckets:
        for tensor in (bucket.master.data, *(t for t in optimizer.adamw.state[bucket.master].values() if t.dim())):
            tensor.normal_()  # zeros would be written faster on some file systems
    saver, size = Saver(folder, optimizer, config, "data", mesh), checkpoint_bytes(config.model)
    stalls, saves, loads, disks = [], [], [], []
    for step in range(1, ROUNDS + 2):
        began = time.perf_counter()
        saver.save(step)
        stall = time.perf_counter() - began
        saver.finish()
        whole = time.perf_counter() - began
        began = time.perf_counter()
        assert load_newest(folder, optimizer, mesh, print)
        load = time.perf_counter() - began
        zeros = folder / "zeros"
        began = time.perf_counter()
        dd = ["dd", "if=/dev/zero", f"of={zeros}", "bs=4M", f"count={size // 2**22}", "conv=fdatasync", "status=none"]
        subprocess.run(dd, check=True)
        disk = time.perf_counter() - began
        zeros.unlink()
        if step > 1:  # the first one makes its buffers
            for values, value in ((stalls, stall), (saves, whole), (loads, load), (disks, disk)):
                values.append(value)
    shutil.rmtree(step_folder(folder, ROUNDS + 1))
    stall, whole, load, disk = (median(values) for values in (stalls, saves, loads, disks))
    print(f"{model}: {size / 1e9:.2f} GB; medians of {ROUNDS} rounds")
    print(f"stall  {stall:7.3f} s, {stall / whole:.1%} of a whole save")
    print(f"save   {whole:7.3f} s, {size / whole / 1e6:,.0f} MB/s, {disk / whole:.0%} of dd's rate")
    print(f"load   {load:7.3f} s, {size / load / 1e6:,.0f} MB/s, checksums verified")
    print(f"dd     {disk:7.3f} s, {size / disk / 1e6:,.0f} MB/s")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    main(place, sys.argv[2] if len(sys.argv) > 2 else "gpt2")
