"""Ranks that stop, hang, die or go astray, and ranks that are signalled: real processes, each under its supervisor.

The supervisors of each made-up node write to a run directory of its own: those of other nodes never see their files.
"""

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import psutil
import pytest
import torch

from launch.place import free_port
from tests.distributed import FORKSERVER
from tests.models import training
from tptrain.config import Config, ModelConfig
from tptrain.nn import cross_entropy
from tptrain.nn.parameter import initial_values
from tptrain.parallel import collectives
from tptrain.parallel.mesh import Mesh
from tptrain.run.rank import run
from tptrain.train.schedule import Action, Reduce, plain
from tptrain.watch import files, outcome
from tptrain.watch.black_box import SAME_SIGNAL_S, BlackBox, ranks_of
from tptrain.watch.place import Place
from tptrain.watch.reporter import Reporter
from tptrain.watch.supervisor import Supervisor
from tptrain.watch.wire import SECRET_FILE, Message, make_secret

TP, STEP_S, FAULT_STEP, STEPS = 2, 3, 3, 20
BOUND_S = STEP_S + 10  # from the fault to the end of the last process
B, T = 2, 8
MODEL = ModelConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)

EVERYWHERE = ((2, 0), (2, 1), (4, 0), (4, 3))  # worlds, and the rank in each that has the fault
# By default each fault is once in each world, and once on rank 0, which judges; each place has faults of several kinds.
NEAR, FAR = ((2, 1), (4, 0)), ((2, 0), (4, 3))
FAULTS = {  # the verdict's kind and text; {tp} and {dp} stand for the rank's groups, and {tp} for both without dp
    "stops": ("hang", r"stopped \(SIGSTOP\) .* never entered .* of \(16, 16\) float32 over {tp} \(embedding.py"),
    "hangs": ("hang", r"never entered .* of \([\d, ]+\) float32 over {dp} \(reduce.py"),
    "dies": ("died", r"killed by SIGKILL .* never entered .* of \(16, 16\) float32 over {tp} \(embedding.py"),
    "dies-alone": ("died", r"killed by SIGKILL after step 2"),
    "raises": ("bug", r"ended after step 2: ValueError: made up$"),
    "device-fails": (
        "device",
        r"ended after step 2: the device failed: CUDA error: uncorrectable ECC error encountered$",
    ),
    "vanishes": ("gone", r"does not answer.* without entering .* of \([\d, ]+\) float32 over {dp} \(reduce.py"),
    "skips-a-layer": (
        "mismatch",
        r"all_reduce of \(16, 16\) float32 over {tp} \(linear.py:\d+ forward < linear.py:\d+ forward < attention.py",
    ),
    "skips-in-the-loss": ("mismatch", r"all_reduce of \(16, 16\) float32 over {tp} \(cross_entropy.py"),
    "sends-less": ("mismatch", r"of \(15, 16\) float32 over {tp} .* where rank \d .* of \(16, 16\) float32 over {tp}"),
}


ONLY = {"vanishes": NEAR, "dies-alone": ((2, 1),), "device-fails": ((4, 0),)}  # with --every-place too
BY_DEFAULT = {
    "stops": NEAR,
    "hangs": FAR,
    "dies": FAR,
    "raises": NEAR,
    "skips-a-layer": NEAR,
    "skips-in-the-loss": FAR,
    "sends-less": NEAR,
} | ONLY


@dataclass(frozen=True)
class Case:
    fault: str  # one of FAULTS; empty for none
    world: int
    rank: int

    def __str__(self) -> str:
        return f"{self.fault}-{self.rank}-of-{self.world}"


