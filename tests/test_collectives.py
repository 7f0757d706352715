"""What travels between the ranks: in which order the backward pass starts it, and that shared memory carries it right.

How much is sent is held to the closed form in test_plan.py.
"""

import gc
import os
import signal
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import mesh, run_ranks
from tests.models import training
from tptrain.config.schema import Config, ModelConfig, OptimConfig
from tptrain.nn.linear import ColumnLinear, Joined
from tptrain.nn.store import Store
from tptrain.ops.table import REFERENCE
from tptrain.optim.adamw import Optimizer
from tptrain.parallel import shared_memory
from tptrain.parallel.collectives import all_gather, all_reduce, all_reduce_, buffer, reduce_scatter
from tptrain.parallel.communicators import GATHER, SCATTER, ProcessGroup
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import tp_grid
from tptrain.parallel.process_groups import own_group
from tptrain.parallel.shared_memory import SharedMemory
from tptrain.run.preflight import Meeting, Report
from tptrain.run.rendezvous import Rendezvous, connect_ranks
from tptrain.train.schedule import overlapped, plain
from tptrain.watch.black_box import BlackBox


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
    linears = [ColumnLinear(grid, 8, 12, std=1.0) for _ in range(2)]
    module.linears, joined = nn.ModuleList(linears), Joined(*linears)
    module.joined = joined.runs  # type: ignore[assignment]
    Optimizer(Store(module, torch.float32), OptimConfig(), grid, zero=False)
    x = torch.randn(4, 8, requires_grad=True)
    y = joined(x)
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
    tiny = training(config, grid)
    with _watched(events, "reduce", dist.all_reduce):
        tiny.backward(torch.zeros(2, 5, dtype=torch.long), 1.0, overlapped, 2)
    return events


def _orders() -> list[list[str]]:
    return [_order(False), _order(True), _order_of_halves()]


def test_one_halfs_sum_travels_while_the_other_computes() -> None:
    _, _, events = run_ranks(2, _orders)[0]
    embedding, attention, ffn = events[:4], events[4:6], events[6:10]
    assert embedding == ["reduce", "wait for reduce"] * 2
    assert attention == ["reduce", "reduce"]
    assert ffn == ["wait for reduce", "reduce"] * 2, "each half computes after its own sum, before the other's"
    assert events[10:12] == ["wait for reduce"] * 2


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
    totals = []
    config = ModelConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=8)
    for shared, sequence_parallel, overlap in [
        (True, False, False),
        (True, True, False),
        (True, False, True),
        (False, False, False),
    ]:
        grid = mesh(2, shared=shared, sequence_parallel=sequence_parallel)
        tiny = training(config, grid)
        tiny.optimizer.state.zero_grad()
        gc.collect()
        gc.disable()
        schedule, batches = (overlapped, 2) if overlap else (plain, 1)
        tiny.backward(torch.zeros(2, 5, dtype=torch.long), 1.0, schedule, batches)
        tiny.optimizer.reducer.finish()
        tiny.optimizer.reducer.norm_and_flags()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        totals.append((shared, sequence_parallel, overlap, sum(isinstance(each, torch.Tensor) for each in gc.garbage)))
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    return totals


def test_no_tensor_outlives_its_last_use() -> None:
    """One in a cycle of references would stay until Python looks for cycles, many steps later."""
    for *passing, left in run_ranks(2, _in_cycles)[0]:
        assert left == 0, passing


# -------------------------------------------------------------------------------------------------------- shared memory


@patch.object(shared_memory, "SLOT_BYTES", 2**20)
def _compared() -> list[str]:
    """Where an operation through shared memory is not what gloo does, at sizes around every limit."""
    world = dist.get_world_size()
    gloo, shared = (mesh(world, shared=shared).group("tp") for shared in (False, True))
    assert shared is not None
    assert isinstance(shared.communicator, SharedMemory)
    wrong, size = [], dist.get_world_size()
    generator = torch.Generator().manual_seed(dist.get_rank())
    for numbers in (size, 1000 * size, 20_000 * size, 300_000 * size):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            x = (torch.randn(numbers, generator=generator) * 100).to(dtype)
            pairs = {"gather": [done(all_gather(x, group)) for group in (gloo, shared)]}
            for op in ("sum", "max"):
                pairs[op] = [x.clone(), x.clone()]
                for y, group in zip(pairs[op], (gloo, shared), strict=True):
                    all_reduce_(y, group, op).wait()  # type: ignore[arg-type]
            pairs["scatter"] = [done(reduce_scatter(x, group)) for group in (gloo, shared)]
            y, z = x.clone(), x.clone()
            first, second = (all_reduce_(each, shared) for each in (y, z))  # one after another
            second.wait()
            first.wait()
            part = buffer(tuple(x.shape), x, shared)
            pairs["buffer"] = [pairs["sum"][1], done(all_reduce(part.copy_(x), shared))]
            part = buffer(tuple(x.shape), x, shared)
            pairs["buffer, scattered"] = [pairs["scatter"][1], done(reduce_scatter(part.copy_(x), shared))]
            pairs["background"] = [y, pairs["sum"][1]]
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


