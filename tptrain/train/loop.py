"""The training loop: build everything, resume, and step until done or told to stop."""

import gc
import math
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from pathlib import Path

from tptrain.checkpoint.load import load_newest
from tptrain.checkpoint.pretrained import read_weights
from tptrain.checkpoint.save import Saver
from tptrain.config import Config, UserError
from tptrain.config.load import write_atomically
from tptrain.config.schema import MODEL_FILES
from tptrain.models.cost import checkpoint_every
from tptrain.models.directory import DIGEST
from tptrain.models.sizes import sizes
from tptrain.ops.choose import choose
from tptrain.ops.node_cache import node_cache
from tptrain.ops.table import Operations
from tptrain.parallel.collectives import all_reduce_
from tptrain.parallel.mesh import Mesh
from tptrain.records.run_dir import step_folder
from tptrain.train.metrics import Recorder, Row, memory_gb, peak_flops
from tptrain.train.samples import Samples
from tptrain.train.stop import Agreement, Stop
from tptrain.train.trainer import Trainer, build, initialise, parameter_counts

GARBAGE_STEPS = 100  # between two collections of Python's young objects


class Diverged(Exception):
    """The loss or the gradient is no longer a number."""


def train(config: Config, mesh: Mesh, stop: Stop | None = None, ops: Operations | None = None) -> Agreement | None:
    """Train to `train.steps`, from the newest good checkpoint on. Every rank calls it.

    Returns None at the end, or what was agreed on where a rank wanted to stop before (`stop`); all ranks then stand at
    the same step. Raises UserError for data that cannot be trained on, CheckpointError and Diverged.
    """
    say = _printer(mesh)
    ops = ops or choose(mesh.device.type, config.train.compile, node_cache())
    trainer = build(config, mesh, ops, say)
    samples = Samples(trainer) if config.logging.samples else None
    say(_introduction(trainer))
    say(f"computing with {ops.backend}")
    folder = Path(config.run.dir) / "checkpoints"
    loaded = load_newest(folder, trainer.optimizer, mesh, say)
    start = mesh.box.state.step = loaded.step if loaded else 0
    if loaded is None and config.model.path is not None:
        start_from(trainer, say)
    elif loaded is None:
        initialise(trainer)
    if loaded and loaded.data not in ("", trainer.data.digest):  # a model that was imported has seen no data
        raise UserError(
            f"run.dir={config.run.dir}: its data has changed since it was checkpointed (other texts or another "
            "tokenizer behind the same names). Restore them, or choose another run.dir or run.name."
        )
    if loaded:
        say(f"resuming from {step_folder(folder, start).name} (saved by {loaded.world} ranks, tp={loaded.tp})")
    if start >= config.train.steps:
        say(f"already finished: step {start}, whose checkpoint is whole. A larger train.steps goes on from there")
        return None
    recorder = Recorder(config, start) if mesh.is_main else None
    saver = Saver(folder, trainer.optimizer, config, trainer.data.digest, mesh)
    mesh.box.touch("first_step")
    try:
        with closing(_collecting_garbage(range(start + 1, config.train.steps + 1))) as steps:
            agreed = _loop(trainer, start, steps, saver, stop or Stop(mesh), recorder, samples)
        if agreed is None or agreed.save:
            mesh.box.touch("checkpoint")
            saver.finish()
    except Diverged:  # on every rank, so what is being saved can be finished
        saver.finish()
        raise
    finally:
        if recorder is not None:
            recorder.close()
    last = mesh.box.state.step
    if agreed is None:
        say(f"finished: step {last}")
    else:
        saved = "saved" if agreed.save else "no time to save: the steps since the last checkpoint are lost"
        then = "the job goes back into the queue" if agreed.requeue else "launch again to go on"
        say(f"stopped at step {last} ({agreed.reason}), {saved}; {then}")
    return agreed


