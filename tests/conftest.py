"""The Slurm sandbox for the tests that need it, and a developer's own accounts kept out of all of them."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.commands import kill_what_was_left
from tptrain.ops.cpu.kernels import kernel_table
from tptrain.ops.cpu.library import PROCESSORS, load
from tptrain.ops.table import REFERENCE, Operations

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: no test waits for a network

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background job: commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

SANDBOX = Path(__file__).parent.parent / "scripts" / "slurm-sandbox"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-place",
        action="store_true",
        help="each fault of test_supervisor.py on four ranks of two worlds, not on one of each world",
    )
    parser.addoption(
        "--life",
        action="store_true",
        help="the whole life of test_life.py for five families, not for one",
    )
    parser.addoption(
        "--every-family",
        action="store_true",
        help="test_generate_transformers.py for every family of the zoo, not for some",
    )


_starting: list[subprocess.Popen[bytes]] = []  # the sandbox, where this session starts it


def pytest_collection_finish(session: pytest.Session) -> None:
    """The sandbox takes half a minute to come up, and minutes to install: it does so beside the first tests."""
    wanted = any(item.get_closest_marker("slurm") for item in session.items) and not session.config.option.collectonly
    if wanted and subprocess.run([SANDBOX, "status"], capture_output=True, check=False).returncode != 0:
        nowhere = subprocess.DEVNULL
        _starting.append(subprocess.Popen([SANDBOX, "up"], stdin=nowhere, stdout=nowhere, stderr=nowhere))


def pytest_sessionfinish() -> None:
    for up in _starting:
        up.wait()
        subprocess.run([SANDBOX, "down"], capture_output=True, check=False)


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """A real Slurm. Skips, with the reason, where it cannot run."""
    for up in _starting:
        up.wait(300)
    # It is up now, and this tells where; or it tells why not.
    started = subprocess.run([SANDBOX, "up"], capture_output=True, text=True, timeout=300, check=False)
    if started.returncode != 0:
        reason = started.stderr.strip().splitlines()[-1]
        if os.environ.get("CI") and os.geteuid() == 0:
            pytest.fail(f"the Slurm sandbox must start in CI: {reason}")
        pytest.skip(f"no Slurm sandbox: {reason}")
    os.environ["SLURM_CONF"] = started.stdout.strip().removeprefix("export SLURM_CONF=")
    yield
    del os.environ["SLURM_CONF"]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def kernels(compiled: Path) -> Iterator[Operations]:
    """The table of the CPU's own kernels; the number of threads is again as before after the test."""
    if torch.backends.cpu.get_cpu_capability() not in PROCESSORS:
        pytest.skip("this processor has neither AVX-512 nor AVX2")
    library = load(compiled)
    assert library is not None, "the kernels do not compile"
    threads = torch.get_num_threads()
    yield kernel_table(library, REFERENCE)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _skip_cuda(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture(autouse=True)
def _nothing_runs_on() -> Iterator[None]:
    yield
    kill_what_was_left()
