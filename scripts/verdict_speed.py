"""How long a verdict takes, and what it costs: `python scripts/verdict_speed.py [WORLD ...]`, else 128 and 1,024 ranks.
A minute on two cores.

A grid of tp=8, eight ranks a node. A node is a process here and a rank a thread of it, with the supervisor's own code:
a black box with 4,096 collectives on record, a connection, a report in full on disk. Rank 5 hangs and is the first to
report; the others hear of it, report, and are judged. In a run, 2 to 4 s come before a rank reports: the moment in
which its trainer may end by itself, and its stacks.

All nodes share this machine's cores. So a world is measured with reports made before, as nodes that have cores of their
own make them at the same time, and with every rank making its report once it hears of the failure. The second half is
left out above 128 ranks, unless --both asks for it: a thousand reports of a megabyte on these cores take minutes, and
say nothing of a cluster, where a node makes eight. What these eight cost is printed with the first half.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from tptrain.config import Config
from tptrain.watch import files, wire
from tptrain.watch.black_box import SLOTS, BlackBox
from tptrain.watch.packed import pack
from tptrain.watch.place import Place
from tptrain.watch.supervisor import Supervisor

TP, HUNG = 8, 5
LAYERS = 80
BOTH_HALVES = 128  # ranks at most
FORK = multiprocessing.get_context("fork")


def fill(box: BlackBox, rank: int, world: int) -> None:
    """Steps of a model of 80 layers: two all-reduces a layer forward, two backward, then sums over dp and a norm."""
    row = rank // TP * TP
    tp, dp = range(row, row + TP), range(rank % TP, world, TP)
    while box.state.entered <= SLOTS:
        for number in range(4 * LAYERS):
            box.leave(box.enter("all_reduce", (4096, 8192, number % 2), "bfloat16", "tp", tp))
        for _ in range(LAYERS):
            box.leave(box.enter("reduce_scatter", (27_000_000,), "float32", "dp", dp))
        box.leave(box.enter("all_gather", (world, 2), "float32", "model", range(world)))
    if rank != HUNG:
        if rank in range(HUNG // TP * TP, HUNG // TP * TP + TP):
            box.enter("all_reduce", (4096, 8192), "bfloat16", "tp", tp)
        else:
            box.enter("reduce_scatter", (27_000_000,), "float32", "dp", dp)
    box.touch("step")


def node(index: int, world: int, run_dir: Path, reports_ready: bool, together: Any, results: Any) -> None:
    """The ranks of a node. All nodes connect `together`, and fail together."""
    config = Config()
    config.run.dir = str(run_dir)
    supervisors = [
        Supervisor(config, Place(rank, world, f"n{index}", "speed", 0, stand_in=TP))
        for rank in range(index * TP, index * TP + TP)
    ]
    for supervisor in supervisors:
        fill(supervisor.box, supervisor.place.rank, world)
    cpu = time.process_time()
    reports = {supervisor.place.rank: supervisor._report_of(cause(supervisor)) for supervisor in supervisors}
    packed = {rank: pack(report) for rank, report in reports.items()}
    if index == 0:  # a thousand files would be as many megabytes
        for supervisor in supervisors:
            supervisor._write(reports[supervisor.place.rank], "")
    reports_cpu = time.process_time() - cpu
    del reports
    together.wait()
    for supervisor in supervisors:
        supervisor.reporter.start()
    while not all(supervisor.reporter.connected for supervisor in supervisors):
        time.sleep(0.05)
    together.wait()
    cpu, began = time.process_time(), time.time()

    def end(supervisor: Supervisor) -> None:
        rank = supervisor.place.rank
        while rank != HUNG and not supervisor.reporter.failed:
            time.sleep(0.1)
        if reports_ready:
            supervisor.reporter.report(packed[rank])
            while not supervisor.reporter.released:
                time.sleep(0.1)
        else:
            supervisor.conclude(cause(supervisor))

    threads = [threading.Thread(target=end, args=(supervisor,)) for supervisor in supervisors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put((index, began, time.process_time() - cpu, reports_cpu))


def cause(supervisor: Supervisor) -> dict[str, Any]:
    hung = supervisor.place.rank == HUNG
    text = "silent for 600 s in the phase `step`" if hung else "ended because another rank failed"
    return {"kind": "hang" if hung else "waiting", "message": text}


def measure(world: int, reports_ready: bool) -> None:
    count = world // TP
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        wire.make_secret(run_dir)
        together, results = FORK.Barrier(count), FORK.Queue()
        shared = world, run_dir, reports_ready, together, results
        nodes = [FORK.Process(target=node, args=(index, *shared)) for index in range(count)]
        for process in nodes:
            process.start()
        rows = sorted(results.get() for _ in nodes)
        for process in nodes:
            process.join()
        verdict = files.folder_of(run_dir, "speed-0") / "verdict.json"
        seconds = verdict.stat().st_mtime - rows[0][1]
        judged = files.written(verdict.parent)
        assert judged is not None
        assert judged.rank == HUNG, judged.text
    cpus = [cpu for _, _, cpu, _ in rows]
    print(
        f"{world:5d} ranks, reports made {'before' if reports_ready else 'on the failure'}: a verdict in "
        f"{seconds:.1f} s, CPU of rank 0's node {cpus[0]:.2f} s"
        f"{f' and {rows[0][3]:.2f} s for its reports' if reports_ready else ''}, "
        f"of the others {median(cpus[1:]):.2f} s, at most {max(cpus[1:]):.2f} s",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("worlds", metavar="WORLD", nargs="*", type=int, default=[128, 1024])
    parser.add_argument(
        "--both", action="store_true", help=f"reports made on the failure, also of more than {BOTH_HALVES} ranks"
    )
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    for size in options.worlds:
        measure(size, reports_ready=True)
        if options.both or size <= BOTH_HALVES:
            measure(size, reports_ready=False)
