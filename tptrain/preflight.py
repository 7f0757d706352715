"""The first seconds of a job, before any process group: do all ranks come, do they fit together, can the run be saved?

Every rank reports over the rendezvous store; rank 0 judges, and its one message is what every rank ends with.
"""

import json
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from tptrain import __version__
from tptrain.config import Config, UserError
from tptrain.config.sizes import checkpoint_bytes

SHARED_FS_S = 10  # until a new file must be seen on every node


class RendezvousError(Exception):
    """Ranks did not find each other. Nobody's mistake that we know of: worth another try."""


@dataclass(frozen=True)
class Report:
    """One rank's."""

    rank: int
    node: str
    local_rank: int
    device: str  # "cpu", or what a GPU is known by on its node
    run_dir: str
    torch: str = torch.__version__
    tptrain: str = field(default_factory=lambda: source_version())
    python: str = sys.version.split()[0]


def source_version() -> str:
    """The version, and a digest of the source: two checkouts may carry one number."""
    digest = xxhash.xxh3_64()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:8]}"


def join(address: str, port: int, mine: Report, world: int, hosted: bool, patience_s: float, attempt: str) -> Any:
    """The store of this attempt, once rank 0 answers. `hosted`: someone else (torchrun's agent) keeps it.

    Raises RendezvousError where rank 0 cannot be reached.
    """
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address,
            port,
            world,
            is_master=mine.rank == 0 and not hosted,
            timeout=timedelta(seconds=patience_s),
            wait_for_workers=False,
        )
    except (dist.DistError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        if mine.rank == 0:
            raise RendezvousError(f"rank 0 on {mine.node} cannot open port {port}: {said}") from error
        raise RendezvousError(
            f"rank {mine.rank} on {mine.node} cannot reach rank 0 at {address}:{port} in {patience_s:.0f} s ({said})"
        ) from error
    return dist.PrefixStore(f"tptrain/{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]


def check(
    store: Any, mine: Report, world: int, config: Config, claim: Callable[[], None], patience_s: float
) -> list[Report]:
    """Meet, let rank 0 `claim` the run directory, and see that it is one and the same. Returns all reports.

    Raises UserError with the same message on every rank, or RendezvousError where ranks are missing.
    """
    reports: list[Report] = []

    def first() -> str:
        reports.extend(_collect(store, "report", world, patience_s, Report))
        if said := problem(reports, config):
            raise UserError(said)
        claim()
        token = f".seen-{uuid.uuid4().hex}"
        (Path(config.run.dir or ".") / token).touch()
        return token

    token = _by_main(store, "report", mine, world, json.dumps(asdict(mine)), first, patience_s)
    path = Path(config.run.dir or ".") / token
    seen = mine.node if _appears(path) else ""

    def second() -> str:
        nodes = _collect(store, "seen", world, patience_s + SHARED_FS_S, str)
        path.unlink(missing_ok=True)
        blind = [report for report, node in zip(reports, nodes, strict=True) if not node]
        if blind:
            raise UserError(
                f"run.dir={config.run.dir}: rank {blind[0].rank} on {blind[0].node} does not see what rank 0 on "
                f"{reports[0].node} wrote there. Choose a run.dir on a file system that all nodes share."
            )
        return json.dumps([asdict(report) for report in reports])

    text = _by_main(store, "seen", mine, world, json.dumps(seen), second, patience_s + SHARED_FS_S)
    return [Report(**entry) for entry in json.loads(text)]


def problem(reports: list[Report], config: Config) -> str | None:
    """What keeps these ranks from running this config together, or None."""
    tp = config.parallel.tp
    if len({report.run_dir for report in reports}) > 1:
        return "run.dir: the ranks disagree on it. Give all of them the same run.name or run.dir."
    for name in ("torch", "tptrain", "python"):
        found = {getattr(report, name): report for report in reversed(reports)}
        if len(found) > 1:
            a, b = sorted(found.values(), key=lambda report: report.rank)[:2]
            return (
                f"mixed versions of {name}: {getattr(a, name)} at rank {a.rank} on {a.node}, {getattr(b, name)} at "
                f"rank {b.rank} on {b.node}. Start all ranks from one environment on a shared file system."
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
    return _disk_problem(config)


def _disk_problem(config: Config) -> str | None:
    folder = Path(config.run.dir or ".")
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, checkpoint_bytes(config.model)
    if free > needed:
        return None
    return (
        f"run.dir={config.run.dir}: {free / 2**30:,.1f} GiB free, and one checkpoint of {config.model.name} takes "
        f"{needed / 2**30:,.1f} GiB. Free some space or choose another run.dir."
    )


# ---------------------------------------------------------------------------------------------------------- the store


def _by_main(
    store: Any, stage: str, mine: Report, world: int, value: str, judge: Callable[[], str], patience_s: float
) -> str:
    """Hand in `value`; what rank 0 makes of everybody's, or its failure, is every rank's."""
    said, heard = f"{stage}/answer", f"{stage}/heard"
    store.set(f"{stage}/{mine.rank}", value)
    if mine.rank == 0:
        try:
            answer = judge()
        except BaseException as error:
            kind = type(error).__name__ if isinstance(error, UserError | RendezvousError) else "OSError"
            store.set(said, json.dumps([kind, str(error)]))
            _wait(store, [f"{heard}/{rank}" for rank in range(1, world)], 5)  # the store ends with this process
            raise
        store.set(said, json.dumps(["", answer]))
        return answer
    deadline = time.monotonic() + 2 * patience_s + 5  # rank 0 gives up first, and says who is missing
    while not store.check([said]):
        if time.monotonic() > deadline:
            raise RendezvousError(f"rank 0 gave rank {mine.rank} on {mine.node} no answer")
        time.sleep(0.05)
    kind, answer = json.loads(store.get(said))
    if kind:
        store.set(f"{heard}/{mine.rank}", "")
        raise UserError(answer) if kind == "UserError" else RendezvousError(answer)
    return answer


def _collect(store: Any, stage: str, world: int, patience_s: float, make: Any) -> list[Any]:
    """What every rank handed in, in rank order. Rank 0 only. Raises RendezvousError where some did not."""
    keys = [f"{stage}/{rank}" for rank in range(world)]
    missing = _wait(store, keys, min(10, patience_s))
    if missing and patience_s > 10:
        print(f"still waiting for {_list(missing)} of {world}", flush=True)
        missing = _wait(store, keys, patience_s - 10)
    if missing:
        raise RendezvousError(f"{_list(missing)} of {world} did not come in {patience_s:.0f} s")
    loaded = [json.loads(store.get(key)) for key in keys]
    return [make(**entry) if isinstance(entry, dict) else make(entry) for entry in loaded]


def _wait(store: Any, keys: list[str], seconds: float) -> list[int]:
    """Indices of the keys that are still not there when all are or the time is up."""
    deadline = time.monotonic() + seconds
    missing = list(range(len(keys)))
    while (missing := [i for i in missing if not store.check([keys[i]])]) and time.monotonic() < deadline:
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
