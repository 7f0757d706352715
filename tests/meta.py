"""A rank of any grid on torch's meta device: full shapes, no memory, no processes. Collectives are noted, not done."""

import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tptrain import collectives, fused, linear, loss, optim
from tptrain.config import Config, ModelConfig
from tptrain.config.schema import kv_heads
from tptrain.loss import cross_entropy_backward
from tptrain.mesh import Mesh
from tptrain.model import Decoder
from tptrain.optim import Optimizer
from tptrain.train import DTYPES


class _Group:
    """The name and size of an axis, without processes."""

    def __init__(self, axis: str, size: int) -> None:
        self.axis, self.ranks, self.shared = axis, range(size), None


def meta_mesh(model: ModelConfig, tp: int, dp: int = 1, sequence_parallel: bool = False) -> Mesh:
    """The last rank of a grid: it has the padding of the vocabulary."""
    replicas = max(1, tp // kv_heads(model))
    known: dict[str, Any] = dict.fromkeys(item.name for item in fields(Mesh))
    known |= {"rank": tp * dp - 1, "world": tp * dp, "tp": tp, "device": torch.device("meta"), "kv_replicas": replicas}
    sizes = {"tp": tp, "dp": dp, "kv": replicas}
    known |= {f"{axis}_group": _Group(axis, size) for axis, size in sizes.items() if size > 1}
    known["world_group"] = _Group("world", tp * dp) if tp > 1 and dp > 1 else known["tp_group"] or known["dp_group"]
    box = type("Box", (), {"touch": lambda self: None})()
    return Mesh(**known | {"sequence_parallel": sequence_parallel and tp > 1, "box": box})


class Sent(ExitStack):
    """Collectives are noted instead of done: (operation, axis, bytes) and how often."""

    def __enter__(self) -> "Sent":
        self.calls: Counter[tuple[str, str, int]] = Counter()
        done = type("Done", (), {"wait": lambda self: None})()

        def all_reduce_(x: Tensor, group: _Group | None, *args: Any, **options: Any) -> Any:
            if group is not None:
                self.calls["all_reduce", group.axis, x.nbytes] += 1
            return done

        def all_reduce(x: Tensor, group: _Group | None) -> Any:
            return collectives.Sum(x, all_reduce_(x, group))

        def all_gather(x: Tensor, group: _Group | None, async_op: bool = False, out: Tensor | None = None) -> Any:
            if group is None:
                return x, done
            out = x.new_empty(len(group.ranks) * len(x), *x.shape[1:]) if out is None else out
            self.calls["all_gather", group.axis, out.nbytes] += 1
            return out, done

        def reduce_scatter(x: Tensor, group: _Group, async_op: bool = False, out: Tensor | None = None) -> Any:
            self.calls["reduce_scatter", group.axis, x.nbytes] += 1
            return x.new_empty(len(x) // len(group.ranks), *x.shape[1:]) if out is None else out, done

        for function in (all_reduce_, all_reduce, all_gather, reduce_scatter):
            for module in (collectives, linear, loss, optim):
                if hasattr(module, function.__name__):
                    self.enter_context(patch.object(module, function.__name__, function))
        return self


def _sdpa(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """CUDA's choice of a kernel: fused, except for grouped queries in float32."""

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
        if q.dtype == torch.float32 and enable_gqa:
            return right(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)  # on the meta device: unfused
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]

    return attention


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made under it and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(made) if isinstance(t, Tensor)):
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return made

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


@dataclass
class Measured:
    state: int  # weights, gradients, masters, moments
    saved: int  # by autograd, for the backward pass of one micro-batch; weights not counted
    peak: int  # of forward and backward, state included


def _fused_kernels(stack: ExitStack) -> None:
    """As compiled ones, they make nothing but their results."""
    for name, made in {
        "rms_norm": lambda x, weight, eps: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)),
        "add_rms_norm": lambda x, y, other, weight, eps: (
            torch.empty_like(x),
            torch.empty_like(x),
            x.new_empty(*x.shape[:-1], 1, dtype=torch.float32),
        ),
        "_rotate_qkv": lambda qkv, cos, sin, heads: tuple(
            qkv.new_empty(*qkv.shape[:2], count, qkv.shape[3]) for count in heads
        ),
        "rms_norm_backward": lambda grad, x, weight, *_: (torch.empty_like(x), weight.float()),
        "add_rms_norm_backward": lambda total, grad, x, weight, *_: (torch.empty_like(x), weight.float()),
        "_rotate_qkv_backward": lambda q, k, v, cos, sin: q.new_empty(
            *q.shape[:2], q.shape[2] + 2 * k.shape[2], q.shape[3]
        ),
        "_gated_backward": lambda grad, x, act: torch.empty_like(x),
        "gate_product": lambda x, act: x.new_empty(len(x), x.shape[1] // 2),
        "_rotate": lambda x, cos, sin: torch.empty(x.shape, dtype=x.dtype, device="meta"),
        "_statistics": lambda logits, local: (torch.empty(len(logits), device="meta") for _ in range(3)),
        "_scaled_softmax": lambda logits, lse, scale: torch.empty_like(logits),
    }.items():
        stack.enter_context(patch.object(fused, name, fused._Fusible(made)))


def measure(config: Config, tp: int, dp: int) -> Measured:
    model, train = config.model, config.train
    mesh = meta_mesh(model, tp, dp, config.parallel.sequence_parallel)
    tokens = torch.zeros(train.micro_batch_size, train.seq_len, dtype=torch.long, device="meta")
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with Sent() as stack:
        sdpa = _sdpa(F.scaled_dot_product_attention)
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", sdpa))
        _fused_kernels(stack)
        live = stack.enter_context(LiveBytes())
        decoder = Decoder(model, mesh, train.recompute, config.parallel.overlap)
        optimizer = Optimizer(decoder, config.optim, mesh, DTYPES[train.precision], config.parallel.zero == 1)
        state = live.now
        with saved_tensors_hooks(note, lambda t: t):
            x = decoder(tokens)
        head = decoder.lm_head.weight
        _, grad = cross_entropy_backward(x.detach(), head, tokens.flatten(), model.vocab_size, mesh, 1.0)
        kept = [bucket.weights.untyped_storage()._cdata for bucket in optimizer.buckets]
        kept += [t.untyped_storage()._cdata for t in decoder._rotations.values()]  # made once, not for each micro-batch
        x.backward(grad)
    return Measured(state, sum(size for key, size in saved.items() if key not in kept), live.peak)
