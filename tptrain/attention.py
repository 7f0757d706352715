"""Causal attention of this rank's heads: PyTorch's fused kernels, and on a CPU with AVX-512 our own (attention.c).

Shapes: B batch, T sequence, H query heads, K KV heads, G = H / K queries that share a KV head, d head_dim, of one rank.
"""

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FLAGS = ("-O3", "-march=skylake-avx512", "-fno-math-errno", "-fno-strict-aliasing", "-fopenmp", "-shared", "-fPIC")


class _Kernels:
    """attention.c, once `compile_kernels` has made a library of it."""

    library: ctypes.CDLL | None = None


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v with the causal mask: q (B, T, H, d), k and v (B, T, K, d) -> (B, T, H, d)."""
    if q.device.type == "cpu" and _Kernels.library is not None:
        return _Attention.apply(q, k, v)  # type: ignore[return-value]
    return _sdpa(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, d), 2 x (B, K, T, d)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Our kernels, but for the forward pass in bf16, where PyTorch's uses a CPU's matrix units. PyTorch's others take
    1.6 times as long (docs/performance.md).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (x.contiguous() for x in (q, k, v))
        ctx.save_for_backward(q, k, v)
        if q.dtype != torch.float32:
            return _sdpa(q, k, v)
        y = torch.empty_like(q)  # (B, T, H, d)
        _run("attention_forward", _sizes(q, k), q, k, v, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        _run("attention_backward", (*_sizes(q, k), q.dtype == torch.bfloat16), q, k, v, grad.contiguous(), *grads)
        return grads


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return q.shape[1], k.shape[2], q.shape[2] // k.shape[2], q.shape[3]  # T, K, G, d


def _run(name: str, sizes: tuple[int, ...], *tensors: Tensor) -> None:
    """A kernel over all B * K problems, in as many threads as PyTorch's. Raises MemoryError."""
    problems = tensors[1].shape[0] * tensors[1].shape[2]
    numbers = [ctypes.c_long(size) for size in (torch.get_num_threads(), problems, *sizes)]
    if getattr(_Kernels.library, name)(*numbers, *(ctypes.c_void_p(x.data_ptr()) for x in tensors)):
        raise MemoryError(name)


def compile_kernels(folder: Path) -> None:
    """Use attention.c on a CPU from now on; compiled into `folder`, for all runs, if it is not there yet.

    PyTorch's kernels remain where there is no AVX-512 or no C compiler.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or compiler is None:
        return
    source = Path(__file__).with_suffix(".c")
    digest = hashlib.blake2b(source.read_bytes() + " ".join(FLAGS).encode(), digest_size=8).hexdigest()
    library = folder / f"attention-{digest}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder) as place:  # ranks and runs may do this at once
                made = Path(place) / library.name
                command = [compiler, *FLAGS, str(source), "-o", str(made), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                made.replace(library)
        _Kernels.library = ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError):
        return
