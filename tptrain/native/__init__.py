"""Kernels of our own for a CPU with AVX-512, in C: compiled on the machine that trains, in about a second, once."""

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

FLAGS = ("-O3", "-march=skylake-avx512", "-fno-math-errno", "-fno-strict-aliasing", "-fopenmp", "-shared", "-fPIC")
DTYPES = (torch.float32, torch.bfloat16)


class _Loaded:
    library: ctypes.CDLL | None = None  # once `compile_kernels` has made it


def serves(x: Tensor, *others: Tensor) -> bool:
    """Whether there are kernels for such tensors, which are to be of one type."""
    if _Loaded.library is None or x.device.type != "cpu" or x.dtype not in DTYPES:
        return False
    return all(other.dtype == x.dtype for other in others)


def run(name: str, *arguments: int | float | Tensor | None) -> int:
    """A kernel, in as many threads as PyTorch's; returns what it does. The tensors must be contiguous."""
    kernel = getattr(_Loaded.library, name)
    if kernel.argtypes is None:
        kernel.argtypes = [ctypes.c_long, *(_kind(each) for each in arguments)]
    values = (each.data_ptr() if isinstance(each, Tensor) else each for each in arguments)
    return kernel(torch.get_num_threads(), *values)


def _kind(argument: int | float | Tensor | None) -> type:
    if isinstance(argument, float):
        return ctypes.c_double
    return ctypes.c_long if isinstance(argument, int) else ctypes.c_void_p


def compile_kernels(folder: Path | None) -> None:
    """Use the kernels from now on, or none of them; compiled into `folder`, for all runs, if they are not there yet.

    PyTorch's remain where there is no AVX-512 or no C compiler.
    """
    _Loaded.library = None
    compiler = shutil.which("gcc") or shutil.which("cc")
    if folder is None or torch.backends.cpu.get_cpu_capability() != "AVX512" or compiler is None:
        return
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    text = " ".join(FLAGS).encode() + b"".join(source.read_bytes() for source in sources)
    library = folder / f"kernels-{hashlib.blake2b(text, digest_size=8).hexdigest()}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder) as place:  # ranks and runs may do this at once
                made = Path(place) / library.name
                units = [str(source) for source in sources if source.suffix == ".c"]
                command = [compiler, *FLAGS, *units, "-o", str(made), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                made.replace(library)
        _Loaded.library = ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError):
        return