def cases(config: pytest.Config) -> list[Case]:
    places = ONLY if config.getoption("--every-place") else BY_DEFAULT
    return [Case(fault, world, rank) for fault in FAULTS for world, rank in places.get(fault, EVERYWHERE)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        hangs_only = metafunc.function is test_a_hang_leaves_stacks
        chosen = [case for case in cases(metafunc.config) if not hangs_only or FAULTS[case.fault][0] == "hang"]
        metafunc.parametrize("case", chosen, ids=str)


@dataclass(frozen=True)
class Signals:
    """What a lone rank is sent while it is in a phase, and how it ends."""

    phase: str
    numbers: tuple[int, ...]
    pause_s: float = 0.005  # between the first and the second
    deaf_s: float = 0  # after the first, in which Python runs no handlers, as in a long call into C++
    stays_s: float = 0.5  # in the phase after the first, where it is let
    kind: str = ""  # of the report; empty where the rank ends well
    id: str = field(default="", compare=False)


SIGNALS = [
    *(
        Signals(phase, (number,), kind=kind, id=f"{number.name}-in-{phase}")
        for phase in ("rendezvous", "build")
        for number, kind in ((signal.SIGTERM, "stopped"), (signal.SIGINT, "cancelled"))
    ),
    Signals("step", (signal.SIGTERM,), id="SIGTERM-in-step"),
    Signals("step", (signal.SIGTERM, signal.SIGTERM), id="twice-at-once"),
    Signals("step", (signal.SIGTERM,) * 2, SAME_SIGNAL_S + 0.3, stays_s=60, kind="stopped", id="two"),
    Signals("step", (signal.SIGTERM,), deaf_s=SAME_SIGNAL_S + 0.3, id="heard-late"),
]


@dataclass(frozen=True)
class Outcome:
    codes: list[int | None]
    seconds: float  # since the fault
    output: str
    reports: dict[int, Any]
    stacks: dict[int, str]
    verdicts: list[dict[str, Any]]
    folder: Path
    left: list[str]  # processes


# ------------------------------------------------------------------------------------------------------- in the ranks


def be_rank(folder: Path, rank: int, world: int, port: int, trainer: Callable[..., int], wish: Any) -> None:
    """What a process of a world does."""
    output = os.open(folder / f"output-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run
    place = Place(rank, world, f"node{rank // 2}", "job", 0, stand_in=2 if world > 2 else 1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in numbers.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TPTRAIN_ATTEMPT": place.attempt, "TPTRAIN_NODE": place.node}
    config = Config(model=MODEL)
    config.run.dir, config.watchdog.step_s = str(folder), STEP_S
    if trainer is miss_rendezvous:
        config.watchdog.rendezvous_s = 4
    config.parallel.tp, config.train.device, config.train.micro_batch_size = TP, "cpu", 1

    def noted(box: BlackBox) -> int:
        (folder / f"trainer-{rank}").write_text(str(os.getpid()))
        return trainer(config, box, wish)

    heed = Reporter._heed

    def connected(reporter: Reporter, state: Message) -> bool:
        (folder / f"connected-{rank}").touch()
        return heed(reporter, state)

    Reporter._heed = connected  # type: ignore[method-assign]  # this process is the supervisor's alone
    own = copy.deepcopy(config)
    own.run.dir = str(folder / place.node)
    sys.exit(Supervisor(own, place).run(noted))


def tiny_run(config: Config, box: BlackBox, case: Case) -> int:
    """A real rank from the rendezvous to its end, but for the training loop."""
    with patch("tptrain.train.loop.train", lambda config, grid, stop, ops: tiny_train(config, grid, case)):
        return run(config, box, None, os.environ["TPTRAIN_ATTEMPT"])


def tiny_train(config: Config, grid: Mesh, case: Case) -> None:
    """Steps of a tiny model, without data or checkpoints, in one of which a rank has its fault."""
    torch.set_num_threads(1)
    tiny = training(MODEL, grid, zero=True)
    tiny.optimizer.state.initialise(lambda name, p: initial_values(name, p, 0))
    tokens, reducer = torch.arange(B * (T + 1)).view(B, T + 1), tiny.optimizer.reducer
    while case.fault == "vanishes" and not connected_all(Path(config.run.dir), case.world):
        time.sleep(0.01)
    grid.box.touch("first_step")  # which may take its time on a busy machine
    for step in range(1, STEPS + 1):
        fault = case.fault if (step, grid.rank) == (FAULT_STEP, case.rank) else ""
        if fault:
            (Path(config.run.dir) / "fault").touch()
        if fault == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault.startswith("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        if case.fault == "dies-alone" and step == FAULT_STEP:
            time.sleep(20)  # the others notice nothing: they are not in a collective
        with astray(fault):
            tiny.backward(tokens, 1.0, schedule=without_reductions)
        if fault == "raises":
            raise ValueError("made up")
        if case.fault == "device-fails" and step == FAULT_STEP:
            fail_device_beside_an_abort(Path(config.run.dir), grid, case.rank)
        if fault == "vanishes":
            os.kill(os.getppid(), signal.SIGKILL)
        if fault in ("hangs", "vanishes"):
            sleep_forever()
        reducer.finish()
        reducer.norm_and_flags()
        grid.box.state.step = step
        grid.box.touch("step")


def connected_all(folder: Path, world: int) -> bool:
    """Whether rank 0 knows of every rank: one that vanishes before that has never come."""
    return all((folder / f"connected-{rank}").exists() for rank in range(world))


def fail_device_beside_an_abort(folder: Path, grid: Mesh, bad: int) -> None:
    """The peer over dp, on another node, aborts in the collective that the rank with the bad device never enters."""
    peer = (bad + TP) % (2 * TP)
    if grid.rank == peer:
        threading.Thread(target=abort_in_collective, args=(grid.box, bad), daemon=True).start()
    if grid.rank == bad:
        aborted = psutil.Process(int((folder / f"trainer-{peer}").read_text()))
        with contextlib.suppress(psutil.NoSuchProcess):
            while aborted.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with `TORCH_USE_CUDA_DSA`")


def abort_in_collective(box: BlackBox, other: int) -> None:
    """As NCCL's watchdog does."""
    while (call := box.collectives()[-1])["left"] or other not in ranks_of(call["ranks"]):
        time.sleep(0.01)
    os.abort()


def without_reductions(batches: int, units: Sequence[str]) -> list[Action]:
    """So that a rank can hang between its backward pass and the sums over dp."""
    return [action for action in plain(batches, units) if not isinstance(action, Reduce)]


def sleep_forever() -> NoReturn:
    while True:
        time.sleep(60)


@contextlib.contextmanager
def astray(fault: str) -> Iterator[None]:
    """One collective is left out (of a layer, the second: the first attention's), or sends another shape."""
    name, module = ("all_reduce", collectives) if fault == "skips-a-layer" else ("all_reduce_", cross_entropy)
    right, calls = getattr(collectives, name), 0

    def wrong(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if fault == "skips-a-layer" and calls == 2:
            return x, collectives.NOTHING
        if fault == "skips-in-the-loss" and calls == 1:
            return collectives.NOTHING
        if fault == "sends-less" and calls == 1:
            return right(x[:-1].clone(), *arguments, **options)
        return right(x, *arguments, **options)

    with patch.object(module, name, wrong if fault.startswith(("skips", "sends")) else right):
        yield


def miss_rendezvous(config: Config, box: BlackBox, wish: None) -> int:
    """The trainers of the second node hang, as in a driver, before they meet the others."""
    if box.rank >= TP:
        sleep_forever()
    return run(config, box, None, os.environ["TPTRAIN_ATTEMPT"])


def die_or_hang(config: Config, box: BlackBox, world: int) -> int:
    """In a world of two, rank 1 is killed; in one of four, all hang."""
    box.touch("step")
    if world == 2 and box.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while world == 2:
        box.touch()
        time.sleep(0.1)
    return sleep_forever()


def wait_for_signal(config: Config, box: BlackBox, wish: Signals) -> int:
    if wish.deaf_s:
        signal.pthread_sigmask(signal.SIG_BLOCK, wish.numbers)
    box.touch(wish.phase)
    (Path(config.run.dir) / "fault").touch()
    while not box.signal:
        time.sleep(0.01)
    heard = time.monotonic()
    while (waited := time.monotonic() - heard) < wish.deaf_s + wish.stays_s:
        if waited > wish.deaf_s:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, wish.numbers)
        time.sleep(0.05)
        box.touch()
    return 0


# ------------------------------------------------------------------------------------------------- around the ranks


def share_secret(folder: Path, run_dir: Path) -> None:
    """One run has one secret, wherever its directory is."""
    make_secret(folder)
    shutil.copy(folder / SECRET_FILE, run_dir)


def start(folder: Path, world: int, trainer: Callable[..., int], wish: Any, network: bool = True) -> list[Any]:
    """`network`: whether there is one between the supervisors."""
    port = free_port()
    ranks = range(world)
    for node in {f"node{rank // 2}" for rank in ranks}:
        (folder / node).mkdir(exist_ok=True)
        if network:
            share_secret(folder, folder / node)
    processes = [FORKSERVER.Process(target=be_rank, args=(folder, r, world, port, trainer, wish)) for r in ranks]
    for process in processes:
        process.start()
    return processes


def finish(folder: Path, processes: list[Any]) -> Outcome:
    """Wait for the end, by force where it does not come in time, and look at what is left."""
    fault = folder / "fault"
    since, patience = time.time(), 60.0  # seconds
    while any(process.is_alive() for process in processes) and time.time() < since + patience:
        if fault.exists():
            since, patience = fault.stat().st_mtime, BOUND_S + 2
        time.sleep(0.02)
    seconds = time.time() - since
    codes = [process.exitcode for process in processes]
    left = []
    for pid in [p.pid for p in processes] + [int(path.read_text()) for path in folder.glob("trainer-*")]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                left.append(f"{process}")
                process.kill()
    for process in processes:
        process.join()
        process.close()
    verdicts = [json.loads(path.read_text()) for path in sorted(folder.glob("*/logs/attempt-job-0/verdict.json"))]
    return Outcome(
        codes,
        seconds,
        "".join(path.read_text() for path in sorted(folder.glob("output-*"))),
        {int(path.stem[5:]): json.loads(path.read_text()) for path in folder.glob("*/logs/attempt-job-0/rank-*.json")},
        {int(path.stem[5:]): path.read_text() for path in folder.glob("*/logs/attempt-job-0/rank-*.stacks")},
        verdicts,
        folder,
        left,
    )


def signalled(folder: Path, wish: Signals) -> Outcome:
    """The outcome of a lone rank both of whose processes are signalled, as Slurm does."""
    (process,) = processes = start(folder, 1, wait_for_signal, wish)
    while not (folder / "fault").exists():
        assert process.is_alive()
        time.sleep(0.01)
    for index, number in enumerate(wish.numbers):
        time.sleep(wish.pause_s if index else 0)
        for pid in (process.pid, int((folder / "trainer-0").read_text())):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    return finish(folder, processes)


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, Future[Outcome]]]:
    """Of all cases, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        by_case: dict[Any, Future[Outcome]] = {}
        for case in [*cases(request.config), *(Case("", world, 0) for world in (2, 4))]:
            folder = tmp_path_factory.mktemp("ranks")
            by_case[case] = pool.submit(lambda f, c: finish(f, start(f, c.world, tiny_run, c)), folder, case)
        folder = tmp_path_factory.mktemp("missed")
        by_case["missed"] = pool.submit(lambda f: finish(f, start(f, 4, miss_rendezvous, None)), folder)
        for world in (2, 4):
            folder = tmp_path_factory.mktemp("no-network")
            by_case["no network", world] = pool.submit(
                lambda f, w: finish(f, start(f, w, die_or_hang, w, network=False)), folder, world
            )
        for wish in SIGNALS:
            by_case[wish] = pool.submit(signalled, tmp_path_factory.mktemp("signals"), wish)
        yield by_case
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------- tests


def test_a_fault_ends_all_ranks_and_is_named(case: Case, outcomes: dict[Any, Future[Outcome]]) -> None:
    got = outcomes[case].result()
    assert not got.left
    assert got.seconds < BOUND_S
    assert all(got.codes), got.codes
    assert got.output.count("verdict:") == 1, got.output
    reachable = set(range(case.world)) - ({case.rank} if case.fault == "vanishes" else set())
    assert got.reports.keys() == reachable
    kind, pattern = FAULTS[case.fault]
    (verdict,) = got.verdicts
    assert (verdict["kind"], verdict["rank"]) == (kind, case.rank), verdict["text"]
    assert (verdict["node"], verdict["step"]) == (f"node{case.rank // 2}", FAULT_STEP - 1)
    assert verdict["reports"] == len(reachable)
    row, column = case.rank // TP * TP, case.rank % TP
    tp, dp = f"tp [{row}, {row + 1}]", f"dp [{column}, {column + TP}]"
    pattern = pattern.replace("{tp}", re.escape(tp)).replace("{dp}", re.escape(dp if case.world > TP else tp))
    assert re.search(pattern, verdict["text"]), verdict["text"]
    assert verdict["text"] in got.output


def test_a_node_whose_trainers_never_come_to_the_rendezvous(outcomes: dict[Any, Future[Outcome]]) -> None:
    got = outcomes["missed"].result()
    (verdict,) = got.verdicts
    assert (verdict["kind"], verdict["rank"], verdict["node"]) == ("hang", 2, "node1"), verdict["text"]
    assert "kept the others waiting in the rendezvous, and so did rank 3" in verdict["text"]
    assert got.reports[0]["cause"]["message"] == "ranks 2, 3 of 4 did not come in 4 s"
    assert (got.left, all(got.codes)) == ([], True)


@pytest.mark.parametrize("world", [2, 4])
def test_without_a_network_between_supervisors_files_are_judged(
    world: int, outcomes: dict[Any, Future[Outcome]]
) -> None:
    """In a world of two both are on one node, and see each other's. In one of four each node sees its own: nobody is
    called gone for that.
    """
    got = outcomes["no network", world].result()
    assert (got.left, all(got.codes)) == ([], True)
    assert got.reports.keys() == set(range(world))
    assert len(got.verdicts) == world // 2
    for verdict in got.verdicts:
        assert verdict["rank"] == (1 if world == 2 else None), verdict["text"]
        assert ("no report of it can be read" in verdict["text"]) == (world == 4)


def test_a_hang_leaves_stacks(case: Case, outcomes: dict[Any, Future[Outcome]]) -> None:
    stacks = outcomes[case].result().stacks
    if case.fault == "stops":  # a stopped process cannot tell its own
        assert any("collectives.py" in text and "in wait" in text for text in stacks.values()), stacks
    else:
        assert "sleep_forever" in stacks[case.rank]


def test_a_failed_device_is_the_cause_of_whatever_ends_the_trainer(tmp_path: Path) -> None:
    """NCCL's own thread aborts a process whose device has failed; the rank's main thread may not come to say so."""
    config = Config(model=MODEL)
    config.run.dir = str(tmp_path)
    for restart, kind in enumerate(("died", "hang", "waiting")):
        supervisor = Supervisor(config, Place(0, 1, "node0", "job", restart))
        supervisor.box.end(outcome.Outcome.DEVICE, "the device failed: made up")
        supervisor.conclude({"kind": kind, "message": "killed by SIGABRT", "signal": "SIGABRT"})
        verdict = files.written(supervisor.reports)
        assert verdict is not None
        assert (verdict.kind, verdict.node, verdict.error) == ("device", "node0", "the device failed: made up")


@pytest.mark.parametrize("world", [2, 4])
def test_a_good_end_leaves_no_report(world: int, outcomes: dict[Any, Future[Outcome]]) -> None:
    got = outcomes[Case("", world, 0)].result()
    assert (got.codes, got.left) == ([0] * world, [])
    assert not list(got.folder.glob("*/logs/attempt-job-0"))
    assert "verdict" not in got.output


@pytest.mark.parametrize("wish", SIGNALS, ids=lambda wish: wish.id)
def test_signals(wish: Signals, outcomes: dict[Any, Future[Outcome]]) -> None:
    got = outcomes[wish].result()
    assert not got.left
    assert got.codes == [1 if wish.kind else 0], got.output
    assert [report["cause"]["kind"] for report in got.reports.values()] == ([wish.kind] if wish.kind else [])
    assert got.seconds < wish.pause_s * (len(wish.numbers) - 1) + wish.deaf_s + 5
    assert "verdict" not in got.output


def test_a_report_of_an_earlier_run_of_the_same_name_is_not_heeded(tmp_path: Path) -> None:
    """As under torchrun, where a second start has the first one's name and port."""
    folder = tmp_path / "node0" / "logs" / "attempt-job-0"
    folder.mkdir(parents=True)
    earlier = {"rank": 1, "node": "node0", "time": time.time() - 10, "cause": {"kind": "bug", "message": "long ago"}}
    (folder / "rank-00001.json").write_text(json.dumps(earlier))
    wish = Signals("step", (signal.SIGTERM,), stays_s=3)
    assert signalled(tmp_path, wish).codes == [0]
