"""`cluster=slurm`: submission of one Slurm job, through submitit; its ranks run directly under srun."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from launch import container, slurm
from launch.job import Entry, command_time, run_rank, shell_lines
from launch.run_dir import record_job
from tptrain.config import Config, UserError
from tptrain.config.schema import CPUS_OF_GPU, ClusterConfig
from tptrain.models.cost import RANK_BYTES, copy_size


def prepare(configs: list[Config], base: Path) -> None:
    """Whether Slurm is here and knows the partition and srun's options, and what it is to give the job.

    Prints which mounts a container has been given. Raises UserError.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "cluster=slurm: `sbatch` was not found. Run this on a login node of the cluster, or use cluster=local."
        )
    try:
        partitions = slurm.partitions()
    except slurm.SlurmError as error:
        raise UserError(f"cluster=slurm: Slurm does not answer: {error}.") from error
    wanted = configs[0].cluster.partition
    if wanted is not None and not set(wanted.split(",")) <= partitions:
        raise UserError(f"cluster.partition={wanted}: unknown to Slurm. Known: {', '.join(sorted(partitions))}.")
    try:
        slurm.check_srun(configs[0].cluster.srun)
    except slurm.SlurmError as error:
        raise UserError(f"cluster.srun: Slurm refuses it: {str(error).splitlines()[0]}") from error
    ask_for_share(configs[0])
    for config in configs[1:]:  # of a sweep, which is one job array
        config.cluster = replace(configs[0].cluster)
    for config in configs:
        check_memory(config)
    if line := container.notice(configs, base):
        print(line, file=sys.stderr)


def ask_for_share(config: Config) -> None:
    """Set `cluster.cpus_per_task` and `cluster.mem` of a job with GPUs, where the user has not: the part of a node that
    its GPUs are. Slurm's own default is one core, and some memory that the site chose.

    Raises UserError where a node has too few cores for its ranks.
    """
    cluster = config.cluster
    if not cluster.gpus_per_node or (cluster.cpus_per_task and cluster.mem):
        return
    node, tasks = slurm.node_shape(cluster.partition), cluster.tasks_per_node or 1
    if node is None:
        cluster.cpus_per_task = cluster.cpus_per_task or CPUS_OF_GPU
        return
    whole = max(cluster.gpus_per_node, node.gpus)
    if cluster.cpus_per_task is None:
        if (most := node.cpus // tasks) < CPUS_OF_GPU:
            raise UserError(
                f"cluster.cpus_per_task: not set, and a node has {node.cpus} cores for {tasks} ranks, of which each "
                f"needs {CPUS_OF_GPU}. Start fewer ranks a node, or insist: cluster.cpus_per_task={max(most, 1)}."
            )
        cluster.cpus_per_task = max(node.cpus * cluster.gpus_per_node // whole // tasks, CPUS_OF_GPU)
    cluster.mem = cluster.mem or f"{node.memory_mb * cluster.gpus_per_node // whole}M"


def check_memory(config: Config) -> None:
    """Raises UserError for a job with GPUs that asks for less of a node's memory than its ranks and saves take."""
    cluster, tasks = config.cluster, config.cluster.tasks_per_node or 1
    asked = re.fullmatch(r"([1-9]\d*)([KMGT]?)", (cluster.mem or "").upper())  # 0 is all that a node has
    if not cluster.gpus_per_node or asked is None:
        return
    copies, programs = copy_size(config, cluster.nodes * tasks, tasks), tasks * RANK_BYTES
    if int(asked[1]) * 1024 ** (" KMGT".index(asked[2] or "M")) < copies + programs:
        raise UserError(
            f"cluster.mem={cluster.mem}: the {tasks} ranks of a node take {(copies + programs) / 2**30:,.1f} GiB of "
            f"its memory: {copies / 2**30:,.1f} GiB for the copy of their state that saves of {config.model.name} "
            f"make, {programs / 2**30:,.1f} GiB for Python, torch and NCCL. Ask for more, or for more nodes."
        )


def submit(configs: list[Config], base: Path, entry: Entry) -> str:
    """Submit one run, or several as one job array with its logs in `base`; returns the job's id.

    Raises UserError with Slurm's own words where it refuses.
    """
    executor = _executor(configs, base)
    container.make_folders(configs)
    dirs = [config.run.dir for config in configs]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats sbatch's words there
            if len(configs) == 1:
                jobs = [executor.submit(run_rank, entry, dirs[0], {}, command_time())]
            else:
                count = len(dirs)
                jobs = executor.map_array(run_rank, [entry] * count, dirs, [{}] * count, [command_time()] * count)
    except (FailedJobError, subprocess.CalledProcessError) as error:
        lines = [line.strip() for line in (getattr(error, "stderr", None) or str(error)).splitlines() if line.strip()]
        reason = next((line for line in lines if "error:" in line), lines[0])
        raise UserError(f"cluster: Slurm refuses the job: {reason.removeprefix('sbatch: error: ')}") from error
    for folder, job in zip(dirs, jobs, strict=True):
        record_job(Path(folder), kind="slurm", id=job.job_id, logs=str(base / "logs" / job.job_id))
    return jobs[0].job_id.partition("_")[0]


def script(configs: list[Config], base: Path) -> str:
    """The sbatch script that `submit` would hand to Slurm, to the letter."""
    executor = _executor(configs, base)
    if len(configs) > 1:
        executor.parameters["map_count"] = len(configs)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _executor(configs: list[Config], base: Path) -> submitit.SlurmExecutor:
    executor = submitit.SlurmExecutor(base / "logs", python=configs[0].cluster.python)  # None: this one
    array = len(configs) > 1
    run_dir = shlex.quote(str(base)) + "/$SLURM_ARRAY_TASK_ID" if array else shlex.quote(configs[0].run.dir)
    executor.update_parameters(**_parameters(configs, base, run_dir))
    return executor


def allocation(cluster: ClusterConfig) -> dict[str, Any]:
    """What sbatch and srun are asked for under the same names."""
    return {
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks_per_node,
        "gpus_per_node": cluster.gpus_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }


def _parameters(configs: list[Config], base: Path, run_dir: str) -> dict[str, Any]:
    cluster = configs[0].cluster
    further = slurm.options(cluster.sbatch)
    if cluster.time is not None:
        further["time"] = cluster.time
    if cluster.mem is not None:
        further["mem"] = cluster.mem
    further["requeue" if cluster.max_restarts else "no-requeue"] = True
    # A rank that dies must not leave the others hanging in a collective.
    srun_args = ["--kill-on-bad-exit=1"]
    if cluster.cpus_per_task:  # since Slurm 22.05 srun does not take it over from sbatch
        srun_args.append(f"--cpus-per-task={cluster.cpus_per_task}")
    srun_args += slurm.flags(container.srun_options(configs, base))
    return {
        "job_name": base.name,
        **allocation(cluster),
        "time": None,  # submitit's default is 5 minutes; ours is the partition's
        "wckey": None,
        # A set-up line that fails ends the job. The trap keeps the script alive through a SIGTERM: srun goes on to its
        # end, and then it is decided whether the job goes back into the queue.
        "setup": ["set -e", *shell_lines(configs[0]), *container.shell_lines(cluster), "set +e", "trap : TERM"],
        "teardown": [
            "code=$?",
            f"{shlex.quote(sys.executable)} -m launch.restart {run_dir} $code",
            "exit $code",
        ],
        "signal_delay_s": cluster.grace_s,
        "srun_args": srun_args,
        "stderr_to_stdout": True,
        "additional_parameters": further,
    }
