"""Weights & Biases, as one run for a run directory. Rank 0 only."""

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tptrain.config import Config
from tptrain.config.load import write_atomically
from tptrain.records.evaluations import flat
from tptrain.records.rows import Row, is_evaluation


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
        self.last = int(text) if text.isdigit() else 0
        for row in earlier:
            if row["step"] > self.last:
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
            while (row := self.rows.get()) is not None:
                self._hand_over(run, row)
            folder, offline = run.dir, run.offline
            run.finish()
            write_atomically(self.handed_over, str(self.last))
            if offline:
                self.say(f"wandb: offline; to upload: wandb sync {Path(folder).parent}")
        except Exception as error:  # whatever wandb raises, training goes on
            self.say(f"warning: wandb stopped ({type(error).__name__}: {str(error).splitlines()[0]})")

    def _hand_over(self, run: Any, row: Row) -> None:
        if is_evaluation(row):  # wandb's own steps only rise: that of the checkpoint is a figure of its own
            run.define_metric("eval/*", step_metric="eval_step")
            run.log(flat(row), step=max(run.step, self.last))
        else:
            run.log(_with_table(row), step=row["step"])
            self.last = row["step"]

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


def _with_table(row: Row) -> dict[str, Any]:
    """The row with its samples, if it has any, as a table of its step.

    Not one table that grows, rewritten each time or as increments: of these wandb shows the newest 100 and counts anew
    when an offline run goes on. Tables of a step each are shown step by step, or all together by the query
    `runs.history.concat["samples"]`.
    """
    if "samples" not in row:
        return row
    import wandb

    data: list[Any] = [[row["step"], each["prompt"], each["text"]] for each in row["samples"]]
    return row | {"samples": wandb.Table(columns=["step", "prompt", "text"], data=data)}
