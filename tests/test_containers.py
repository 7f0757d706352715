"""Ranks in containers: the mounts they need, the job script of the README, and a run without Slurm's commands inside.

Nothing here runs a container. The sandbox's srun takes pyxis's options, which have no effect there; what they would do
(a root of its own, the mounts, the working directory, variables of the image) is done by `ENTER` below.
"""

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from launch import container
from tests.commands import TPTRAIN, environment, losses, rows_in, wait_until
from tests.corpus import overrides
from tests.test_slurm import ask, wait_for_end
from tptrain.config import Config, UserError, check_cluster, load_config
from tptrain.config.containers import PYXIS_OPTIONS
from tptrain.records.run_dir import committed, events

ROOT = Path(__file__).parent.parent
IMAGE = ["cluster.srun.container-image=nvcr.io/nvidia/pytorch:25.10-py3", "cluster.python=python"]


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For PYTHONPATH: a folder with which Python cannot import torch, like a login node's."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "torch.py").write_text("raise ImportError('this host has no torch')\n")
    return str(folder)


def launch(*lines: str, python_path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command, variables = [*TPTRAIN, "launch", *lines], environment(PYTHONPATH=python_path, **variables)
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


# -------------------------------------------------------------------------------------------------------------- mounts


def config(folder: Path, *lines: str) -> Config:
    """Of the run `folder`/run, as loaded for Slurm."""
    kept = [line for line in overrides(folder) if line.startswith(("data", "run"))]
    return load_config([*kept, "cluster=slurm", "cluster.tasks_per_node=1", *lines])


def mounts(folder: Path, *lines: str) -> list[str]:
    options = container.srun_options([config(folder, *IMAGE, *lines)], folder / "run")
    return options["container-mounts"].split(",")


def same_place(*paths: Path) -> list[str]:
    return [f"{path}:{path}" for path in paths]


def test_what_the_ranks_need_is_mounted(tmp_path: Path) -> None:
    """The folder that holds the data holds the cache and the run too, and is mounted once."""
    assert mounts(tmp_path) == same_place(ROOT, tmp_path)


def test_what_the_users_mounts_show_is_not_mounted_again(tmp_path: Path) -> None:
    top = tmp_path.parent
    key = "cluster.srun.container-mounts"
    assert mounts(tmp_path, f"{key}=[/scratch,{top}]") == ["/scratch", str(top), *same_place(ROOT)]
    read_only = [f"{ROOT}:{ROOT}:ro", f"{top}:{top}:ro+rprivate"]
    written = same_place(tmp_path / "data", tmp_path / "run")
    assert mounts(tmp_path, f"{key}='{','.join(read_only)}'") == [*read_only, *written]
    assert mounts(tmp_path, f"{key}={top}:/mnt") == [f"{top}:/mnt", *same_place(ROOT, tmp_path)]


def test_links_are_mounted_with_what_they_lead_to(tmp_path: Path) -> None:
    """A model of the hub's cache is a folder of links to blobs."""
    model, blobs, texts = tmp_path / "snapshot", tmp_path / "blobs", tmp_path / "texts"
    for folder in (model, blobs, texts):
        folder.mkdir()
    (blobs / "1").write_text('{"model_type": "llama"}')
    (model / "config.json").symlink_to(blobs / "1")
    (texts / "a.jsonl").symlink_to(blobs / "1")
    lines = ["model=hf", f"model.path={model}", f"data.files=['{texts}/*.jsonl']", "data.tokenizer=bytes"]
    assert mounts(tmp_path, *lines) == same_place(ROOT, texts, blobs, model, tmp_path / "data", tmp_path / "run")
    loaded = config(tmp_path, *IMAGE, *lines)
    shutil.rmtree(model)  # a run that has a checkpoint no longer needs it
    assert str(model) not in container.srun_options([loaded], tmp_path / "run")["container-mounts"]


def test_the_images_variables_do_not_replace_the_users(tmp_path: Path) -> None:
    loaded = config(tmp_path, *IMAGE, "cluster.env.NCCL_DEBUG=INFO", "cluster.srun.container-env=[HF_HOME]")
    assert container.srun_options([loaded], tmp_path)["container-env"] == "HF_HOME,NCCL_DEBUG"


def test_another_runtime_is_told_what_must_be_visible(tmp_path: Path) -> None:
    """By the line before the submission; the checkout comes by PYTHONPATH, which the runtime hands on."""
    loaded = config(tmp_path, "cluster.python='apptainer exec --nv image.sif python'")
    line = container.notice([loaded], tmp_path / "run") or ""
    assert line.endswith(f"must be visible inside, as here: {ROOT}, {tmp_path}")
    assert container.srun_options([loaded], tmp_path / "run") == {}
    (export,) = container.shell_lines(loaded.cluster)
    shown = subprocess.run(
        ["bash", "-c", f"cd /; {export}; {sys.executable} -S -c 'import launch; print(launch.__file__)'"],
        env=os.environ | {"PYTHONPATH": "/elsewhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == str(ROOT / "launch" / "__init__.py")


MISTAKES = {
    "cluster.srun.kill-on-bad-exit=0": "cluster.srun.kill-on-bad-exit: not to be set this way. tptrain sets it itself",
    "cluster.srun.cpus_per_task=4": "cluster.srun.cpus_per_task: not to be set this way. Use cluster.cpus_per_task.",
    "cluster.srun.kill=0": "cluster.srun.kill: not to be set this way. tptrain sets it itself",
    "cluster.srun.export=NONE": "Use cluster.env.",
    "cluster.srun.container.image=a": "cluster.srun.container={'image': 'a'}: not the value of an option.",
    "cluster.srun.container-image=a": "cluster.python: not set, and cluster.srun.container-image has the ranks run in",
    "cluster.srun.container_mount=a:b": "cluster.srun.container_mount=a:b: not the full name of an option for "
    "containers. Did you mean cluster.srun.container-mounts?",
    "cluster.srun.container-im=a": "Did you mean cluster.srun.container-image?",
    "cluster.srun.container-u=net": "Did you mean cluster.srun.container-unshare?",
    "cluster.srun.container_writeable=true": "Did you mean cluster.srun.container-writable?",
    "cluster.srun.container-mount-hme=true": "Did you mean cluster.srun.container-mount-home?",
    "cluster.srun.container-picture=a": "not the full name of an option for containers. Did you mean cluster.srun.",
    "cluster.sbatch.container-image=a": "Use cluster.srun.container-image.",
    "cluster.sbatch.no_container_mount_home=true": "Use cluster.srun.no_container_mount_home.",
    """cluster.python="'python" """.strip(): "not a shell command (No closing quotation)",
    "cluster.python=' '": "not a shell command (it is empty)",
    "cluster=local": "cluster.srun: only Slurm knows it.",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_named_before_anything_is_submitted(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=re.escape(MISTAKES[line])):
        check_cluster(config(tmp_path, "cluster.srun.mpi=none", line))


def test_pyxis_s_options_and_slurm_s_own_are_known(tmp_path: Path) -> None:
    names = re.findall(r'(?:WITH_ARGUMENT|FLAG)\("([\w-]+)"', (ROOT / "scripts" / "pyxis_options.c").read_text())
    assert {name for name in names if name.startswith("container")} == set(PYXIS_OPTIONS)
    lines = [f"cluster.srun.{name}=true" for name in (*names, "container", "container-id")]
    check_cluster(config(tmp_path, "cluster.python=python", *lines))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("cluster.srun.container-mounts='/a:{folder}/run'", "/a takes the place of {folder}/run, which this run needs"),
        ("run.dir='{folder}/a:b'", "{folder}/a:b: pyxis mounts no path with"),
    ],
)
def test_mounts_that_cannot_work(tmp_path: Path, line: str, words: str) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").touch()
    loaded = config(tmp_path, *IMAGE, f"data.files=[{texts}/a.txt]", line.format(folder=tmp_path))
    with pytest.raises(UserError, match=re.escape(words.format(folder=tmp_path))):
        container.notice([loaded], Path(loaded.run.dir))


# ---------------------------------------------------------------------------------------------------------- the script

SCRIPT = """\
#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --cpus-per-task=12
#SBATCH --exclude=n1
#SBATCH --gpus-per-node=8
#SBATCH --job-name=first
#SBATCH --mem=2000000M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output={run}/logs/%j_0_log.out
#SBATCH --partition=h100
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1-00:00:00

# setup
set -e
export GLIBC_TUNABLES=${{GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}}
export PYTORCH_ALLOC_CONF=${{PYTORCH_ALLOC_CONF:-${{PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}}}
export CUDA_DEVICE_MAX_CONNECTIONS=${{CUDA_DEVICE_MAX_CONNECTIONS:-1}}
export NCCL_SOCKET_IFNAME=ib0
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}
set +e
trap : TERM

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {run}/logs/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=12 \
--container-image=nvcr.io/nvidia/pytorch:25.10-py3 --mpi=none --container-readonly \
--container-mounts=/scratch:/scratch:ro,{root}:{root},{tokenizer}:{tokenizer},{cache}:{cache},{run}:{run} \
--container-workdir={root} --container-env=NCCL_SOCKET_IFNAME python -u -m submitit.core._submit {run}/logs


# teardown
code=$?
{python} -m launch.restart {run} $code
exit $code
"""


def flagship(tokenizer: Path) -> list[str]:
    """The overrides of the README's command for Slurm, for a partition and a node of the sandbox."""
    blocks = (ROOT / "README.md").read_text().split("```")
    (command,) = [block for block in blocks if "cluster.env.NCCL_SOCKET_IFNAME" in block]
    words = shlex.split(command.replace("\\\n", " "))
    own = {"cluster.partition": "h100", "cluster.sbatch.exclude": "n1", "data.tokenizer": str(tokenizer)}
    pairs = [word.split("=", 1) for word in words[words.index("launch") + 1 :]]
    assert own.keys() <= dict(pairs).keys()
    return [f"{key}={own.get(key, value)}" for key, value in pairs]


def flagship_script(tmp_path: Path, python_path: str, **variables: str) -> str:
    """The script that the README's command makes, after it has been read line by line."""
    tokenizer = tmp_path / "tokenizer.json"
    ids = {f"word{n}": n for n in range(128_000)} | {"<|end_of_text|>": 128_001}
    tokenizer.write_text(json.dumps({"model": {"vocab": ids}}))
    run, cache = tmp_path / "runs" / "first", tmp_path / "cache"
    lines = [*flagship(tokenizer), f"run.dir={run}", f"data.cache_dir={cache}", *IMAGE, "cluster.srun.mpi=none"]
    lines += ["cluster.srun.container_readonly=true", "cluster.srun.container-mounts=/scratch:/scratch:ro"]
    dry = launch(*lines, "cluster.dry_run=true", python_path=python_path, **variables)
    assert dry.returncode == 0, dry.stderr
    assert dry.stderr == f"added to the container's mounts: {ROOT}, {tokenizer}, {cache}, {run}\n"
    python = shlex.quote(sys.executable)
    assert dry.stdout == SCRIPT.format(run=run, root=ROOT, tokenizer=tokenizer, cache=cache, python=python)
    assert not run.exists()
    return dry.stdout


def test_the_readmes_command_makes_this_script(tmp_path: Path, without_torch: str) -> None:
    """Where Slurm's commands say of the partition what the sandbox's do; `sbatch` is not called."""
    shape = "h100|96|2000000|gpu:h100:8"
    commands = {"sinfo": f'case "$*" in *%R*) echo h100;; *) echo "{shape}";; esac', "srun": "", "sbatch": "exit 1"}
    for name, line in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    flagship_script(tmp_path, without_torch, PATH=f"{tmp_path}:/usr/bin:/bin")


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_slurm_takes_the_readmes_script(tmp_path: Path, without_torch: str) -> None:
    text, script = flagship_script(tmp_path, without_torch), tmp_path / "job.sh"
    script.write_text(text)
    of_job = re.findall(r"#SBATCH (.*)", text)
    of_ranks = shlex.split(next(line for line in text.splitlines() if line.startswith("srun")))[1:]
    of_job.remove("--requeue")  # which srun does not have
    for command in (["sbatch", "--test-only", str(script)], ["srun", "--test-only", *of_job, *of_ranks]):
        tested = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert tested.returncode == 0, tested.stderr
        assert "to start at" in tested.stderr
        assert "using 192 processors on nodes h[1-2] in partition h100" in tested.stderr


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_an_option_that_srun_does_not_know_is_refused(tmp_path: Path) -> None:
    """It would end the job when it starts, after days in the queue."""
    lines = [*overrides(tmp_path), "cluster=slurm", "cluster.tasks_per_node=1", "cluster.srun.no-picture=a"]
    refused = launch(*lines, python_path="")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: cluster.srun: Slurm refuses it: ")
    assert "unrecognized option '--no-picture=a'" in refused.stderr
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------- a run

# What runs in the place of the container's Python, as pyxis and an image would have it: a root with the mounts of
# srun's line and little else, the working directory of that line, and PYTHONPATH as the image has it, not the job.
ENTER = """
import os, shutil, subprocess, sys

def show(path):
    inside = {root!r} + path
    if os.path.isdir(path):
        os.makedirs(inside, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        open(inside, "w").close()
    subprocess.run(["mount", "--rbind", path, inside], check=True)

subprocess.run(["mount", "-t", "tmpfs", "container", {root!r}], check=True)
for path in sorted({paths!r}):
    show(path)
os.makedirs({root!r} + "/tmp", exist_ok=True)
os.chroot({root!r})
os.chdir({workdir!r})
print("of Slurm inside:", [name for name in ("srun", "scontrol", "squeue") if shutil.which(name)], flush=True)
os.environ["PYTHONPATH"] = {packages!r}
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


def enter(folder: Path, srun: str) -> None:
    """Write `folder`/enter.py: ENTER, for the options of this srun line."""
    options = dict(word.split("=", 1) for word in shlex.split(srun) if "=" in word)
    shown = [mount.split(":")[0] for mount in options.get("--container-mounts", "").split(",")]
    python, packages = os.path.realpath(sys.executable), os.path.realpath(site.getsitepackages()[0])
    image = ["/lib", "/lib64", "/usr/lib", "/etc", "/dev", "/proc", "/sys", f"{sys.base_prefix}/lib", python, packages]
    (folder / "root").mkdir()
    text = ENTER.format(
        root=str(folder / "root"),
        paths=[*shown, *(path for path in image if os.path.exists(path) and path not in shown)],
        workdir=options.get("--container-workdir", "/"),
        packages=packages,
        python=python,
    )
    (folder / "enter.py").write_text(text)


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_ranks_without_slurms_commands_stop_and_go_on(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, without_torch: str
) -> None:
    """Two ranks in a root that has nothing of Slurm; the host, which has no torch, puts the job back into the queue."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    folder, run = tmp_path_factory.mktemp("image"), tmp_path / "run"
    lines = [*overrides(tmp_path), "train.steps=200", "train.seq_len=64", "checkpoint.every=0", "parallel.tp=2"]
    lines += ["cluster=slurm", "cluster.tasks_per_node=2", "cluster.srun.container-image=pretended"]
    lines += [f"data.cache_dir={folder}/packed"]  # to be mounted, and not there yet
    lines += [f"cluster.python='unshare --mount {sys.executable} -I {folder}/enter.py'"]
    dry = launch(*lines, "cluster.dry_run=true", python_path=without_torch)
    enter(folder, next(line for line in dry.stdout.splitlines() if line.startswith("srun")))
    submitted = launch(*lines, python_path=without_torch)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split("submitted Slurm job ")[1].split(",")[0]
    wait_until(lambda: rows_in(run) >= 5 or "end" in [event["event"] for event in events(run)], "five steps")
    assert rows_in(run) >= 5, (run / "logs" / f"{job}_0_log.out").read_text()
    ask("scancel", "--signal=USR2", job)
    assert wait_for_end(job) == "COMPLETED"
    log = (run / "logs" / f"{job}_1_log.out").read_text()
    assert log.count("of Slurm inside: []") == 2
    stopped, done = [event for event in events(run) if event["event"] == "end"]
    assert (stopped["kind"], stopped["requeued"], done["kind"]) == ("stopped", True, "done")
    assert 5 <= stopped["step"] < 200
    assert stopped["checkpoint"] == f"step-{stopped['step']:08d}"
    assert len(losses(run)) == 200
    assert [path.name for path in committed(run / "checkpoints")][-1] == "step-00000200"
