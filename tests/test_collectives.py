"""What travels between the ranks: in which order the backward pass starts it, and that shared memory carries it right.

How much is sent is held to the closed form in test_plan.py.
"""

import gc
import os
import signal
import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import mesh, run_ranks
from tptrain import shared_memory
from tptrain.collectives import GATHER, SCATTER, all_gather, all_reduce, all_reduce_, reduce_scatter, summand
from tptrain.config.schema import ModelConfig, OptimConfig
from tptrain.linear import ColumnLinear, column_parallel
from tptrain.loss import cross_entropy_backward
from tptrain.model import Decoder
from tptrain.optim import Optimizer


def _watched(events: list[str], name: str, right: Any) -> Any:
    """A patch that notes the call of a collective and what waits for it."""

    def call(*arguments: Any, **options: Any) -> Any:
        events.append(name)
        work = right(*arguments, **options)

        class Work:
            def wait(self) -> None:
                events.append(f"wait for {name}")
                if work is not None:
                    work.wait()

        return Work()

    return patch.object(dist, right.__name__, call)


def _order(sequence_parallel: bool) -> list[str]:
    """What the backward of two column-parallel linears of one input does, in order."""
    grid = mesh(2, sequence_parallel=sequence_parallel)
    module = nn.Module()
    module.linears = nn.ModuleList(ColumnLinear(grid, 8, 12, std=1.0) for _ in range(2))
    Optimizer(module, OptimConfig(), grid, torch.float32, zero=False)
    x = torch.randn(4, 8, requires_grad=True)
    y = column_parallel(x, grid, *module.linears)  # type: ignore[arg-type]
    events: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in ("mm", "addmm_"):
                tokens = len((kwargs or {}).get("out", args[0])) == len(y)
                events.append("input gradient" if tokens else "weight gradient")
            return func(*args, **(kwargs or {}))

    with (
        _watched(events, "reduce", dist.all_reduce),
        _watched(events, "gather", getattr(dist, GATHER)),
        _watched(events, "scatter", getattr(dist, SCATTER)),
        Watch(),
    ):
        y.sum().backward()
    return events


def _order_of_halves() -> list[str]:
    """What the forward of a decoder of one layer does with `parallel.overlap`, in order."""
    grid, events = mesh(2), []
    config = ModelConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=8)
    model = Decoder(config, grid, overlap=True)
    Optimizer(model, OptimConfig(), grid, torch.float32, zero=False)
    with _watched(events, "reduce", dist.all_reduce):
        model(torch.zeros(2, 4, dtype=torch.long))
    return events


def _orders() -> list[list[str]]:
    return [_order(False), _order(True), _order_of_halves()]


def test_one_halfs_sum_travels_while_the_other_computes() -> None:
    _, _, events = run_ranks(2, _orders)[0]
    embedding, attention, ffn = events[:2], events[2:4], events[4:8]
    assert embedding == ["reduce", "wait for reduce"]
    assert attention == ["reduce", "reduce"]
    assert ffn == ["wait for reduce", "reduce"] * 2, "each half computes after its own sum, before the other's"
    assert events[8:] == ["wait for reduce"] * 2


def test_weight_gradients_are_computed_while_the_input_gradient_travels() -> None:
    plain, sequence_parallel, _ = run_ranks(2, _orders)[0]
    assert plain == ["input gradient", "reduce", "weight gradient", "wait for reduce"]
    assert sequence_parallel == [
        "gather",  # the input's tokens, while the input gradient is computed
        "input gradient",
        "wait for gather",
        "scatter",
        "weight gradient",
        "wait for scatter",
    ]


# --------------------------------------------------------------------------------------------------------------- memory


def _in_cycles() -> list[tuple[bool, bool, bool, int]]:
    """Tensors of a forward and backward pass that are left to Python's search for cycles, for each kind of pass."""
    found = []
    config = ModelConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=8)
    for shared, sequence_parallel, overlap in [
        (True, False, False),
        (True, True, False),
        (True, False, True),
        (False, False, False),
    ]:
        grid = mesh(2, shared=shared, sequence_parallel=sequence_parallel)
        model = Decoder(config, grid, overlap=overlap)
        optimizer = Optimizer(model, OptimConfig(), grid, torch.float32, zero=False)
        optimizer.zero_grad()
        gc.collect()
        gc.disable()
        tokens = torch.zeros(2, 4, dtype=torch.long)
        x = model(tokens)
        _, grad = cross_entropy_backward(x, model.lm_head.weight, tokens.flatten(), 8, grid, 1.0)
        x.backward(grad)
        optimizer.norm()
        del x, grad
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found.append((shared, sequence_parallel, overlap, sum(isinstance(each, torch.Tensor) for each in gc.garbage)))
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    return found


def test_no_tensor_outlives_its_last_use() -> None:
    """One in a cycle of references would stay until Python looks for cycles, many steps later."""
    for *passing, left in run_ranks(2, _in_cycles)[0]:
        assert left == 0, passing


