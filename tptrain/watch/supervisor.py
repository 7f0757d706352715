"""The process that Slurm starts for a rank: it runs the trainer as a child, hears signals, and sees how the child ends.

It needs neither torch nor the interpreter of a trainer that hangs in C++. Where a trainer dies, stops, or is silent for
longer than its phase allows, the supervisor reports what the black box holds to that of rank 0 (reporter.py), which has
all others do so, and prints one verdict (verdict.py). Reports are written to the run directory as well: for people, and
where the supervisors have no network between them.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tptrain.config import Config
from tptrain.config.load import write_atomically
from tptrain.watch import black_box, files, verdict
from tptrain.watch.black_box import BlackBox
from tptrain.watch.outcome import Outcome
from tptrain.watch.packed import Packed, pack, unpack
from tptrain.watch.place import Allocation, FlightRecorder, Place
from tptrain.watch.reporter import Reporter
from tptrain.watch.verdict import Absence, Report

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STACKS = signal.SIGRTMIN + 3  # asks a trainer for the Python stacks of its threads
TICK_S = 0.1
GATHER_S = 6  # once a rank has failed: for a connection to the other supervisors, else for the files of their reports
JUDGE_S = 90  # for the verdict, as long as there is a connection
CLOCK_SKEW_S = 60  # between nodes; what is older than this process is another run's
APART_S = 5  # the starts of the ranks of one node, whose clock is one
PACKAGE = str(Path(black_box.__file__).parents[1]) + os.sep
Trainer = Callable[[BlackBox], int]


class Supervisor:
    """Runs and watches one rank's trainer. `allocation`: on Slurm; `flight_recorder`: where NCCL may be used."""

    def __init__(
        self,
        config: Config,
        place: Place,
        allocation: Allocation | None = None,
        flight_recorder: FlightRecorder | None = None,
    ) -> None:
        self.config, self.place, self.allocation, self.flight_recorder = config, place, allocation, flight_recorder
        self.run_dir = Path(config.run.dir)
        self.reports = files.folder_of(self.run_dir, place.attempt)
        self.box = BlackBox()
        self.box.rank = place.rank
        self.stacks = os.memfd_create("stacks")
        self.child = 0
        self.started = time.time()
        self.resumed = 0.0  # monotonic clock when this rank was last woken from a suspension
        self.ended = 0.0  # the same clock when the trainer ended or was ended
        self.reporter = Reporter(place, self.run_dir, self._judge_packed)

    def run(self, trainer: Trainer) -> int:
        """Returns the rank's exit code."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # who started us wants it ignored
                signal.signal(number, self.box.on_signal)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        for name in [f"rank-{self.place.rank:05d}.json", *(["verdict.json"] if self.place.rank == 0 else [])]:
            (self.reports / name).unlink(missing_ok=True)  # of a run that had the same name
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        # Python forgets, in the child, a signal that comes in the instant of the fork: let none come.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self.child = os.fork()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if self.child == 0:
            self._be_trainer(trainer, parent)
        self.reporter.start()
        if self.place.rank == 0 and self.allocation is not None:
            threading.Thread(target=self._follow_end_time, daemon=True).start()
        cause, code = self._watch()
        if self.flight_recorder is not None:
            with contextlib.suppress(OSError):
                self.flight_recorder.pipe.unlink(missing_ok=True)  # NCCL makes it and leaves it
        self.conclude(cause)
        return code

    def conclude(self, cause: dict[str, Any]) -> None:
        """Report how this rank ended, and wait for the verdict."""
        if cause["kind"] in (Outcome.DIED, Outcome.HANG, Outcome.WAITING) and self.box.ending()[0] == Outcome.DEVICE:
            cause |= {"kind": Outcome.DEVICE, "message": self.box.ending()[1]}  # NCCL then aborts its own process
        report = self._report_of(cause)
        self.reporter.report(pack(report))  # before the files: they may lie on the disk that is full or gone
        self._write(report, cause.get("stacks", ""))
        self._await_verdict(Outcome(cause["kind"]))

    def _be_trainer(self, trainer: Trainer, parent: int) -> None:
        """In the child: does not return."""
        code = 1
        try:
            end_with(parent, signal.SIGKILL)  # no trainer outlives its supervisor
            self.box.counts_signals = False
            faulthandler.register(STACKS, file=self.stacks, all_threads=True)
            code = trainer(self.box)
        except BaseException:  # what the trainer itself does not expect
            traceback.print_exc()
            self.box.end(Outcome.BUG, traceback.format_exc().strip().splitlines()[-1])
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os.kill(parent, signal.SIGCONT)  # where somebody stopped it
            os._exit(code)

    # ---------------------------------------------------------------------------------------------------- watching

    def _watch(self) -> tuple[dict[str, Any], int]:
        """Wait for the trainer's end, or bring it about. Returns the cause and an exit code."""
        before, looked = time.monotonic(), 0.0
        while True:
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid:
                return self._after_exit(os.waitstatus_to_exitcode(status))
            now = time.monotonic()
            if now - before > 20 * TICK_S:  # all of the rank was suspended, as `scontrol suspend` does
                self.resumed = now
            before = now
            if cause := self._must_end(now):
                return cause, 1
            if now - looked > 1:
                looked = now
                if self._superseded():
                    self._kill()
                    text = "a later attempt of this job has taken over the run: this one ends"
                    print(text, flush=True)
                    return {"kind": Outcome.SUPERSEDED, "message": text}, 1
                if not self.reporter.connected and self.reports.exists() and self._read():
                    return self._join_in(), 1
            if self.reporter.failed:
                return self._join_in(), 1
            time.sleep(TICK_S)

    def _must_end(self, now: float) -> dict[str, Any] | None:
        """Ends the trainer on a signal that cannot wait for a step boundary, or dumps and ends it when it hangs."""
        state, phase = self.box.state, self.box.phase
        # A user's Ctrl-C or `cancel` is for good; all other signals are Slurm's, and the job may go on later.
        outcome = Outcome.CANCELLED if self.box.signal == "SIGINT" else Outcome.STOPPED
        stop = {"kind": outcome, "signal": self.box.signal}
        in_time = self.box.signal in ("SIGUSR1", "SIGUSR2")  # the time limit is only near: a step may still be done
        if self.box.signal and not in_time and phase in ("rendezvous", "build"):
            self._kill()
            what = f"{self.box.signal} before the first step"
            print(f"{self._name()}{what}: nothing was trained, nothing to save", flush=True)
            return stop | {"message": what}
        if state.signalled_again:
            self._kill()
            print(f"{self._name()}a second signal: stopping at once, without a checkpoint", flush=True)
            return stop | {"message": f"a second signal after {self.box.signal}"}
        silent = now - max(state.since, self.resumed)
        if silent <= self._allowed_s() + (GATHER_S if phase == "rendezvous" else 0):
            return None
        return self._dump({"kind": Outcome.HANG, "message": f"silent for {silent:.0f} s in the phase `{phase}`"})

    def _allowed_s(self) -> float:
        """The longest silence that the phase allows."""
        limits, phase = self.config.watchdog, self.box.phase
        return limits.checkpoint_s if phase == "end" else getattr(limits, f"{phase}_s")

    def _join_in(self) -> dict[str, Any]:
        """Another rank has failed: give its trainer a moment to end by itself, then say what it was doing."""
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.child, os.WNOHANG)
            if pid:
                return self._after_exit(os.waitstatus_to_exitcode(status))[0]
            time.sleep(TICK_S)
        return self._dump({"kind": Outcome.WAITING, "message": "ended because another rank failed"})

    def _dump(self, cause: dict[str, Any]) -> dict[str, Any]:
        """The trainer's stacks, then its end."""
        with contextlib.suppress(OSError, IndexError):
            cause["stopped"] = Path(f"/proc/{self.child}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        if not cause.get("stopped"):  # a stopped process does not answer
            os.kill(self.child, STACKS)
            self._ask_nccl()
        time.sleep(0.3)  # also for a stopped one: its end would cut short the stacks of those that wait for it
        self._kill()
        size = os.fstat(self.stacks).st_size
        cause["stacks"] = os.pread(self.stacks, size, 0).decode(errors="replace")
        return cause

    def _ask_nccl(self) -> None:
        """Have NCCL write PyTorch's flight record beside our reports: its monitor thread listens on a pipe."""
        if self.flight_recorder is None:
            return
        with contextlib.suppress(OSError):  # no pipe: not over NCCL
            self.reports.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.flight_recorder.pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.write(handle, b"1\n")
            os.close(handle)
            deadline = time.monotonic() + 2
            while not self.flight_recorder.record.exists() and time.monotonic() < deadline:
                time.sleep(TICK_S)

    def _kill(self) -> None:
        self.ended = time.monotonic()
        os.kill(self.child, signal.SIGKILL)
        deadline = time.monotonic() + 5  # a process in a hung driver or file system does not even die
        while os.waitpid(self.child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _after_exit(self, code: int) -> tuple[dict[str, Any], int]:
        self.ended = time.monotonic()
        if code == 0:
            return {"kind": Outcome.DONE, "message": ""}, 0
        if code < 0:
            name = signal.strsignal(-code) if -code >= signal.SIGRTMIN else signal.Signals(-code).name
            return {"kind": Outcome.DIED, "message": f"killed by {name}", "signal": name}, 1
        outcome, message = self.box.ending()
        return {"kind": outcome or Outcome.BUG, "message": message or f"exit code {code}"}, code

    def _superseded(self) -> bool:
        """Whether Slurm has restarted this job elsewhere, while a dead node's ranks were left alive."""
        if self.place.rank or self.allocation is None:  # only Slurm's names of attempts never come again
            return False
        try:
            job, _, restart = (self.run_dir / "logs" / "attempt").read_text().rpartition("-")
        except OSError:
            return False
        return job == self.place.job and restart.isdigit() and int(restart) > self.place.restart

    def _follow_end_time(self) -> None:
        """Keep the trainer told of the time at which Slurm kills the job; an operator may move it."""
        assert self.allocation is not None
        while True:
            self.box.state.end_time = self.allocation.end_time() or self.box.state.end_time
            time.sleep(60)

    # --------------------------------------------------------------------------------------------------- reporting

    def _report_of(self, cause: dict[str, Any]) -> Report:
        """What this rank was doing; without the stacks, which nobody judges."""
        box = self.box
        calls = box.collectives()
        return {
            "rank": self.place.rank,
            "world": self.place.world,
            "node": self.place.node,
            "time": time.time(),
            "phase": box.phase,
            "step": box.state.step,
            "silent": self.ended - max(box.state.since, self.resumed),  # before its end, in seconds
            "allowed": self._allowed_s(),
            "lasted": time.time() - box.state.began[0],
            "arrived": box.state.began[1] > 0,  # in the rendezvous
            "entered": box.state.entered,
            "cause": {name: value for name, value in cause.items() if name != "stacks"},
            "top": _innermost(cause.get("stacks", "")),
            "groups": box.group_counts(calls),
            "collectives": calls,
        }

    def _write(self, report: Report, stacks: str) -> None:
        """Into the run directory, unless the rank ended well; a disk that is full or gone is no reason to hang."""
        if report["cause"]["kind"] in (Outcome.DONE, Outcome.SUPERSEDED):
            return
        with contextlib.suppress(OSError):
            if not self.run_dir.exists():  # `train` was refused before it was made
                return
            self.reports.mkdir(parents=True, exist_ok=True)
            name = self.reports / f"rank-{self.place.rank:05d}"
            if stacks:
                name.with_suffix(".stacks").write_text(stacks)
            write_atomically(name.with_suffix(".json"), json.dumps(report))

    def _await_verdict(self, outcome: Outcome) -> None:
        """Wait until the reports of all ranks are judged: the end of the first rank ends the others. Where there is no
        connection to who judges, the lowest of the ranks that left a file does.
        """
        connected = begun = time.monotonic()
        while not self.reporter.released:
            now = time.monotonic()
            if self.reporter.connected:
                connected = now
            elif outcome in (Outcome.DONE, Outcome.SUPERSEDED) or outcome.announced:
                return
            elif now - connected > GATHER_S or len(list(self.reports.glob("rank-*.json"))) == self.place.world:
                break
            if now - begun > JUDGE_S and outcome != Outcome.DONE:  # who ended well waits for the others' end
                break
            time.sleep(TICK_S)
        else:
            return
        reports = self._read()
        if min(reports, default=-1) == self.place.rank and files.written(self.reports) is None:
            self._judge(reports, {}, {})

    def _read(self) -> dict[int, Report]:
        """The files of this run's reports; an earlier run's may be there where it had the name, as under torchrun."""
        reports = files.read(self.reports, self.started - CLOCK_SKEW_S)
        here, since = self.place.node, self.started - APART_S
        return {rank: report for rank, report in reports.items() if report["node"] != here or report["time"] >= since}

    def _judge_packed(self, packed: dict[int, Packed], absent: dict[int, Absence], nodes: dict[int, str]) -> None:
        """For the collector, which has received these. The file of a rank that it cannot reach may be there.

        They are unpacked together: what is left out of a report is what all members of a group have in common.
        """
        if absent:
            packed = packed | {rank: pack(report) for rank, report in self._read().items() if rank in absent}
        reports = unpack(packed)
        self._judge(reports, {rank: how for rank, how in absent.items() if rank not in reports}, nodes)

    def _judge(self, reports: dict[int, Report], absent: dict[int, Absence], nodes: dict[int, str]) -> None:
        """Print the verdict, and leave it to the launcher."""
        place = self.place
        seen = nodes | {rank: report["node"] for rank, report in reports.items()}
        noted = place.nodes or files.nodes(self.run_dir, place.attempt)
        if any(noted[rank] != node for rank, node in seen.items() if rank < len(noted)):
            noted = ()  # ranks lie otherwise than node by node
        placed = [seen.get(rank) or (noted[rank] if rank < len(noted) else "") for rank in range(place.world)]
        judged = verdict.judge(reports, place.world, placed, absent)
        if not judged.kind.announced:
            print(f"verdict: {judged.text}\n  every rank's last collectives and stacks: {self.reports}", flush=True)
        with contextlib.suppress(OSError):
            if self.run_dir.exists():
                files.write(self.reports, judged, len(reports), stands_in=place.rank != 0)

    def _name(self) -> str:
        return f"[rank {self.place.rank}] " if self.place.rank else ""


def end_with(parent: int, number: int) -> None:
    """Have this process get a signal when its parent ends, or at once where that has ended."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _innermost(stacks: str) -> str:
    """The main thread's innermost line of tptrain, out of faulthandler's text."""
    main = stacks.rpartition("Current thread")[2] or stacks
    lines = [line.strip() for line in main.splitlines() if PACKAGE in line]
    return lines[0] if lines else ""
