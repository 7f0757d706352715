"""One rank of a run as a process: from the rendezvous to its last word, which its supervisor reads in the black box."""

import contextlib
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from tptrain.config import Config, UserError
from tptrain.config.load import write_atomically
from tptrain.config.schema import MOST_AT_ONCE
from tptrain.records.run_dir import add_event
from tptrain.watch.black_box import BlackBox
from tptrain.watch.outcome import Outcome, device_fault
from tptrain.watch.place import Allocation

# CUDA's and NCCL's word, and that of torch's allocator for the CPU, where they do not raise torch.OutOfMemoryError.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
LOCK_S = 60  # for a superseded attempt of the same job to notice and let go


def run(
    config: Config,
    box: BlackBox,
    allocation: Allocation | None,
    attempt: str,
    claim: Callable[[], None] = lambda: None,
) -> int:
    """Train as one rank, whose place the environment tells; rank 0 calls `claim` once all ranks are there.

    Returns the exit code of its outcome.
    """
    import torch.distributed as dist

    from tptrain.checkpoint.commit import CheckpointError
    from tptrain.run.preflight import RendezvousError, ReportedByRank0, check_disk, check_run_dir
    from tptrain.run.rendezvous import connect_ranks, meet, surroundings
    from tptrain.train.loop import Diverged, train
    from tptrain.train.samples import prompts_of
    from tptrain.train.stop import Stop

    def fail(outcome: Outcome, text: str) -> int:
        box.end(outcome, text)
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            print(f"{f'[rank {box.rank}] ' if box.rank else ''}error: {text}", file=sys.stderr, flush=True)
        return outcome.exit_code

    folder = Path(config.run.dir)
    try:
        with contextlib.ExitStack() as stack:

            def own() -> None:
                check_disk(config)
                prompts_of(config)  # a mistake in them ends the run here, not when the first samples are due
                claim()
                stack.enter_context(_own(folder, attempt))

            rendezvous = meet(config, box)
            rendezvous.meeting.on_main("own", own)
            check_run_dir(rendezvous.meeting, rendezvous.reports, config)
            mesh = connect_ranks(config, box, rendezvous)
            if mesh.is_main:
                for line in surroundings(config, rendezvous, os.environ):
                    print(line, flush=True)
                begin = {"event": "start", "attempt": attempt, "time": time.time()}
                add_event(folder, begin | {"tp": mesh.size("tp"), "dp": mesh.size("dp"), "nodes": rendezvous.nodes})
            agreed = train(config, mesh, Stop(mesh, allocation), rendezvous.ops)
            box.touch("end")
            outcome, message = Outcome.DONE, f"step {box.state.step}"
            if agreed is not None:
                outcome, message = Outcome.STOPPED if agreed.requeue else Outcome.CANCELLED, agreed.reason
            box.end(outcome, message)
            if mesh.is_main:
                last = {"event": "last", "attempt": attempt, "kind": outcome, "message": message}
                add_event(folder, last | {"step": box.state.step})
            dist.destroy_process_group()
        return outcome.exit_code
    except ReportedByRank0 as error:
        box.end(Outcome.USER, f"{error}")
        return Outcome.USER.exit_code
    except UserError as error:
        return fail(Outcome.USER, f"{error}")
    except Diverged as error:
        return fail(Outcome.DIVERGED, f"{error}")
    except RendezvousError as error:
        return fail(Outcome.INFRA, f"{error}")
    except (CheckpointError, OSError) as error:
        full = "no space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError) and not full:
            return _bug(error, box)
        if isinstance(error, OSError):
            return fail(
                Outcome.DISK, f"no space left on the device: {error.filename or folder}. Free some and launch again"
            )
        return fail(Outcome.DISK if full else Outcome.BUG, f"{error}")
    except (RuntimeError, MemoryError) as error:
        cause = _cause(error, config, box.state.step)
        return fail(*cause) if cause is not None else _bug(error, box)
    except Exception as error:
        return _bug(error, box)


def _cause(error: Exception, config: Config, step: int) -> tuple[Outcome, str] | None:
    """What is known to raise such an error; None where it is a bug."""
    import torch

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return Outcome.USER, out_of_memory(config, text, step)
    if fault := device_fault(text):
        return Outcome.DEVICE, fault
    if "unspecified launch failure" in text:
        return Outcome.INFRA, f"the device stopped, or a kernel of ours: {text.splitlines()[0]}"
    if is_lost_rank(error):
        return Outcome.INFRA, f"lost another rank: {text.split('] ', 1)[-1].split('. ')[0]}"
    return None


def is_lost_rank(error: Exception) -> bool:
    """Whether it is what a collective raises where another rank is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def out_of_memory(config: Config, text: str, step: int) -> str:
    """What a rank's message that memory is short comes to: torch's figures, and what would need less."""
    # "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total capacity of ...", then processes by their ids.
    parts = text.split("\n")[0].split(". ")
    figures = [part for part in parts if not part.startswith("Process ") and "out of memory" not in part][:4]
    train, changes = config.train, []
    if (size := train.micro_batch_size or MOST_AT_ONCE) > 1:
        changes.append(f"train.micro_batch_size={size // 2}")
    native = config.model.engine != "transformers"  # which alone has the next two
    if train.recompute != "full":
        changes.append("train.recompute=" + ("selective" if train.recompute == "none" and native else "full"))
    if native and not config.parallel.sequence_parallel and config.parallel.tp > 1 and not config.parallel.overlap:
        changes.append("parallel.sequence_parallel=true")
    changes.append(f"a parallel.tp above {config.parallel.tp}")
    return (
        f"out of memory after step {step}{': ' if figures else ''}{'. '.join(figures)}. It would not fit the next time "
        f"either. What needs less: {', or '.join(changes)}. `python -m tptrain plan` with these settings says how much."
    )


def _bug(error: Exception, box: BlackBox) -> int:
    traceback.print_exc()
    box.end(Outcome.BUG, "".join(traceback.format_exception_only(error)).strip())
    return Outcome.BUG.exit_code


@contextlib.contextmanager
def run_lock(folder: Path, patience_s: float = 0) -> Iterator[None]:
    """Held by rank 0 for as long as it trains. Raises UserError where another process holds it."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=patience_s)
    except filelock.Timeout as error:
        raise UserError(
            f"run.dir={folder}: another process is training in it. Wait for it, stop it, or choose another run.dir."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _own(folder: Path, attempt: str) -> Iterator[None]:
    """The run's lock, and `logs/attempt` naming who has it.

    A dead node's ranks may live on after Slurm has restarted their job elsewhere. An earlier attempt of the same job
    reads there that it is superseded, its supervisor ends it, and so lets go of the lock.
    """
    current = folder / "logs" / "attempt"
    current.parent.mkdir(exist_ok=True)
    ours = current.exists() and current.read_text().rpartition("-")[0] == attempt.rpartition("-")[0]
    if ours:
        write_atomically(current, attempt)
    with run_lock(folder, LOCK_S if ours else 0):
        write_atomically(current, attempt)
        yield