# -------------------------------------------------------------------------------------------------------- shared memory


@patch.object(shared_memory, "SLOT_BYTES", 2**20)
def _compared() -> list[str]:
    """Where an operation through shared memory is not what gloo does, at sizes around every limit."""
    gloo, shared = mesh(dist.get_world_size()).tp_group, mesh(dist.get_world_size(), shared=True).tp_group
    assert gloo is not None
    assert shared is not None
    assert shared.shared is not None
    wrong, size = [], dist.get_world_size()
    generator = torch.Generator().manual_seed(dist.get_rank())
    for numbers in (size, 1000 * size, 20_000 * size, 300_000 * size):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            x = (torch.randn(numbers, generator=generator) * 100).to(dtype)
            pairs = {"gather": [all_gather(x, group)[0] for group in (gloo, shared)]}
            for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
                pairs[str(op)] = [x.clone(), x.clone()]
                for y, group in zip(pairs[str(op)], (gloo, shared), strict=True):
                    all_reduce_(y, group, op)
            pairs["scatter"] = [reduce_scatter(x, group)[0] for group in (gloo, shared)]
            y, z = x.clone(), x.clone()
            first, second = (all_reduce_(each, shared, async_op=True) for each in (y, z))  # one after another
            second.wait()
            first.wait()
            part = summand(tuple(x.shape), x, shared)
            pairs["summand"] = [pairs[str(dist.ReduceOp.SUM)][1], all_reduce(part.copy_(x), shared).value()]
            part = summand(tuple(x.shape), x, shared)
            pairs["summand, scattered"] = [pairs["scatter"][1], reduce_scatter(part.copy_(x), shared)[0].clone()]
            pairs["background"] = [y, pairs[str(dist.ReduceOp.SUM)][1]]
            pairs["background, second"] = [z, y]
            for name, (theirs, ours) in pairs.items():
                rounding = {torch.bfloat16: 2e-2, torch.float32: 1e-6}.get(dtype, 0.0)
                if not torch.allclose(theirs.float(), ours.float(), rtol=rounding, atol=rounding * 200):
                    wrong.append(f"{name} of {numbers} {dtype}")
            everyone = [torch.empty_like(y) for _ in range(size)]
            dist.all_gather(everyone, y)
            if any(not torch.equal(other, y) for other in everyone):
                wrong.append(f"bits of {numbers} {dtype} differ between ranks")
    return wrong


@pytest.mark.parametrize("world", [2, 3, 4])
def test_shared_memory_does_what_gloo_does(world: int) -> None:
    assert run_ranks(world, _compared) == [[]] * world


def _begin(value: float, group: Any) -> Any:
    return all_reduce(summand((1000,), torch.empty(0), group).fill_(value), group)


def _read_late() -> list[list[float]]:
    group = mesh(2, shared=True).tp_group
    first, second = _begin(1.0, group), _begin(2.0, group)
    if dist.get_rank() == 1:
        time.sleep(0.5)  # the other reads both and begins a third, in the memory of the first
    sums = [first.value(), second.value(), _begin(3.0, group).value()]
    return [each.unique().tolist() for each in sums]


def test_a_sum_may_be_read_when_the_next_has_begun() -> None:
    assert run_ranks(2, _read_late) == [[[2.0], [4.0], [6.0]]] * 2


def _uneven() -> str:
    group = mesh(2, shared=True).tp_group
    try:
        all_reduce_(torch.zeros(5 + dist.get_rank()), group)
    except dist.DistBackendError as error:
        return str(error)
    return ""


def test_another_size_is_an_error_and_not_a_wrong_sum() -> None:
    assert all("one rank sent" in said for said in run_ranks(2, _uneven))


def _orphaned() -> str:
    group = mesh(2, shared=True).tp_group
    assert group is not None
    assert group.shared is not None
    child = os.fork() if dist.get_rank() == 0 else 0
    if child:  # another process that will be gone
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        group.shared.headers[1].pid = child
        try:
            all_reduce_(torch.zeros(5), group)
        except dist.DistBackendError as error:
            return str(error)
    elif dist.get_rank() == 0:
        time.sleep(60)
    return "is gone"


def test_a_dead_peer_is_an_error_and_not_a_hang() -> None:
    assert all("is gone" in said for said in run_ranks(2, _orphaned))


def _busy_while_waiting() -> float:
    """Of its waiting for the other rank, the share that a rank spends on its core."""
    group = mesh(2, shared=True).tp_group
    all_reduce_(torch.zeros(5), group)
    if dist.get_rank() == 1:
        time.sleep(1)
    wall, busy = time.perf_counter(), time.process_time()
    all_reduce_(torch.zeros(5), group)
    return (time.process_time() - busy) / (time.perf_counter() - wall)


def test_a_rank_that_waits_leaves_its_core_to_others() -> None:
    assert run_ranks(2, _busy_while_waiting)[0] < 0.5
