"""One rank of a run as a process: signals, the run's lock, exit codes. Imports torch only once it runs."""

import contextlib
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import filelock

from tptrain.config import Config, UserError

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class StopRequest:
    """Remembers the signal that asked this rank to stop. While the run is being built, a signal ends it at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.training = False
        for name in SIGNALS:
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:  # who started us wants it ignored
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if not self.training:
            raise KeyboardInterrupt

    def __call__(self) -> str | None:
        self.training = True
        return self.name


def run(config: Config, before: Callable[[], None] = lambda: None) -> int:
    """Train as one rank, the place of which is told by the environment; `before` runs first, on rank 0 alone.

    Returns the exit code: 0 done (or stopped with a checkpoint), 2 a user's mistake, 1 anything else.
    """
    stop = StopRequest()
    rank = 0
    try:
        import torch.distributed as dist

        from tptrain.checkpoint import CheckpointError
        from tptrain.mesh import build_mesh
        from tptrain.train import Diverged, train
    except KeyboardInterrupt:
        return 1
    try:
        mesh = build_mesh(config)
        rank = mesh.rank
        if len(set(mesh.gather(config.run.dir))) > 1:
            raise UserError("run.dir: the ranks disagree on it. Give all of them the same run.name or run.dir.")
        with contextlib.ExitStack() as stack:
            mesh.main_first(lambda: (before(), stack.enter_context(run_lock(Path(config.run.dir or ".")))))
            train(config, mesh, stop)
        mesh.close()
        return 0
    except UserError as error:
        _complain(rank, f"{error}")
        return 2
    except (CheckpointError, Diverged) as error:
        _complain(rank, f"{error}")
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(rank, f"no space left on the device: {error.filename or config.run.dir}. Free some and launch again")
        return 1
    except RuntimeError as error:  # a collective failed, as it does when another rank is gone
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        _complain(rank, f"lost another rank: {str(error).split('] ', 1)[-1].split('. ')[0]}")
        return 1
    except KeyboardInterrupt:
        _complain(rank, f"{stop.name} before the first step: nothing was trained, nothing to save")
        return 1


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Held by rank 0 for as long as it trains. Raises UserError where another process holds it."""
    lock = filelock.FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(
            f"run.dir={run_dir}: another process is training in it. Wait for it, stop it, or choose another run.dir."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _complain(rank: int, text: str) -> None:
    where = f"[rank {rank}] " if rank else ""
    with contextlib.suppress(OSError):  # the log may lie on the disk that is full
        print(f"{where}error: {text}", file=sys.stderr, flush=True)
