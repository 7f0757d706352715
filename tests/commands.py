"""Start the real commands as a user does, and look at the processes they leave."""

import contextlib
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tptrain.records.rows import read_rows

TPTRAIN = [sys.executable, "-m", "tptrain"]
TIMEOUT_S = 150
ENTRY = "submitit.core._submit"  # in the command line of every process of a rank


def environment(**variables: str) -> dict[str, str]:
    """This environment without a wandb login, so that a developer's own account is never used."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return kept | {"NETRC": "/dev/null", "OMP_NUM_THREADS": "1"} | variables


def tptrain(
    verb: str, *overrides: str, timeout_s: float = TIMEOUT_S, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end."""
    return run(*TPTRAIN, verb, *overrides, timeout_s=timeout_s, **variables)


def run(*command: str, timeout_s: float = TIMEOUT_S, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; stdout and stderr come together in `stdout`."""
    return subprocess.run(
        command,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def on_a_terminal(verb: str, *overrides: str) -> str:
    """Run a verb to its end, with a terminal for stdout and stderr; returns what it showed."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 200))
    command = subprocess.Popen([*TPTRAIN, verb, *overrides], env=environment(), stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux reports that nobody has the other side open
        while block := os.read(ours, 65536):
            shown += block
    os.close(ours)
    assert command.wait(TIMEOUT_S) == 0, shown
    return shown.decode()


STARTED: list[subprocess.Popen[str]] = []


def start_launch(*overrides: str, **variables: str) -> subprocess.Popen[str]:
    """Start `launch` in a process group of its own, as a terminal does. What a test leaves running is killed."""
    launch = subprocess.Popen(
        [*TPTRAIN, "launch", *overrides],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    STARTED.append(launch)
    return launch


def kill_what_was_left() -> None:
    """Of the launches that a failed test did not see to their end, and all their ranks."""
    while STARTED:
        launch = STARTED.pop()
        if launch.poll() is None:
            for process in [*psutil.Process(launch.pid).children(recursive=True), psutil.Process(launch.pid)]:
                process.kill()
            launch.communicate()


def finish(launch: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> str:
    output, _ = launch.communicate(timeout=timeout_s)
    return output


def ranks_of(launch: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks of a local launch, in rank order: of each the supervisor, whose one child is the trainer."""
    started = psutil.Process(launch.pid).children(recursive=True)
    supervisors = [p for p in started if ENTRY in p.cmdline() and ENTRY not in _command_of(p.parent())]
    # One that is just starting another program shows no environment for an instant: it is there the next time.
    by_rank = {int(rank): p for p in supervisors if (rank := p.environ().get("SUBMITIT_LOCAL_GLOBALID"))}
    return [by_rank[rank] for rank in sorted(by_rank)]


def trainer_of(supervisor: psutil.Process) -> psutil.Process:
    return supervisor.children()[0]


def _command_of(process: psutil.Process | None) -> list[str]:
    return process.cmdline() if process else []


def wait_until(
    condition: Callable[[], bool],
    what: str,
    process: subprocess.Popen[str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process is None or process.poll() is None, f"ended before {what}:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


def losses(run_dir: Path) -> list[float]:
    """The loss of each step in metrics.jsonl."""
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "steps are unique and in order"
    return [row["loss"] for row in rows]


def rows_in(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
