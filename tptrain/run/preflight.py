"""The first seconds of a job, before any process group: do all ranks come, do they fit together, can the run be saved?

Every rank reports over the rendezvous store; rank 0 judges, and its one message is what every rank ends with.
"""

import contextlib
import json
import shutil
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

import tptrain
from tptrain import __version__
from tptrain.config import Config, UserError
from tptrain.models.cost import CHECKPOINT_BYTES, saves_after
from tptrain.models.sizes import sizes
from tptrain.nn.decoder import parameter_count
from tptrain.records.run_dir import COMMIT, step_folders, step_of

SOURCES = (".py", ".c", ".h")
FIRST_STAGE = "report"
SHARED_FS_S = 10  # until a new file must be seen on every node


class ReportedByRank0(UserError):
    """A UserError whose message rank 0 prints for all."""


class RendezvousError(Exception):
    """Ranks did not find each other. Nobody's mistake that we know of: worth another try."""


@dataclass(frozen=True)
class Report:
    """What one rank reports at rendezvous."""

    rank: int
    node: str
    local_rank: int
    device: str  # "cpu", or what a GPU is known by on its node
    run_dir: str
    operations: str  # what computes: see `Operations.backend`
    torch: str = torch.__version__
    tptrain: str = field(default_factory=lambda: source_version())
    python: str = sys.version.split()[0]


def source_version(package: Path = Path(tptrain.__file__).parent) -> str:
    """The version, and a digest of the source, C included: two checkouts may carry one number."""
    digest = xxhash.xxh3_64()
    for file in sorted(file for file in package.rglob("*.*") if file.suffix in SOURCES):
        digest.update(file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:8]}"


