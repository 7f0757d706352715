"""What a run reports: `metrics.jsonl`, console lines, wandb, and the figures in them. Rank 0 only."""

import os
import resource
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from tptrain.config import Config
from tptrain.config.load import write_atomically
from tptrain.records.evaluations import take
from tptrain.records.rows import Row, describe, is_evaluation, read_all, short, to_line
from tptrain.train.wandb import Wandb

# Dense peaks in TFLOP/s, (bf16, fp32 without TF32), off the vendors' data sheets. The first that is in the name counts.
PEAK_TFLOPS = {
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200": (989, 67),
    "GH200": (989, 67),
    "B200": (2250, 80),
    "A100": (312, 19.5),
    "L40S": (362, 92),
    "A10G": (70, 31),
    "A10": (125, 31),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's dense peak in FLOP/s, or None where it is not known (a cpu among them)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    pair = next((peaks for key, peaks in PEAK_TFLOPS.items() if key in name), None)
    return pair[0 if precision == "bf16" else 1] * 1e12 if pair else None


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GiB: the allocator's on a gpu, resident on a cpu."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Recorder:
    """Takes each row to the file, the console and wandb."""

    def __init__(self, config: Config, start: int) -> None:
        self.steps = config.train.steps
        self.run_dir = Path(config.run.dir)
        path = self.run_dir / "metrics.jsonl"
        kept = [row for row in read_all(path) if row["step"] <= start]  # a dead attempt's rows past the checkpoint
        write_atomically(path, "".join(map(to_line, kept)))
        self.file = path.open("a", buffering=1)
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=start, unit="step", desc=config.run.name, dynamic_ncols=True)
        self.wandb = Wandb(config, self.say, [row for row in kept if not is_evaluation(row)])

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def tick(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def record(self, row: Row) -> None:
        self.file.write(to_line(row))
        if self.bar is None:
            print(describe(row, self.steps), flush=True)
        else:
            self.bar.set_postfix_str(short(row))
            if "val_loss" in row:
                self.bar.write(describe(row, self.steps), file=sys.stderr)
        self.wandb.log(row)
        self._take_evaluations()

    def _take_evaluations(self) -> None:
        """Rows that `eval` has left meanwhile."""
        for row in take(self.run_dir):
            self.file.write(to_line(row))
            self.wandb.log(row)

    def sync(self) -> None:
        """The rows so far are on the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self._take_evaluations()
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        self.wandb.finish()
