"""Signals at random moments to single processes of a run on this machine; in the end it must be whole.

    python -m tests.soak FOLDER --ranks 4 --signals 50

Each round launches (or resumes) the run, signals one process (a rank's supervisor or trainer, or the controller that
started the ranks) at a random moment of its start-up, training, saving or validation, and waits for the launch to end
by itself. Nothing may hang, no committed step may be lost, no process may stay, and the launch must name who was
killed. At the end the losses must be those of a run that nothing disturbed, bit for bit.
"""

import argparse
import contextlib
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.commands import finish, losses, ranks_of, start_launch, tptrain, trainer_of
from tests.corpus import overrides
from tptrain.records.run_dir import committed, step_of

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1, signal.SIGHUP)  # a local rank ignores SIGINT
LONGEST_S = 90  # that a launch may take to end after its signal


@dataclass
class Tally:
    """What was seen."""

    rounds: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0  # from signal to end


def lines_for(folder: Path, name: str, ranks: int, steps: int) -> list[str]:
    return [
        *overrides(folder, name),
        "parallel.tp=2",
        f"cluster.tasks_per_node={ranks}",
        f"train.steps={steps}",
        "train.micro_batch_size=1",
        "train.eval_every=5",
        "checkpoint.every=3",
        "optim=constant",
        "train.seq_len=128",  # longer steps: fewer are needed to outlast the signals
    ]


def soak(folder: Path, ranks: int, signals: int, steps: int, seed: int = 0, start_up_s: float = 6.0) -> Tally:
    """Returns the tally; raises AssertionError for anything that must not be."""
    draw, tally = random.Random(seed), Tally()
    lines = lines_for(folder, f"soaked-{ranks}", ranks, steps)
    run_dir = folder / f"soaked-{ranks}"
    newest = 0
    while tally.rounds < signals:
        launch = start_launch(*lines)
        moment = time.monotonic() + draw.uniform(0.5, 2 * start_up_s)
        while time.monotonic() < moment and launch.poll() is None:
            time.sleep(0.01)
        what, name = None, ""
        while what is None and launch.poll() is None:  # there may be no rank yet
            what, name = _signal_one(launch, draw)
        signalled = time.monotonic()
        everybody = psutil.Process(launch.pid).children(recursive=True) if launch.poll() is None else []
        try:
            output = finish(launch, LONGEST_S)
        except subprocess.TimeoutExpired:
            for process in everybody:
                process.kill()
            raise AssertionError(f"{what}: did not end in {LONGEST_S} s") from None
        tally.slowest_s = max(tally.slowest_s, time.monotonic() - signalled)
        _, alive = psutil.wait_procs(everybody, timeout=5)
        assert not alive, f"{what}: left behind {alive}"
        assert "Traceback" not in output, f"{what}:\n{output}"
        if what is not None and name and "finished: step" not in output:
            assert re.search(name, output), f"{what}:\n{output}"
        saved = [step_of(path) for path in committed(run_dir / "checkpoints")]
        assert max(saved, default=0) >= newest, f"{what}: lost step {newest}, has {saved}"
        newest = max(saved, default=0)
        if what is None:
            assert "finished" in output, output
            break
        tally.rounds += 1
        tally.ends[_how(output)] += 1
        print(f"{tally.rounds:3d}  {what}: {_how(output)}; checkpoint {newest}", flush=True)
    last = tptrain("launch", *lines, timeout_s=3600)
    assert last.returncode == 0, last.stdout
    return tally


def _signal_one(launch: subprocess.Popen[str], draw: random.Random) -> tuple[str | None, str]:
    """Signal one of the run's processes; returns which, None where there was none yet or any more, and the pattern of
    the launch's answer, where it must name somebody.
    """
    with contextlib.suppress(psutil.Error, IndexError, KeyError, ValueError):
        number = draw.choice(SIGNALS)
        (controller,) = psutil.Process(launch.pid).children()
        rank = draw.randrange(-1, len(supervisors := ranks_of(launch)))
        if rank < 0:
            process, who, pattern = controller, "the controller", rf"\(pid {controller.pid}\) was killed"
        else:
            process, pattern = draw.choice([supervisors[rank], trainer_of(supervisors[rank])]), rf": rank {rank} "
            who = f"rank {rank} ({'supervisor' if process == supervisors[rank] else 'trainer'})"
        process.send_signal(number)
        kills = number == signal.SIGKILL or (
            rank < 0 and number != signal.SIGTERM
        )  # which alone the controller handles
        return f"{number.name} to {who}", pattern if kills else ""
    time.sleep(0.01)
    return None, ""


def _how(output: str) -> str:
    for words in ("finished: step", "saved; launch again", "before the first step", "a second signal"):
        if words in output:
            return words
    return output.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--signals", type=int, default=50)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup all of the run would ignore it
    options.folder.mkdir(parents=True, exist_ok=True)
    tally = soak(options.folder, options.ranks, options.signals, options.steps, options.seed)
    assert tally.rounds == options.signals, f"the run was done after {tally.rounds} signals: give more --steps"
    calm = lines_for(options.folder, f"calm-{options.ranks}", options.ranks, options.steps)
    assert tptrain("launch", *calm, timeout_s=3600).returncode == 0
    same = losses(options.folder / f"calm-{options.ranks}") == losses(options.folder / f"soaked-{options.ranks}")
    print(f"{tally}\nlosses equal bit for bit: {same}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
