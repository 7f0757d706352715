"""What a run reports: `metrics.jsonl`, console lines, wandb, and the figures in them. Rank 0 only."""

import json
import math
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from tptrain.config import Config
from tptrain.config.load import write_atomically
from tptrain.records.rows import Row, describe, read_rows, short

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
    found = next((peaks for key, peaks in PEAK_TFLOPS.items() if key in name), None)
    return found[0 if precision == "bf16" else 1] * 1e12 if found else None


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GiB: the allocator's on a gpu, resident on a cpu."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Recorder:
    """Takes each row to the file, the console and wandb."""

    def __init__(self, config: Config, start: int) -> None:
        self.steps = config.train.steps
        path = Path(config.run.dir) / "metrics.jsonl"
        kept = [row for row in read_rows(path) if row["step"] <= start]  # a dead attempt's rows past the checkpoint
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a", buffering=1)
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=start, unit="step", desc=config.run.name, dynamic_ncols=True)
        self.wandb = Wandb(config, self.say, kept)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def tick(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def record(self, row: Row) -> None:
        told = {key: value if math.isfinite(value) else None for key, value in row.items()}  # JSON has no nan
        self.file.write(json.dumps(told) + "\n")
        if self.bar is None:
            print(describe(row, self.steps), flush=True)
        else:
            self.bar.set_postfix_str(short(row))
            if "val_loss" in row:
                self.bar.write(describe(row, self.steps), file=sys.stderr)
        self.wandb.log(row)

    def sync(self) -> None:
        """The rows so far are on the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        self.wandb.finish()


# ---------------------------------------------------------------------------------------------------------------- wandb


class Wandb:
    """Weights & Biases, fed from a thread of its own: a slow or absent server costs the training loop nothing.

    One wandb run for a run directory, however often it is resumed; rows that an attempt had no time to hand over are
    handed over by the next. A failure is said once and ends the logging, not the training: all rows are in
    metrics.jsonl in any case.
    """

    TIMEOUT_S = 5  # for the server to answer, at the start and at the end

    def __init__(self, config: Config, say: Callable[[str], None], earlier: list[Row]) -> None:
        self.config, self.say = config, say
        self.rows: queue.Queue[Row | None] = queue.Queue()
        self.handed_over = Path(config.run.dir) / "wandb" / "handed-over"  # the last step that wandb surely has
        text = self.handed_over.read_text(errors="replace") if self.handed_over.exists() else ""
        last = int(text) if text.isdigit() else 0
        for row in earlier:
            if row["step"] > last:
                self.rows.put(row)
        self.thread = threading.Thread(target=self._work, daemon=True)
        if config.wandb.mode != "disabled":
            self.thread.start()

    def log(self, row: Row) -> None:
        if self.thread.is_alive():
            self.rows.put(row)

    def finish(self) -> None:
        """Hand over what is queued, waiting a few seconds at most."""
        if self.thread.is_alive():
            self.rows.put(None)
            self.thread.join(4 * self.TIMEOUT_S)  # login, start and finish can each take their time-out
            if self.thread.is_alive():
                self.say("warning: wandb did not finish in time; all rows are in metrics.jsonl")

    def _work(self) -> None:
        try:
            run = self._start()
            last = 0
            while (row := self.rows.get()) is not None:
                run.log(row, step=row["step"])
                last = row["step"]
            folder, offline = run.dir, run.offline
            run.finish()
            write_atomically(self.handed_over, str(last))
            if offline:
                self.say(f"wandb: offline; to upload: wandb sync {Path(folder).parent}")
        except Exception as error:  # whatever wandb raises, training goes on
            self.say(f"warning: wandb stopped ({type(error).__name__}: {str(error).splitlines()[0]})")

    def _start(self) -> Any:
        # Its error reports go to a server of their own, and waiting for that one holds up the end of the process.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        identity = Path(self.config.run.dir) / "wandb" / "run-id"
        if not identity.exists():
            identity.parent.mkdir(exist_ok=True)
            write_atomically(identity, f"{int(time.time() * 1e6):x}")
        mode = self.config.wandb.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False, timeout=self.TIMEOUT_S) else "offline"
        if mode == "online":
            try:
                run = self._init("online", identity.read_text())
                self.say(f"wandb: {run.url}")
                return run
            except Exception as error:
                self.say(f"warning: wandb is out of reach ({str(error).splitlines()[0]}); logging offline")
                wandb.teardown()  # its service still holds the run's id
        return self._init("offline", identity.read_text())

    def _init(self, mode: Literal["online", "offline"], identity: str) -> Any:
        import wandb

        return wandb.init(
            mode=mode,
            project=self.config.wandb.project,
            entity=self.config.wandb.entity,
            group=self.config.wandb.group,
            name=self.config.run.name,
            id=identity,
            resume="allow" if mode == "online" else None,
            dir=self.config.run.dir,
            config=asdict(self.config),
            settings=wandb.Settings(
                init_timeout=self.TIMEOUT_S,
                finish_timeout=self.TIMEOUT_S,
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
            ),
        )
