"""Which operations a run computes with, and would compute with."""

import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tptrain.config import Config, UserError
from tptrain.ops.compiled import compile_table
from tptrain.ops.cpu.kernels import kernel_table
from tptrain.ops.cpu.library import load
from tptrain.ops.table import REFERENCE, Operations

COMPILERS = {"cuda": ("cc", "gcc", "clang"), "cpu": ("c++", "g++", "clang++")}  # that torch.compile needs, one of them


def choose(device: str, compile_setting: str, folder: Path) -> Operations:
    """The table for `train.compile` on a kind of device; C kernels are compiled into `folder`, once for all runs.

    On a CPU with AVX-512 or AVX2 and a C compiler the kernels in C come first, under `auto` and `elementwise`. Raises
    UserError where `elementwise` was asked for and this node has no compiler; under `auto` it does without.
    """
    table = replace(REFERENCE, device=device)
    if compile_setting == "elementwise" or (compile_setting == "auto" and device == "cuda"):
        if any(map(shutil.which, COMPILERS[device])):
            table = compile_table(table)
        elif compile_setting == "auto":
            table = replace(table, backend=f"{table.backend}: torch.compile finds no C compiler")
        else:
            raise UserError(
                f"train.compile=elementwise: {socket.gethostname()} has none of {', '.join(COMPILERS[device])}. "
                "Install one there, or use train.compile=none."
            )
    if device == "cpu" and compile_setting != "none" and (library := load(folder)) is not None:
        table = kernel_table(library, table)
    return table


def common(own: Operations, nodes: Sequence[tuple[str, str]]) -> Operations:
    """The table for ranks that compute together, each with the same operations; PyTorch's where theirs differ, as they
    do where a node has no compiler. `nodes`: of each rank, with the backend of its own table.
    """
    by_backend = {backend: node for node, backend in reversed(nodes)}
    if len(by_backend) == 1:
        return own
    (a, on_a), (b, on_b), *_ = reversed(by_backend.items())
    return replace(REFERENCE, device=own.device, backend=f"PyTorch: alone {on_a} would take {a}, and {on_b} {b}")


def planned(config: Config) -> Operations:
    """The table of a run that does not run here: on a GPU unless `train.device=cpu`, on a CPU with the kernels in C."""
    device = "cpu" if config.train.device == "cpu" else "cuda"
    if config.train.compile == "none":
        return replace(REFERENCE, device=device)
    return Operations("torch.compile" if device == "cuda" else "C kernels", device)
