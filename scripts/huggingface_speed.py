"""What the import and the export of a Hugging Face directory cost: time beside `dd`, memory, bytes read.

    python scripts/huggingface_speed.py FOLDER [--ranks 4] [--rounds 5]

Makes a Llama of 3 GB in 8 files below FOLDER, once. Then, in each round and in turn: `dd` reads the files with as many
processes as there are ranks, to /dev/null and into memory (/dev/shm: there the bytes stay, as an import's do), ranks
read their slices (the import, without writing), and once more from the page cache, `dd` writes as much as the export,
and the export writes. Before the other readings the page cache is dropped, for which it must run as root.
"""

import argparse
import json
import os
import resource
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

from tptrain.checkpoint import safetensors
from tptrain.checkpoint.commit import Commit
from tptrain.checkpoint.export import export
from tptrain.checkpoint.huggingface import by_tensor, shapes, their_shape
from tptrain.checkpoint.layout import weights_state
from tptrain.checkpoint.pretrained import read_weights
from tptrain.checkpoint.save import write_checkpoint
from tptrain.config import Config, load_config
from tptrain.models.directory import adopt
from tptrain.models.families import llama
from tptrain.models.settings import decoder_spec
from tptrain.ops.table import REFERENCE
from tptrain.parallel.connect import connect
from tptrain.parallel.mesh import tp_grid
from tptrain.records.run_dir import step_folder
from tptrain.train.trainer import build_model

FILES = 8
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


def rank(folder: Path, save: bool) -> None:
    """Read this rank's slices, and print what that took; with `save`, write them as a checkpoint afterwards."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    config = config_of(folder, dist.get_world_size())
    grid = tp_grid(dist.get_world_size(), dist.get_world_size(), decoder_spec(config.model).kv_heads)
    mesh = connect(grid, torch.device("cpu"))
    base, before, peak, done = own_bytes(), read_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    dist.barrier()
    started = time.perf_counter()
    model, store = build_model(config, mesh, REFERENCE)
    read_weights(config.model, model, store.fill)
    dist.barrier()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    shard = sum(block.weights.nbytes for block in store.blocks)
    report = {
        "seconds": seconds,
        "extra": peak[0] - base - shard,
        "read": (read_bytes() - before) / shard,
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
    }
    reports: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    if save:
        commit = Commit(1, 0, dist.get_world_size(), dist.get_world_size(), "", 0, {}, optimizer=False)
        write_checkpoint(folder / "run" / "checkpoints", weights_state(store), commit, config, mesh)
    if dist.get_rank() == 0:
        print(json.dumps(reports), flush=True)
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ all ranks


def drop_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def ranks_read(folder: Path, ranks: int, *flags: str) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    done = subprocess.run(
        [*command, __file__, str(folder), "--rank", *flags],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}


def dd(pairs: list[tuple[str, str]], ranks: int, *flags: str) -> float:
    """Seconds of `dd` over pairs of input and output, in so many processes."""
    started = time.perf_counter()
    scripts = [
        " && ".join(
            f"dd if={source} of={target} bs=4M status=none {' '.join(flags)}" for source, target in pairs[i::ranks]
        )
        for i in range(ranks)
    ]
    for process in [subprocess.Popen(["sh", "-c", script]) for script in scripts]:
        assert process.wait() == 0
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder, ranks = options.folder.absolute(), options.ranks
    if options.rank:
        rank(folder, options.save)
        return
    if not (folder / "model").exists():
        make(folder / "model")
    if not (folder / "run" / "checkpoints").exists():
        (folder / "run").mkdir(exist_ok=True)
        adopt(config_of(folder, ranks))
        ranks_read(folder, ranks, "--save")
    files = sorted((folder / "model").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    print(f"{size / 1e9:.2f} GB in {len(files)} files, {ranks} ranks, {options.rounds} rounds")
    names = "dd reads", "dd reads into memory", "import", "import, cached", "dd writes", "export"
    speeds: dict[str, list[float]] = {name: [] for name in names}
    reports: list[dict[str, float]] = []
    for _ in range(options.rounds):
        drop_cache()
        speeds["dd reads"].append(size / 1e9 / dd([(str(file), "/dev/null") for file in files], ranks))
        with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
            drop_cache()
            pairs = [(str(file), f"{scratch}/{file.name}") for file in files]
            speeds["dd reads into memory"].append(size / 1e9 / dd(pairs, ranks))
        drop_cache()
        for name in ("import", "import, cached"):
            reports = ranks_read(folder, ranks)
            speeds[name].append(size / 1e9 / max(report["seconds"] for report in reports))
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            drop_cache()
            pairs = [(str(file), f"{scratch}/{file.name}") for file in files]
            speeds["dd writes"].append(size / 1e9 / dd(pairs, 1, "conv=fsync"))
        drop_cache()
        started = time.perf_counter()
        export(step_folder(folder / "run" / "checkpoints", 1), folder / "out", verify=False)
        speeds["export"].append(size / 1e9 / (time.perf_counter() - started))
        shutil.rmtree(folder / "out")
    for name, values in speeds.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:20} {statistics.median(values):6.2f} GB/s ({spread})")
    worst = max(report["extra"] for report in reports)
    print(f"a rank's peak above its value after imports and its shard: {worst / 1e6:.0f} MB at most")
    print(f"bytes read a rank, of its shard: {max(report['read'] for report in reports):.3f} at most")


if __name__ == "__main__":
    main()
