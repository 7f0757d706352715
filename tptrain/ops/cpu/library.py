"""Kernels of our own for a CPU with AVX-512 or AVX2, in C: compiled on the machine that trains, in seconds, once."""

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

FLAGS = ("-O3", "-fno-math-errno", "-fno-strict-aliasing", "-fopenmp", "-shared", "-fPIC")
PROCESSORS = {"AVX512": "-march=skylake-avx512", "AVX2": "-march=haswell"}  # by torch's names
DTYPES = (torch.float32, torch.bfloat16)


class Library:
    """The compiled kernels."""

    def __init__(self, path: Path, digest: str) -> None:
        self.functions, self.digest = ctypes.CDLL(str(path)), digest

    def run(self, name: str, *arguments: int | float | Tensor | None) -> int:
        """A kernel, in as many threads as PyTorch's; returns what it does. Tensors must be contiguous, on the cpu."""
        kernel = getattr(self.functions, name)
        if kernel.argtypes is None:
            kernel.argtypes = [ctypes.c_long, *(_kind(each) for each in arguments)]
        values = (each.data_ptr() if isinstance(each, Tensor) else each for each in arguments)
        return kernel(torch.get_num_threads(), *values)


def _kind(argument: int | float | Tensor | None) -> type:
    if isinstance(argument, float):
        return ctypes.c_double
    return ctypes.c_long if isinstance(argument, int) else ctypes.c_void_p


def load(folder: Path) -> Library | None:
    """The kernels, compiled into `folder` unless they are there; None on another CPU or without a C compiler."""
    compiler, processor = shutil.which("gcc") or shutil.which("cc"), torch.backends.cpu.get_cpu_capability()
    if processor not in PROCESSORS or compiler is None:
        return None
    flags = (*FLAGS, PROCESSORS[processor])
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    text = " ".join(flags).encode() + b"".join(source.read_bytes() for source in sources)
    digest = hashlib.blake2b(text, digest_size=8).hexdigest()
    library = folder / f"kernels-{digest}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder) as place:  # ranks and runs may do this at once
                fresh = Path(place) / library.name
                units = [str(source) for source in sources if source.suffix == ".c"]
                command = [compiler, *flags, *units, "-o", str(fresh), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                fresh.replace(library)
        return Library(library, digest)
    except (OSError, subprocess.SubprocessError):
        return None
