"""Which operations a run computes with, and would compute with."""

from dataclasses import replace
from pathlib import Path

from tptrain.config import Config
from tptrain.ops.compiled import compile_table
from tptrain.ops.cpu.kernels import kernel_table
from tptrain.ops.cpu.library import load
from tptrain.ops.table import REFERENCE, Operations


def choose(device: str, compile_setting: str, folder: Path) -> Operations:
    """The table for `train.compile` on a kind of device; C kernels are compiled into `folder`, once for all runs.

    On a CPU with AVX-512 or AVX2 and a C compiler the kernels in C come first, under `auto` and `elementwise`.
    """
    table = replace(REFERENCE, device=device)
    if compile_setting == "elementwise" or (compile_setting == "auto" and device == "cuda"):
        table = compile_table(table)
    if device == "cpu" and compile_setting != "none" and (library := load(folder)) is not None:
        table = kernel_table(library, table)
    return table


def planned(config: Config) -> Operations:
    """The table of a run that does not run here: on a GPU unless `train.device=cpu`, on a CPU with the kernels in C."""
    device = "cpu" if config.train.device == "cpu" else "cuda"
    if config.train.compile == "none":
        return replace(REFERENCE, device=device)
    return Operations("torch.compile" if device == "cuda" else "C kernels", device)
