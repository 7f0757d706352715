"""The training loop: build everything, resume, and step until done or told to stop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tptrain import checkpoint
from tptrain.collectives import all_reduce_
from tptrain.config import Config, UserError
from tptrain.config.sizes import flops_per_token
from tptrain.data import TokenData, prepare
from tptrain.fused import compile_all
from tptrain.layers import initial_values, parameters
from tptrain.loss import cross_entropy, cross_entropy_backward
from tptrain.mesh import Mesh
from tptrain.metrics import Recorder, Row, memory_gb, peak_flops
from tptrain.model import Decoder
from tptrain.native import compile_kernels
from tptrain.optim import Optimizer, learning_rate
from tptrain.stop import Agreement, Stop

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Diverged(Exception):
    """The loss or the gradient is no longer a number."""


@dataclass
class Trainer:
    """The parts of a run on one rank."""

    config: Config
    mesh: Mesh
    data: TokenData
    model: Decoder
    optimizer: Optimizer

    def to_device(self, tokens: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """(b, T + 1) ids -> inputs (b, T) and targets (b*T,), on the device."""
        ids = torch.from_numpy(tokens).to(self.mesh.device, non_blocking=True)
        return ids[:, :-1], ids[:, 1:].flatten()

    def forward_backward(self, tokens: NDArray[np.int64], scale: float) -> Tensor:
        """Add the gradients of a micro-batch's summed cross entropy times `scale`; returns that, a scalar."""
        inputs, targets = self.to_device(tokens)
        x = self.model(inputs)  # (n, D)
        head, vocab = self.model.lm_head.weight, self.config.model.vocab_size
        loss, grad = cross_entropy_backward(x.detach(), head, targets, vocab, self.mesh, scale)
        x.backward(grad)
        return loss

    def step(self, step: int, wants_stop: Callable[[], bool] = lambda: False) -> tuple[Tensor, Tensor]:
        """Do optimizer step number `step`, the first being 1.

        Returns this dp rank's summand of the mean loss in nats, a scalar, and (2,): the gradient norm before clipping,
        and how many ranks want to stop.
        """
        train, mesh, optimizer = self.config.train, self.mesh, self.optimizer
        share = train.global_batch_size // mesh.dp
        first = (step - 1) * train.global_batch_size + mesh.dp_rank * share  # a global sample index
        tokens_in_step = train.global_batch_size * train.seq_len
        total = torch.zeros((), device=mesh.device)
        optimizer.zero_grad()
        size = train.micro_batch_size
        for start in range(first, first + share, size):
            tokens, following = self.data.samples(start, size), start + size
            if following >= first + share:
                optimizer.expect_last()
                following = first + train.global_batch_size
            self.data.prefetch(following, size)
            total += self.forward_backward(tokens, 1 / tokens_in_step)
            mesh.box.touch()
        optimizer.reduce()
        norm = optimizer.norm(wants_stop())
        optimizer.clip(norm[0])
        # On the device, no wait for it: the update is left out where this is 1.
        skip = (~norm[0].isfinite()).float() if train.on_nan == "skip" else None
        optimizer.step(learning_rate(self.config.optim, step, train.steps), skip)
        return total, norm

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean cross entropy in nats a token over the first held-out sequences, the same on every rank."""
        train, held_out = self.config.train, self.data.validation
        count = min(train.eval_sequences, len(held_out))
        total = torch.zeros((), device=self.mesh.device)
        mine = range(self.mesh.dp_rank, self.mesh.dp_rank + -(-count // self.mesh.dp) * self.mesh.dp, self.mesh.dp)
        for start in range(0, len(mine), train.micro_batch_size):  # as many and as large on every rank
            indices = mine[start : start + train.micro_batch_size]
            tokens = np.stack([held_out.sequence(min(index, count - 1)) for index in indices])
            inputs, targets = self.to_device(tokens)
            head = self.model.lm_head.weight
            losses = cross_entropy(self.model(inputs), head, targets, self.config.model.vocab_size, self.mesh)
            total += losses.view(len(tokens), -1)[: sum(index < count for index in indices)].sum()
            self.mesh.box.touch()
        all_reduce_(total, self.mesh.dp_group)
        return total.item() / (count * train.seq_len)


def build(config: Config, mesh: Mesh) -> Trainer:
    """Data, model with step-0 weights, gradients and optimizer."""
    folder = mesh.main_first(lambda: prepare(config.data, _printer(mesh), mesh.box.touch))
    data = TokenData(folder, config.train.seq_len, config.train.seed)
    torch.manual_seed(config.train.seed)
    compile_all(
        config.train.compile == "elementwise" or (config.train.compile == "auto" and mesh.device.type == "cuda")
    )
    in_c = mesh.device.type == "cpu" and config.train.compile != "none"
    compile_kernels(Path(config.data.cache_dir) / "compiled" if in_c else None)
    model = Decoder(config.model, mesh, config.train.recompute, config.parallel.overlap)
    optimizer = Optimizer(model, config.optim, mesh, DTYPES[config.train.precision], config.parallel.zero == 1)
    optimizer.initialise(lambda name, p: initial_values(name, p, config.train.seed, mesh.tp_rank))
    return Trainer(config, mesh, data, model, optimizer)


def train(config: Config, mesh: Mesh, stop: Stop | None = None) -> Agreement | None:
    """Train to `train.steps`, from the newest good checkpoint on. Every rank calls it.

    Returns None at the end, or what was agreed on where a rank wanted to stop before (`stop`); all ranks then stand at
    the same step. Raises UserError for data that cannot be trained on, CheckpointError and Diverged.
    """
    trainer = build(config, mesh)
    say = _printer(mesh)
    say(_introduction(trainer))
    folder = Path(config.run.dir) / "checkpoints"
    found = checkpoint.load_newest(folder, trainer.optimizer, mesh, say)
    start = mesh.box.state.step = found.step if found else 0
    if found and found.data != trainer.data.digest:
        raise UserError(
            f"run.dir={config.run.dir}: its data has changed since it was checkpointed (other texts or another "
            "tokenizer behind the same names). Restore them, or choose another run.dir or run.name."
        )
    if found:
        say(f"resuming from {checkpoint.step_folder(folder, start).name} (saved by {found.world} ranks, tp={found.tp})")
    if start >= config.train.steps:
        say(f"already finished: step {start}, whose checkpoint is whole. A larger train.steps goes on from there")
        return None
    recorder = Recorder(config, start) if mesh.is_main else None
    saver = checkpoint.Saver(folder, trainer.optimizer, config, trainer.data.digest, mesh)
    mesh.box.touch("first_step")
    try:
        agreed = _loop(trainer, start, saver, stop or Stop(mesh), recorder)
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


def _loop(
    trainer: Trainer, start: int, saver: checkpoint.Saver, stop: Stop, recorder: Recorder | None
) -> Agreement | None:
    """Run steps start + 1 and on, to the last or to the one after which all agreed to stop."""
    config, mesh = trainer.config, trainer.mesh
    steps, since, began = config.train.steps, start, time.perf_counter()
    for step in range(start + 1, steps + 1):
        started = time.perf_counter()
        loss, norm = trainer.step(step, stop.wanted)
        norm_value, stopping = stop.read(norm)
        agreed = stop.agree() if stopping and step < steps else None
        save_due = step == steps or _due(step, config.checkpoint.every) or agreed is not None
        save_due = save_due and (agreed is None or agreed.save)
        eval_due = step == steps or (_due(step, config.train.eval_every) and agreed is None)
        row_due = step == steps or agreed is not None or eval_due or _due(step, config.logging.every)
        if row_due or save_due:
            all_reduce_(loss, mesh.dp_group)
            norm_value = norm[0].item()
            _check_finite(config, step, loss.item(), norm_value)
        elif not math.isfinite(norm_value):
            _check_finite(config, step, math.nan, norm_value)
        if row_due:
            seconds = (time.perf_counter() - began) / (step - since)
            row = _row(trainer, step, loss.item(), norm_value, seconds)
            if eval_due:
                row["val_loss"] = trainer.validation_loss()
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
            saver.save(step)
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
        flops = flops_per_token(config.model, config.train.seq_len) * tokens_in_step
        row["mfu"] = flops / seconds / (peak * mesh.world)
    return row


def _printer(mesh: Mesh) -> Callable[[str], None]:
    return (lambda text: print(text, flush=True)) if mesh.is_main else (lambda text: None)


def _introduction(trainer: Trainer) -> str:
    config, mesh = trainer.config, trainer.mesh
    total = sum(math.prod(p.spec.shape) for _, p in parameters(trainer.model))
    mine = sum(p.numel() for _, p in parameters(trainer.model))
    return (
        f"{config.model.name}: {total / 1e6:,.1f} M parameters, {mine / 1e6:,.1f} M on each rank; "
        f"tp={mesh.tp} x dp={mesh.dp} on {mesh.device.type}, {config.train.precision}; "
        f"{len(trainer.data.train):,} sequences of {config.train.seq_len} tokens"
    )