def join(address: str, port: int, report: Report, world: int, hosted: bool, patience_s: float, attempt: str) -> Any:
    """The store of this attempt, once rank 0 answers. `hosted`: someone else (torchrun's agent) keeps it.

    Raises RendezvousError where rank 0 cannot be reached.
    """
    host = report.rank == 0 and not hosted
    try:
        if not host:
            _knock(address, port, patience_s)
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address, port, world, is_master=host, timeout=timedelta(seconds=patience_s), wait_for_workers=False
        )
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if host:
            raise RendezvousError(f"rank 0 on {report.node} cannot open port {port}: {reason}") from error
        raise RendezvousError(
            f"rank {report.rank} on {report.node} cannot reach rank 0 at {address}:{port} in {patience_s:.0f} s "
            f"({reason})"
        ) from error
    return dist.PrefixStore(f"tptrain/{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]


def _knock(address: str, port: int, patience_s: float) -> None:
    """Wait until somebody listens there: torch's own waiting fills the log with C++ frames. Raises OSError."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def check_reports(meeting: "Meeting", config: Config) -> list[Report]:
    """The report of every rank, in rank order, once all are there and fit together.

    Raises UserError with the same message on every rank, or RendezvousError where ranks are missing.
    """

    def judge() -> str:
        entries = meeting.collect("report")
        if text := problem([Report(**entry) for entry in entries], config):
            raise UserError(text)
        return json.dumps(entries)

    answer = meeting.by_main(FIRST_STAGE, asdict(meeting.report), judge)
    return [Report(**entry) for entry in json.loads(answer)]


def check_run_dir(meeting: "Meeting", reports: list[Report], config: Config) -> None:
    """All ranks see that the run directory is one and the same. Raises UserError, on every rank the same."""

    def leave_token() -> str:
        token = f".seen-{uuid.uuid4().hex}"
        (Path(config.run.dir) / token).touch()
        return token

    path = Path(config.run.dir) / meeting.by_main("token", None, leave_token)
    seen = _appears(path)

    def judge() -> str:
        sights = meeting.collect("seen", SHARED_FS_S)
        path.unlink(missing_ok=True)
        blind = [report for report, sight in zip(reports, sights, strict=True) if not sight]
        if blind:
            raise UserError(
                f"run.dir={config.run.dir}: rank {blind[0].rank} on {blind[0].node} does not see what rank 0 on "
                f"{reports[0].node} wrote there. Choose a run.dir on a file system that all nodes share."
            )
        return ""

    meeting.by_main("seen", seen, judge)


def problem(reports: list[Report], config: Config) -> str | None:
    """What keeps these ranks from running this config together, or None."""
    tp = config.parallel.tp
    if len({report.run_dir for report in reports}) > 1:
        return "run.dir: the ranks disagree on it. Give all of them the same run.name or run.dir."
    for name in ("torch", "tptrain", "python"):
        versions = {getattr(report, name): report for report in reversed(reports)}
        if len(versions) > 1:
            a, b = sorted(versions.values(), key=lambda report: report.rank)[:2]
            return (
                f"mixed versions of {name}: {getattr(a, name)} at rank {a.rank} on {a.node}, {getattr(b, name)} at "
                f"rank {b.rank} on {b.node}. Start all ranks from one environment on a shared file system."
            )
    different = {report.operations: report for report in reversed(reports)}
    if len(different) > 1 and config.train.compile == "elementwise":  # under `auto` see `ops.choose.common`
        a, b = sorted(different.values(), key=lambda report: report.rank)[:2]
        return (
            f"train.compile={config.train.compile}: rank {a.rank} on {a.node} would compute with {a.operations}, rank "
            f"{b.rank} on {b.node} with {b.operations}. Give all nodes the same processor and C compiler, or set "
            "train.compile=auto, which then takes neither."
        )
    gpus = Counter((report.node, report.device) for report in reports if report.device != "cpu")
    shared = next((gpu for gpu, ranks in gpus.items() if ranks > 1), None)
    if shared and config.parallel.backend != "gloo":
        ranks = [report.rank for report in reports if (report.node, report.device) == shared]
        return (
            f"ranks {', '.join(map(str, ranks))} on {shared[0]} share one GPU ({shared[1]}). Use one rank for each "
            "GPU: cluster.tasks_per_node = cluster.gpus_per_node."
        )
    for start in range(0, len(reports), tp):
        nodes = list(dict.fromkeys(report.node for report in reports[start : start + tp]))
        if len(nodes) > 1 and not config.parallel.tp_across_nodes:
            return (
                f"parallel.tp={tp}: the TP group of ranks {start} to {start + tp - 1} spans the nodes "
                f"{', '.join(nodes)}, and each layer's 4 all-reduces would cross the network. Use a multiple of "
                "parallel.tp ranks a node, or allow it with parallel.tp_across_nodes=true "
                "(`python -m tptrain plan` shows the cost)."
            )
    return None


def check_disk(config: Config) -> None:
    """Whether the checkpoints that are to come fit where the run directory is, or is to be. Raises UserError."""
    folder, keep = Path(config.run.dir), config.checkpoint.keep
    checkpoints = step_folders(folder / "checkpoints")
    kept = [path for path in checkpoints if (path / COMMIT).exists()]
    on_disk, unfinished = _size(kept), _size(path for path in checkpoints if path not in kept)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + unfinished  # which the next save takes away
    one = CHECKPOINT_BYTES * parameter_count(sizes(config.model))
    at_once = max((keep + 1) * one - on_disk, one)  # the newest is written before the oldest goes
    needed = min(at_once, one * saves_after(step_of(kept[-1]) if kept else 0, config))
    if needed and free <= needed:
        several = (
            f" With checkpoint.keep={keep} those to come need {needed / 2**30:,.1f} GiB beside the "
            f"{on_disk / 2**30:,.1f} GiB that are there: the newest is written before the oldest goes."
        )
        raise UserError(
            f"run.dir={config.run.dir}: {free / 2**30:,.1f} GiB free, and one checkpoint of {config.model.name} takes "
            f"{one / 2**30:,.1f} GiB.{several if needed > one else ''} Free some space"
            f"{', lower checkpoint.keep' if needed > one and keep > 1 else ''} or choose another run.dir."
        )


def _size(folders: Iterable[Path]) -> int:
    """Bytes of the files in these folders. One may vanish meanwhile: only later does this job own the run."""
    size = 0
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            size += sum(file.stat().st_size for file in folder.iterdir())
    return size


# ---------------------------------------------------------------------------------------------------------- the store


@dataclass(frozen=True)
class Meeting:
    """All ranks around the store."""

    store: Any
    report: Report
    world: int
    patience_s: float
    touch: Callable[[], None]  # a sign of life, while this rank waits with a deadline of its own

    def by_main(self, stage: str, value: Any, judge: Callable[[], str]) -> str:
        """Hand in `value`; what `judge` answers on rank 0, or its failure, is every rank's."""
        store, answer_key, received = self.store, f"{stage}/answer", f"{stage}/received"
        store.set(f"{stage}/{self.report.rank}", json.dumps(value))
        if self.report.rank == 0:
            try:
                answer = judge()
            except BaseException as error:
                kind = "UserError" if isinstance(error, UserError) else "RendezvousError"
                store.set(answer_key, json.dumps([kind, str(error)]))
                # The store ends with this process: those that have met, and come to this stage, get to read it first.
                here = [rank for rank in range(1, self.world) if store.check([f"{FIRST_STAGE}/{rank}"])]
                self.wait([f"{received}/{rank}" for rank in here], 5)
                raise
            store.set(answer_key, json.dumps(["", answer]))
            return answer
        if self.wait(
            [answer_key], 2 * (self.patience_s + SHARED_FS_S)
        ):  # rank 0 gives up before, and says who is missing
            raise RendezvousError(f"rank 0 gave rank {self.report.rank} on {self.report.node} no answer")
        kind, answer = json.loads(store.get(answer_key))
        if kind:
            store.set(f"{received}/{self.report.rank}", "")
            raise ReportedByRank0(answer) if kind == "UserError" else RendezvousError(answer)
        return answer

    def on_main(self, stage: str, work: Callable[[], None]) -> None:
        """Rank 0 does `work` while the others wait; its failure is every rank's."""

        def answer() -> str:
            work()
            return ""

        self.by_main(stage, None, answer)

    def collect(self, stage: str, extra_s: float = 0) -> list[Any]:
        """What every rank handed in, in rank order. Rank 0 only. Raises RendezvousError where some did not."""
        keys, patience_s = [f"{stage}/{rank}" for rank in range(self.world)], self.patience_s + extra_s
        soon = min(patience_s, 10 + extra_s)
        missing = self.wait(keys, soon)
        if missing and patience_s > soon:
            print(f"still waiting for {_list(missing)} of {self.world}", flush=True)
            missing = self.wait(keys, patience_s - soon)
        if missing:
            raise RendezvousError(f"{_list(missing)} of {self.world} did not come in {patience_s:.0f} s")
        return [json.loads(self.store.get(key)) for key in keys]

    def wait(self, keys: list[str], seconds: float) -> list[int]:
        """Indices of the keys that are still not there when all are or the time is up."""
        deadline = time.monotonic() + seconds
        missing = list(range(len(keys)))
        while (missing := [i for i in missing if not self.store.check([keys[i]])]) and time.monotonic() < deadline:
            self.touch()
            time.sleep(0.02)
        return missing


def _list(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _appears(path: Path) -> bool:
    """A network file system may show a new file to other nodes only after a while."""
    deadline = time.monotonic() + SHARED_FS_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
