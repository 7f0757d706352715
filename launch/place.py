"""Where this process stands in the run: told by srun, torchrun, submitit's local executor, or alone.

Whoever started it, afterwards the environment has torchrun's variables, which is all that the mesh reads.
"""

import os
import re
import socket
import sys
import time
import zlib

import psutil

from launch import slurm
from tptrain.config import UserError
from tptrain.watch.place import Place


def on_slurm() -> bool:
    """Whether this process runs in a Slurm job, other than as a rank that submitit's local executor started there."""
    return "SLURM_JOB_ID" in os.environ and "SUBMITIT_LOCAL_NTASKS" not in os.environ


def find_place() -> Place:
    """Raises UserError where Slurm started several tasks and this process takes itself for the only one."""
    env = os.environ
    node = env.get("SLURMD_NODENAME") or socket.gethostname()
    restart = 0
    if "SUBMITIT_LOCAL_NTASKS" in env:
        job = env["TPTRAIN_JOB"]  # a process id comes again
        env["RANK"] = env["LOCAL_RANK"] = env["SUBMITIT_LOCAL_GLOBALID"]
        env["WORLD_SIZE"] = env["LOCAL_WORLD_SIZE"] = env["SUBMITIT_LOCAL_NTASKS"]
        env["MASTER_ADDR"] = "127.0.0.1"
    elif "TORCHELASTIC_RUN_ID" in env:
        job = f"torchrun-{env['TORCHELASTIC_RUN_ID']}.{env['MASTER_PORT']}"
        restart = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
        env.setdefault("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 or ("SLURM_STEP_NODELIST" in env and "RANK" not in env):
        job, restart = f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}", int(env.get("SLURM_RESTART_COUNT", 0))
        _take_slurm_variables(f"{job}-{restart}")
    elif "RANK" in env and "WORLD_SIZE" in env:  # somebody's own launcher
        job = f"{env.get('MASTER_ADDR')}-{env.get('MASTER_PORT')}"
        env.setdefault("LOCAL_WORLD_SIZE", env["WORLD_SIZE"])
        env.setdefault("LOCAL_RANK", str(int(env["RANK"]) % int(env["LOCAL_WORLD_SIZE"])))
    else:
        job = f"{node}-{os.getpid()}.{time.time():.0f}"
        _check_alone()
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(free_port())
    rank, world, first = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    stand_in = first if first < world else 1
    place = Place(rank, world, node, job, restart, env.get("MASTER_ADDR", "127.0.0.1"), stand_in, _nodes_of_ranks())
    env["TPTRAIN_ATTEMPT"], env["TPTRAIN_NODE"] = place.attempt, node
    return place


def _take_slurm_variables(attempt: str) -> None:
    env = os.environ
    rank, world = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env_rank, env_world = env.get("RANK", rank), env.get("WORLD_SIZE", world)
    if (env_rank, env_world) != (rank, world):
        if rank != "0":  # one message
            sys.exit(2)
        raise UserError(
            f"RANK={env_rank} WORLD_SIZE={env_world}: so says the environment, and Slurm says that this is rank "
            f"{rank} of {world}. Unset RANK and WORLD_SIZE (in your shell, cluster.env or cluster.setup)."
        )
    nodes = slurm.hostnames(env["SLURM_STEP_NODELIST"])
    if len(nodes) > 1 and "GLOO_SOCKET_IFNAME" not in env:
        # gloo would take the interface of the host's own name, which may be the loopback.
        name = interface_towards(nodes[0] if env.get("SLURM_NODEID") != "0" else nodes[1])
        env |= {} if name is None else {"GLOO_SOCKET_IFNAME": name}
    tasks = env["SLURM_STEP_TASKS_PER_NODE"].replace("(", ",").split(",")  # "4(x2)" or "2,1"
    env |= {
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[0],
        "MASTER_ADDR": nodes[0],
        # A restarted job keeps its id, and a dead attempt may still hold its port: the restart count moves it.
        "MASTER_PORT": str(20000 + zlib.crc32(attempt.encode()) % 12000),
    }


def _nodes_of_ranks() -> tuple[str, ...]:
    """The node of each rank of a Slurm step that fills one node after the other; empty where this is not known."""
    env = os.environ
    if "SLURM_STEP_NODELIST" not in env or not on_slurm():
        return ()
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))  # "4(x2)" or "2,1"
    counts = [int(tasks) for tasks, times in runs for _ in range(int(times or 1))]
    placed = [
        node
        for node, tasks in zip(slurm.hostnames(env["SLURM_STEP_NODELIST"]), counts, strict=False)
        for _ in range(tasks)
    ]
    rank, own = int(env["RANK"]), env.get("SLURMD_NODENAME")
    return tuple(placed) if len(placed) == int(env["WORLD_SIZE"]) and placed[rank] == own else ()


def interface_towards(host: str) -> str | None:
    """The network interface that the route to a host goes through; None where there is none."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(each.address == own for each in addresses)), None)


def _check_alone() -> None:
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if tasks > 1:
        raise UserError(
            f"this process is a world of one, and Slurm's job has {tasks} tasks. Start the ranks with "
            "`srun python -m tptrain train ...` (or unset SLURM_NTASKS to run one rank alone)."
        )


def free_port() -> int:
    """A port of this machine that nothing listens on just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