def done(begun: tuple[torch.Tensor, Any]) -> torch.Tensor:
    result, work = begun
    work.wait()
    return result


def _begin(value: float, group: Any) -> Any:
    return all_reduce(buffer((1000,), torch.empty(0), group).fill_(value), group)


def _read_late() -> list[list[float]]:
    group = mesh(2, shared=True).group("tp")
    sums = []
    for value in (1.0, 2.0):
        sums.append(_begin(value, group))
    if dist.get_rank() == 1:
        time.sleep(0.5)  # the other goes on, in the slots of the first
    sums += [_begin(value, group) for value in (3.0, 4.0, 5.0)]
    return [done(each).unique().tolist() for each in sums]


def test_a_sum_stays_what_it_is_while_others_follow() -> None:
    """A result that lay in a slot would be overwritten by the operation after the next."""
    assert run_ranks(2, _read_late) == [[[2.0], [4.0], [6.0], [8.0], [10.0]]] * 2


def _misused(others: int) -> str:
    """What is said of a buffer that is handed over after other operations."""
    group = mesh(2, shared=True).group("tp")
    late = buffer((1000,), torch.empty(0), group).fill_(1.0)
    for _ in range(others):
        all_reduce_(torch.ones(1000), group).wait()
    try:
        all_reduce(late, group)
    except AssertionError as error:
        return str(error)
    return "a wrong sum"


@pytest.mark.parametrize("others", [1, 2])
def test_a_buffer_of_another_operation_is_refused(others: int) -> None:
    assert run_ranks(2, _misused, others) == ["a buffer of another operation"] * 2


def _uneven() -> str:
    group = mesh(2, shared=True).group("tp")
    try:
        all_reduce_(torch.zeros(5 + dist.get_rank()), group).wait()
    except dist.DistBackendError as error:
        return str(error)
    return ""


def test_another_size_is_an_error_and_not_a_wrong_sum() -> None:
    assert all("one rank sent" in message for message in run_ranks(2, _uneven))


def _orphaned() -> str:
    group = mesh(2, shared=True).group("tp")
    assert group is not None
    assert isinstance(group.communicator, SharedMemory)
    child = os.fork() if dist.get_rank() == 0 else 0
    if child:  # another process that will be gone
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        group.communicator.headers[1].pid = child
        try:
            all_reduce_(torch.zeros(5), group).wait()
        except dist.DistBackendError as error:
            return str(error)
    elif dist.get_rank() == 0:
        time.sleep(60)
    return "is gone"


def test_a_dead_peer_is_an_error_and_not_a_hang() -> None:
    assert all("is gone" in message for message in run_ranks(2, _orphaned))


def _busy_while_waiting() -> float:
    """Of its waiting for the other rank, the share that a rank spends on its core."""
    group = mesh(2, shared=True).group("tp")
    all_reduce_(torch.zeros(5), group).wait()
    if dist.get_rank() == 1:
        time.sleep(1)
    wall, busy = time.perf_counter(), time.process_time()
    all_reduce_(torch.zeros(5), group).wait()
    return (time.process_time() - busy) / (time.perf_counter() - wall)


def test_a_rank_that_waits_leaves_its_core_to_others() -> None:
    assert run_ranks(2, _busy_while_waiting)[0] < 0.5


class _Default:
    """A stand-in for NCCL's default group: a device is bound to it, and its communicator can be split."""

    bound_device_id: torch.device | None = torch.device("cuda", 2)

    def _get_backend(self, device: torch.device) -> Any:
        return SimpleNamespace(supports_splitting=True)