def start_from(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Read the weights of `model.path`. Raises UserError where they are no longer those that the run began with."""
    config, mesh = trainer.config, trainer.mesh
    say(f"reading the weights of {config.model.directory}")
    if "auto_map" in config.model.source:
        say("its config.json names code of its authors (auto_map), which is not run")
    digest = read_weights(config.model, trainer.model, trainer.optimizer.state.fill, mesh.box.touch)
    trainer.optimizer.publish()
    record = Path(config.run.dir) / MODEL_FILES / DIGEST

    def compare() -> None:
        if record.exists() and (before := record.read_text()) != digest:
            raise UserError(
                f"model.path={config.model.path}: its weights have changed since this run began (digest {digest}, "
                f"before {before}). Restore them, or choose another run.dir."
            )
        write_atomically(record, digest)

    mesh.control.main_first(compare)


def _collecting_garbage(steps: Iterable[int]) -> Generator[int]:
    """The steps, with Python's garbage collected after the same ones on all ranks: a rank that stops for it alone makes
    the others wait.
    """
    gc.collect()
    gc.freeze()  # what is there now stays
    gc.disable()
    try:
        for step in steps:
            yield step
            if step % GARBAGE_STEPS == 0:
                gc.collect(1)
    finally:
        gc.enable()
        gc.unfreeze()


def _loop(
    trainer: Trainer,
    start: int,
    numbers: Iterable[int],
    saver: Saver,
    stop: Stop,
    recorder: Recorder | None,
    samples: Samples | None,
) -> Agreement | None:
    """Run the steps of these numbers, start + 1 and on, to the last or to the one after which all agreed to stop."""
    config, mesh = trainer.config, trainer.mesh
    steps, since, began = config.train.steps, start, time.perf_counter()
    save_every = checkpoint_every(config)
    for step in numbers:
        started = time.perf_counter()
        loss, norm = trainer.step(step, stop.wanted, saver.wait_for_copy)
        norm_value, stopping = stop.read(norm)
        agreed = stop.agree() if stopping and step < steps else None
        save_due = step == steps or _due(step, save_every) or agreed is not None
        save_due = save_due and (agreed is None or agreed.save)
        eval_due, samples_due = (
            step == steps or (_due(step, every) and agreed is None)
            for every in (config.train.eval_every, config.logging.samples_every)
        )
        samples_due = samples_due and samples is not None
        row_due = step == steps or agreed is not None or eval_due or samples_due or _due(step, config.logging.every)
        if row_due or save_due:
            all_reduce_(loss, mesh.group("dp")).wait()
            norm_value = norm[0].item()
            _check_finite(config, step, loss.item(), norm_value)
        elif not math.isfinite(norm_value):
            _check_finite(config, step, math.nan, norm_value)
        if row_due:
            seconds = (time.perf_counter() - began) / (step - since)
            row = _row(trainer, step, loss.item(), norm_value, seconds)
            if eval_due:
                row["val_loss"] = trainer.validation_loss()
            if samples is not None and samples_due:
                row["samples"] = samples.generate()
            if recorder is not None:
                recorder.record(row)
            since, began = step, time.perf_counter()
        if step > start + 1:  # the first one compiles and allocates
            stop.recent.append(time.perf_counter() - started)
        if save_due:
            before = time.perf_counter()
            mesh.box.touch("checkpoint")
            if recorder is not None:
                recorder.sync()  # a checkpoint must not outlive the rows up to it
            exports = config.checkpoint.export
            saver.save(step, exports=agreed is None and (exports == "every" or (exports == "last" and step == steps)))
            began += time.perf_counter() - before  # tokens_per_second is that of the training steps
        mesh.box.state.step = step
        mesh.box.touch("step")
        stop.save_s = saver.needs_s
        if recorder is not None:
            recorder.tick(step)
            if step == start + 1:
                recorder.say(_started(mesh.box.start_up()))
        if agreed is not None:
            return agreed
    return None


def _started(parts: dict[str, float]) -> str:
    each = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    return f"started in {sum(parts.values()):.1f} s: {each}"


def _check_finite(config: Config, step: int, loss: float, norm: float) -> None:
    """Raises Diverged where either is no number and that is to end the run."""
    if config.train.on_nan == "stop" and not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}. Nothing of it was saved.")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _row(trainer: Trainer, step: int, loss: float, norm: float, seconds: float) -> Row:
    config, mesh = trainer.config, trainer.mesh
    tokens_in_step = config.train.global_batch_size * config.train.seq_len
    row: Row = {
        "step": step,
        "loss": loss,
        "lr": trainer.optimizer.adamw.param_groups[0]["lr"],
        "grad_norm": norm,
        "tokens": step * tokens_in_step,
        "tokens_per_second": tokens_in_step / seconds,
        "step_time_s": seconds,
        "memory_gb": round(memory_gb(mesh.device), 3),
    }
    peak = peak_flops(mesh.device, config.train.precision)
    if peak is not None:
        flops = sizes(config.model).flops_per_token(config.train.seq_len) * tokens_in_step
        row["mfu"] = flops / seconds / (peak * mesh.world)
    return row


def _printer(mesh: Mesh) -> Callable[[str], None]:
    return (lambda text: print(text, flush=True)) if mesh.is_main else (lambda text: None)


def _introduction(trainer: Trainer) -> str:
    config, mesh = trainer.config, trainer.mesh
    total, own = parameter_counts(trainer.model)
    return (
        f"{config.model.name}: {total / 1e6:,.1f} M parameters, {own / 1e6:,.1f} M on each rank; "
        f"tp={mesh.size('tp')} x dp={mesh.size('dp')} on {mesh.device.type}, {config.train.precision}; "
        f"{len(trainer.data.train):,} sequences of {config.train.seq_len} tokens"
    )
