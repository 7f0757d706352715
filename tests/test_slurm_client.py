"""The Slurm client, against commands that are missing, fail, are silent, or print what the real ones print."""

import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest

from launch import place, slurm
from launch.place import find_place, interface_towards
from launch.run_dir import record_job
from launch.runs import check_not_running
from launch.submit import ask_for_share, check_memory, prepare
from tptrain.config import UserError, load_config
from tptrain.records.run_dir import add_event

Fake = Callable[[str, str], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes a command of this name out of shell lines. Others of Slurm's are not there."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    def make(name: str, lines: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)

    return make


def test_a_missing_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.SlurmError, match="`sinfo` cannot be run: No such file"):
        slurm.partitions()
    assert slurm.show_job("7") == {}
    assert slurm.accounted({"7"}) == {}
    assert slurm.kill_wait_s() == 30


def test_a_command_that_fails(fake: Fake) -> None:
    fake("scancel", "echo scancel: error: Invalid job id 7 >&2; exit 1")
    with pytest.raises(slurm.SlurmError, match="`scancel --signal=INT 7`: scancel: error: Invalid job id 7"):
        slurm.cancel("7", signal="INT")


def test_a_command_that_gives_no_answer(fake: Fake) -> None:
    fake("sinfo", "exec sleep 20")
    with pytest.raises(slurm.SlurmError, match=r"`sinfo` gave no answer in 0 s"):
        slurm.ask("sinfo", timeout_s=0.1)


def test_states_of_jobs(fake: Fake) -> None:
    fake("squeue", "echo '7|PENDING|Nodes required for job are DOWN'; echo '8_1|RUNNING|None'")
    assert slurm.queued({"7", "8_1"}) == {
        "7": ("PENDING", "Nodes required for job are DOWN"),
        "8_1": ("RUNNING", ""),
    }
    fake("sacct", "echo '7|CANCELLED by 0'")
    assert slurm.accounted({"7"}) == {"7": "CANCELLED"}