def test_groups_are_split_off_where_the_backend_can(monkeypatch: pytest.MonkeyPatch) -> None:
    default, calls = _Default(), []
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=default))
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "split_group", lambda **options: calls.append(("split", options)))
    monkeypatch.setattr(dist, "new_group", lambda ranks, **options: calls.append((ranks, options)))
    device, timeout = torch.device("cuda", 2), timedelta(seconds=77)
    assert own_group([[0, 1, 2, 3]], device, timeout) is default  # and not one more of the same ranks
    assert own_group([[0], [1], [2], [3]], device, timeout) is None
    assert calls == []
    own_group([[0, 2], [1, 3]], device, timeout)
    assert calls == [("split", {"split_ranks": [[0, 2], [1, 3]], "timeout": timeout})]
    calls.clear()
    default.bound_device_id = None
    own_group([[0, 2], [1, 3]], device, timeout)
    assert calls == [([0, 2], {"timeout": timeout}), ([1, 3], {"timeout": timeout})]


@pytest.mark.parametrize(
    ("backend", "tp", "variables", "urgent"),
    [
        ("nccl", 2, {}, True),
        ("nccl", 2, {"TORCH_NCCL_HIGH_PRIORITY": "0"}, False),
        ("gloo", 2, {}, False),
        ("nccl", 4, {}, True),  # the default group is the tp group
        ("nccl", 4, {"TORCH_NCCL_HIGH_PRIORITY": "0"}, False),
        ("nccl", 1, {}, False),
    ],
)
def test_the_tp_group_goes_first_over_nccl_and_the_default_group_has_device_and_time_out(
    monkeypatch: pytest.MonkeyPatch, backend: str, tp: int, variables: dict[str, str], urgent: bool
) -> None:
    """What is asked for rank 2 of four of torch.distributed and NCCL's options, which are stand-ins."""
    begun, groups = [], {}

    def begin(backend: str, **options: Any) -> None:
        begun.append((backend, options))

    def new_group(ranks: list[int], pg_options: Any = None, **options: Any) -> Any:
        if options.get("backend") is None:
            groups[tuple(ranks)] = (pg_options, options)
        return SimpleNamespace()

    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=SimpleNamespace(bound_device_id=None)))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=SimpleNamespace), raising=False)
    monkeypatch.setattr(dist, "init_process_group", begin)
    monkeypatch.setattr(dist, "new_group", new_group)
    for name, value in {"is_initialized": True, "get_rank": 2, "get_world_size": 4, "get_backend": backend}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    config, device = Config(), torch.device("cpu")
    config.parallel.tp, config.watchdog.step_s, config.parallel.backend = tp, 5000, "gloo"
    meeting = Meeting(None, Report(2, "n", 2, "gpu", "", ""), 4, 1, lambda: None)
    connect_ranks(config, BlackBox(), Rendezvous(meeting, [], device, backend, REFERENCE))
    timeout = timedelta(seconds=5060)
    first = SimpleNamespace(is_high_priority_stream=True, _timeout=timeout)
    ((kind, options),) = begun
    assert (kind, options["timeout"]) == (backend, timeout)
    assert options["device_id"] == (device if backend == "nccl" else None)
    assert options["pg_options"] == (first if urgent and tp == 4 else None)
    wanted = {2: {(0, 1): urgent, (2, 3): urgent, (0, 2): False, (1, 3): False}}.get(tp, {})
    assert groups == {
        ranks: (first if goes_first else None, {"timeout": timeout}) for ranks, goes_first in wanted.items()
    }


def _timeouts() -> list[timedelta]:
    grid = connect(tp_grid(4, 2, 2), torch.device("cpu"), timeout=timedelta(seconds=77))
    everything = [*grid.groups.values(), grid.control.group, grid.saving.group]
    groups = [each.communicator.group for each in everything if each and isinstance(each.communicator, ProcessGroup)]
    backends = [group._get_backend(torch.device("cpu")) for group in groups if group != dist.group.WORLD]
    return [backend.options._timeout for backend in backends]  # pyright: ignore[reportAttributeAccessIssue]


def test_every_group_has_the_run_s_time_out() -> None:
    for timeouts in run_ranks(4, _timeouts):
        assert set(timeouts) == {timedelta(seconds=77)}
        assert len(timeouts) >= 4
