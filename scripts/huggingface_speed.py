"""What the import and the export of a Hugging Face directory cost: time beside `dd`, memory, bytes read.

    python scripts/huggingface_speed.py FOLDER [--ranks 4] [--rounds 5]

Makes a Llama of 3 GB in 9 files below FOLDER, once. Then, in each round and in turn: `dd` reads the files with as many
processes as there are ranks, to /dev/null and into memory (/dev/shm: there the bytes stay, as a model's do); ranks read
their slices into a model (as `launch` does), once more from the page cache, and read and write them (`import`); `dd`
copies the files with as many processes and with one, and `export` writes them. Before each but the cached reading the
page cache is dropped, for which it must run as root. Then nothing happens for some seconds, for `dd` as for the ranks:
a virtual machine's host takes memory back that nobody uses, and to get it again costs more than to read.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from tptrain.checkpoint import safetensors, torch_dcp  # noqa: F401  (the second is imported by the first save)
from tptrain.checkpoint.export import export
from tptrain.checkpoint.huggingface import by_tensor, shapes, their_shape
from tptrain.checkpoint.pretrained import read_weights
from tptrain.config import Config, load_config
from tptrain.models.families import llama
from tptrain.models.settings import decoder_spec
from tptrain.ops.table import REFERENCE
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import tp_grid
from tptrain.records.run_dir import step_folder
from tptrain.run.convert import write
from tptrain.run.device import pick_device
from tptrain.train.trainer import build_model

FILES = 8  # of which the embedding and the head, which are larger than a part, make nine
IDLE_S = 10  # after the page cache was dropped
WORK = {
    "launch, reading": ["read"],
    "launch, reading from the page cache": ["read", "--cached"],
    "import, reading and writing": ["import"],
}
SETTINGS = ["model=llama3_1b", "model.tie_word_embeddings=false"]


def make(folder: Path) -> None:
    """A directory of random bf16 weights."""
    folder.mkdir(parents=True)
    spec = decoder_spec(load_config(SETTINGS).model)
    tensors = {
        name: (torch.bfloat16, their_shape(group, shapes(spec), spec))
        for name, group in by_tensor(llama.keys(spec)).items()
    }
    total = sum(torch.Size(shape).numel() * 2 for _, shape in tensors.values())
    parts = safetensors.shards(tensors, total // FILES)
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        values = (torch.randn(shape, generator=generator).bfloat16() for _, shape in part.tensors.values())
        safetensors.write_shard(folder, part, values)
    safetensors.write_index(folder, parts)
    (folder / "config.json").write_text(json.dumps(llama.to_config(spec)))


def config_of(folder: Path, ranks: int) -> Config:
    lines = ["model=hf", f"model.path={folder / 'model'}", f"run.dir={folder / 'run'}", "data.tokenizer=bytes"]
    return load_config([*lines, f"parallel.tp={ranks}", "train.precision=bf16", "train.device=cpu"])


# ----------------------------------------------------------------------------------------------------------- one rank


def own_bytes() -> int:
    """Memory that is this process's alone or shared by ranks, without files: RssAnon + RssShmem."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def read_bytes() -> int:
    """Bytes that this process has asked the kernel for."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def rank(folder: Path, work: str, cached: bool) -> None:
    """Read this rank's slices into a model, or write them as a checkpoint, and print what that took; the page cache is
    dropped before, unless `cached`. Python's imports are over by then.
    """
    dist.init_process_group("gloo")
    world, main = dist.get_world_size(), dist.get_rank() == 0
    config = config_of(folder, world)
    device = pick_device(config, dist.get_rank(), world)
    mesh = connect(tp_grid(world, world, decoder_spec(config.model).kv_heads), device)
    if main and not cached:
        drop_cache()
    dist.barrier()
    base, before, peak, done = own_bytes(), read_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    dist.barrier()
    started, shard = time.perf_counter(), 0
    if work == "read":
        model, store = build_model(config, mesh, REFERENCE)
        read_weights(config.model, model, store.fill)
        shard = sum(block.weights.nbytes for block in store.blocks)
    else:
        write(config, mesh, REFERENCE)
    dist.barrier()
    report = {"seconds": time.perf_counter() - started, "read": read_bytes() - before}
    done.set()
    watcher.join()
    reports: list[dict[str, float]] = [{}] * world
    dist.all_gather_object(reports, report | {"extra": peak[0] - base - shard})
    if main:
        print(json.dumps(reports), flush=True)
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ all ranks


def drop_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    time.sleep(IDLE_S)


def run_ranks(folder: Path, ranks: int, *flags: str) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    done = subprocess.run(
        [*command, __file__, str(folder), "--work", *flags],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}


def dd(files: list[Path], target: Path | None, processes: int, *flags: str) -> float:
    """Seconds in which `dd` copies files from the disk to a folder, or to nowhere, in so many processes."""
    drop_cache()
    started = time.perf_counter()
    scripts = [
        " && ".join(
            f"dd if={file} of={target / file.name if target else '/dev/null'} bs=4M status=none {' '.join(flags)}"
            for file in files[i::processes]
        )
        for i in range(processes)
    ]
    for process in [subprocess.Popen(["sh", "-c", script]) for script in scripts]:
        assert process.wait() == 0
    return time.perf_counter() - started


Reports = dict[str, list[dict[str, float]]]


def one_round(folder: Path, ranks: int) -> tuple[dict[str, float], Reports]:
    """Seconds of each contestant, and what the ranks report of their work."""
    files, seconds, reports = sorted((folder / "model").glob("*.safetensors")), dict[str, float](), Reports()
    seconds["dd to /dev/null"] = dd(files, None, ranks)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        seconds["dd into memory"] = dd(files, Path(scratch), ranks)
    shutil.rmtree(folder / "run", ignore_errors=True)
    for name, flags in WORK.items():
        reports[name] = run_ranks(folder, ranks, *flags)
        seconds[name] = max(report["seconds"] for report in reports[name])
    for name, processes in ("dd to the disk", ranks), ("dd to the disk, one process", 1):
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            seconds[name] = dd(files, Path(scratch), processes, "conv=fsync")
    drop_cache()
    started = time.perf_counter()
    export(step_folder(folder / "run" / "checkpoints", 0), folder / "out", verify=False)
    seconds["export"] = time.perf_counter() - started
    shutil.rmtree(folder / "out")
    return seconds, reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", help=argparse.SUPPRESS)  # of a rank, started by this program
    parser.add_argument("--cached", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder, ranks = options.folder.absolute(), options.ranks
    if options.work:
        rank(folder, options.work, options.cached)
        return
    if not (folder / "model").exists():
        make(folder / "model")
    size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) / 1e9
    print(f"{size:.2f} GB, {ranks} ranks, {options.rounds} rounds")
    rounds = [one_round(folder, ranks) for _ in tqdm(range(options.rounds), unit="round", disable=None)]
    for name in rounds[0][0]:
        speeds = [size / seconds[name] for seconds, _ in rounds]
        print(f"{name:36} {statistics.median(speeds):6.2f} GB/s ({min(speeds):.2f} to {max(speeds):.2f})")
    for name in WORK:
        reports = [report for _, work in rounds for report in work[name]]
        extra, read = (max(report[key] for report in reports) / 1e6 for key in ("extra", "read"))
        print(f"{name}: a rank's peak above its value after imports and its shard {extra:.0f} MB, {read:.0f} MB read")
    print(f"a shard: {1e3 * size / ranks:.0f} MB")


if __name__ == "__main__":
    main()