def test_a_job_that_slurm_has_forgotten(fake: Fake) -> None:
    fake("squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert slurm.queued({"7"}) == {}
    assert not slurm.has_steps("7")


def test_what_slurm_shows_of_a_job(fake: Fake) -> None:
    fake("scontrol", "echo 'JobId=7 JobName=a=b Reason=TimeLimit Comment=two words Reason=other EndTime=Unknown'")
    shown = slurm.show_job("7")
    assert (shown["JobName"], shown["Reason"], shown["EndTime"]) == ("a=b", "TimeLimit", "Unknown")


def test_nodes_that_are_up(fake: Fake) -> None:
    fake("sinfo", "printf 'n1 idle\\nn2 down*\\nn3 mix~\\nn4 drain\\n'")
    assert slurm.nodes_up("gpu") == {"n1", "n3"}


def test_the_time_before_a_kill(fake: Fake) -> None:
    fake("scontrol", "echo 'KillOnBadExit           = 0'; echo 'KillWait                = 45 sec'")
    assert slurm.kill_wait_s() == 45


@pytest.mark.parametrize(("word", "ended", "refused"), [("COMPLETED", "stopped", False), ("STOPPED", "", True)])
def test_a_run_that_has_stopped_may_be_launched_again(
    fake: Fake, tmp_path: Path, word: str, ended: str, refused: bool
) -> None:
    """Slurm calls a job STOPPED that waits for SIGCONT; a run that has ended on a signal is `stopped` for us."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    record_job(run_dir, kind="slurm", id="7", logs="")
    if ended:
        add_event(run_dir, {"event": "end", "attempt": "7.0-0", "kind": ended, "message": "preempted"})
    fake("squeue", f"echo '7|{word}|None'" if refused else ":")
    fake("sacct", f"echo '7|{word}'")
    with pytest.raises(UserError, match="its job 7 is stopped") if refused else nullcontext():
        check_not_running(run_dir)


NODES = """\
cat <<'ROWS'
cpu*|128|515000|(null)
gpu|96|1031000|gpu:h100:8(S:0-1)
gpu|112|2063000+|gpu:h100:8(S:0-1)
mixed|64|500000|gpu:a100:4,gpu:t4:2
ROWS"""


@pytest.mark.parametrize(
    ("lines", "cpus", "mem"),
    [
        (["cluster.partition=gpu", "cluster.gpus_per_node=8"], 12, "1031000M"),  # of the smaller kind of node
        (["cluster.partition=gpu", "cluster.gpus_per_node=2"], 12, "257750M"),
        (["cluster.partition=gpu", "cluster.gpus_per_node=8", "cluster.cpus_per_task=6"], 6, "1031000M"),
        (["cluster.partition=gpu", "cluster.gpus_per_node=8", "cluster.mem=900G"], 12, "900G"),
        (["cluster.partition=mixed", "cluster.gpus_per_node=6"], 10, "500000M"),
        (["cluster.partition=mixed", "cluster.gpus_per_node=1", "cluster.tasks_per_node=4"], 4, "83333M"),  # no fewer
        (["cluster.gpus_per_node=8"], 4, None),  # the default partition tells of no GPU: the site decides on memory
        (["cluster.partition=gpu", "cluster.tasks_per_node=8"], None, None),  # a job without GPUs
    ],
)
def test_a_job_with_gpus_asks_for_its_share_of_cores_and_memory(
    fake: Fake, tmp_path: Path, lines: list[str], cpus: int | None, mem: str | None
) -> None:
    fake("sinfo", NODES)
    config = load_config(["cluster=slurm", f"run.dir={tmp_path / 'run'}", *lines])
    ask_for_share(config)
    assert (config.cluster.cpus_per_task, config.cluster.mem) == (cpus, mem)


def test_a_job_whose_ranks_find_too_few_cores_on_a_node_is_refused(fake: Fake, tmp_path: Path) -> None:
    fake("sinfo", "echo 'few|24|500000|gpu:8'")
    lines = ["cluster=slurm", f"run.dir={tmp_path / 'run'}", "cluster.partition=few", "cluster.gpus_per_node=8"]
    message = r"^cluster\.cpus_per_task: not set, and a node has 24 cores for 8 ranks, of which each needs 4\."
    with pytest.raises(UserError, match=message):
        ask_for_share(load_config(lines))
    config = load_config([*lines, "cluster.cpus_per_task=3"])  # the user's word
    ask_for_share(config)
    assert (config.cluster.cpus_per_task, config.cluster.mem) == (3, "500000M")


def test_a_gpu_job_that_asks_for_less_memory_than_its_ranks_and_saves_take_is_refused(
    fake: Fake, tmp_path: Path
) -> None:
    """A node of a run of one node holds the whole state, 89.7 GiB; and for each of 8 ranks 256 MiB and 2 GiB."""
    lines = [
        "cluster=slurm",
        f"run.dir={tmp_path / 'run'}",
        "model=llama3_8b",
        "parallel.tp=8",
        "cluster.gpus_per_node=8",
    ]
    check_memory(load_config([*lines, "cluster.mem=108G"]))
    check_memory(load_config([*lines, "cluster.mem=0"]))  # all of the node's
    check_memory(load_config([*lines, "cluster.mem=63G", "cluster.nodes=2"]))
    check_memory(load_config([*lines[:-1], "cluster.tasks_per_node=8", "cluster.mem=1G"]))  # without GPUs
    sums = "the 8 ranks of a node take 107.7 GiB of its memory: 91.7 GiB for the copy of their state that saves of "
    sums += "llama3_8b make, 16.0 GiB for Python, torch and NCCL. Ask for more"
    for mem, *changes in (
        ["107G"],
        ["92G"],  # enough for the saves alone
        ["110000M"],
        ["107G", "parallel.zero=0", "cluster.nodes=2"],
    ):
        with pytest.raises(UserError, match=rf"^cluster\.mem={mem}: {re.escape(sums)}"):
            check_memory(load_config([*lines, f"cluster.mem={mem}", *changes]))
    with pytest.raises(UserError, match=r"62\.9 GiB of its memory: 46\.9 GiB for"):
        check_memory(load_config([*lines, "cluster.mem=62G", "cluster.nodes=2"]))
    for command in ("sbatch", "sinfo"):
        fake(command, ":")
    with pytest.raises(UserError, match=r"^cluster\.mem=107G: "):  # before anything is submitted
        prepare([load_config([*lines, "cluster.mem=107G"])], tmp_path)


HOSTLISTS = {
    "n1": ["n1"],
    "n[1-3]": ["n1", "n2", "n3"],
    "n[08-10,12],m1": ["n08", "n09", "n10", "n12", "m1"],
    "r[1-2]c[0,3]": ["r1c0", "r1c3", "r2c0", "r2c3"],
    "gpu-a-[098-101]": ["gpu-a-098", "gpu-a-099", "gpu-a-100", "gpu-a-101"],
}


@pytest.mark.parametrize("names", HOSTLISTS)
def test_lists_of_nodes(names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.hostnames(names) == HOSTLISTS[names]


@pytest.mark.parametrize(("of_node", "stand_in"), [("1", 1), ("2", 2), ("4", 1)])
def test_reports_go_to_another_node_where_rank_0_s_is_out_of_reach(of_node: str, stand_in: int) -> None:
    """To its first rank; on one node to rank 1."""
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": of_node, "MASTER_ADDR": "n1", "MASTER_PORT": "7"}
    with patch.dict(os.environ, place, clear=True):
        assert (find_place().address, find_place().stand_in) == ("n1", stand_in)


def test_the_interface_towards_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = dict(sorted(psutil.net_if_addrs().items(), key=lambda each: each[0] == "lo"))
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"ib0": [], **interfaces})  # the loopback comes last
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


@pytest.mark.parametrize(
    ("variables", "interface"),
    [
        ({}, "towards n8"),
        ({"SLURM_NODEID": "0"}, "towards n9"),  # the first node's own route to itself is the loopback
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "ib0"),
        ({"SLURM_STEP_NODELIST": "n9"}, None),  # on one node any interface does
    ],
)
def test_gloo_takes_the_interface_of_the_route_to_the_first_node(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], interface: str | None
) -> None:
    """Rank 5 of two nodes; the routes are a stand-in."""
    step = {"SLURM_STEP_NODELIST": "n[8-9]", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    own = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    monkeypatch.setattr(os, "environ", {**step, **own, "SLURMD_NODENAME": "n9", **variables})
    monkeypatch.setattr(place, "interface_towards", lambda host: f"towards {host}")
    where = place.find_place()
    assert (where.rank, where.world, where.address) == (5, 8, os.environ["SLURM_STEP_NODELIST"].replace("[8-9]", "8"))
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interface
