"""`verify` on this machine: one rank computes the reference, then all ranks compute the same and compare."""

import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

from launch.here import run_ranks
from tptrain.config import Config, UserError, write_config
from tptrain.models.check import check_tp, checked_spec
from tptrain.models.cut import BATCHES, SEQUENCES, Cut, cut_of
from tptrain.models.directory import check_weights
from tptrain.models.sizes import Facts, ask_for_cut, sizes
from tptrain.models.spec import DecoderSpec
from tptrain.records.run_dir import CARD, VERIFICATION
from tptrain.records.verification import RESULT, Verification

PROCESS_BYTES = 0.4e9  # of a rank: Python and torch
GIB = 2.0**30
VOCABULARY = 4096  # tokens, where a proposal is verified


def prepare(config: Config) -> tuple[Config, Cut, int]:
    """The config of the ranks, the model that they run, and how many they are. Raises UserError."""
    if any(int(os.environ.get(name, 1)) > 1 for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")):
        raise UserError("verify: starts its ranks by itself, on one machine. Start it once: no torchrun, no srun -n.")
    spec, tp, options, cluster = checked_spec(config.model), config.parallel.tp, config.verify, config.cluster
    world = cluster.nodes * (cluster.tasks_per_node or tp)
    if world % tp:
        raise UserError(f"parallel.tp={tp}: does not divide the {world} ranks. Leave out cluster.tasks_per_node.")
    if options.width is not None and options.width > spec.hidden_size:
        raise UserError(f"verify.width={options.width}: more than the model's {spec.hidden_size}. Leave it out.")
    check_tp(spec, tp)
    if config.model.engine == "transformers":
        ask_for_cut(config)
    smaller = cut_of(config)
    check_tp(smaller.spec, tp)
    if options.weights == "model" and (options.shrinks or config.model.path is None):
        why = "verify.width and verify.vocab shrink it" if config.model.path else "only model=hf has weights"
        raise UserError(f"verify.weights=model: {why}. Use verify.weights=random.")
    own = config.model.path is not None and options.reads_weights
    if own and config.model.engine == "native":
        check_weights(config.model)
    train = replace(
        config.train,
        seq_len=smaller.length,
        global_batch_size=SEQUENCES * BATCHES * (world // tp),
        micro_batch_size=SEQUENCES,
    )
    verify = replace(options, weights="model" if own else "random")
    return replace(config, train=train, verify=verify), smaller, world


def verify(config: Config) -> int:
    """Say what it takes, run it, show and write what comes out. Returns the exit code."""
    config, smaller, world = prepare(config)
    folder = Path(config.run.dir)
    facts = _facts(config, smaller, world)
    for name in ("model", "sizes", "topology"):
        if name in facts:
            print(f"{name}: {facts[name]}", flush=True)
    _check_memory(config, smaller.spec, world)
    scratch = folder / ".verify"
    _make(scratch)
    try:
        write_config(config, scratch / "config.yaml")
        began = time.monotonic()
        command = ["-m", "tptrain.run.verify", str(scratch)]
        code = run_ranks([*command, "reference"], 1, "verify") or run_ranks([*command, "ranks"], world, "verify")
        if code:
            return code
        result = json.loads((scratch / RESULT).read_text())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    facts |= {name: result[name] for name in ("device", "torch", "kernels")} | {"time": time.time()}
    verification = Verification(facts, result["items"])
    verification.write(folder)
    _show(verification)
    print(f"{verification.verdict} ({time.monotonic() - began:.0f} s)\n{folder / VERIFICATION}\n{folder / CARD}")
    return 1 if verification.wrong else 0


def check_proposed(config: Config) -> None:
    """Verify a model whose plan is tptrain's proposal, unless it has been verified for this run at this tp.

    On this machine's CPUs, with random weights and at most VOCABULARY tokens. Raises UserError where it is wrong.
    """
    spec, tp = sizes(config.model), config.parallel.tp
    if not isinstance(spec, Facts) or not spec.proposed or tp == 1:
        return
    report = Path(config.run.dir) / VERIFICATION
    if report.exists():
        before = json.loads(report.read_text())
        same = before.get("plan") == _plan(config)
        if before["verdict"] == "right" and f"tp={tp}" in before["topology"].split() and same:
            return
    print(f"model.tp_plan: {config.model.name} has no plan that cuts its layers. tptrain proposes:", flush=True)
    for name, style in spec.proposed.items():
        print(f"  {name}: {style}")
    print("One step of it is verified before it is trained:", flush=True)
    cluster = replace(config.cluster, nodes=1, tasks_per_node=tp)
    vocab = min(VOCABULARY, spec.vocab_size)
    verified = replace(
        config,
        cluster=cluster,
        train=replace(config.train, device="cpu", precision="fp32"),
        verify=replace(config.verify, vocab=vocab, weights="random"),
        model=replace(config.model, facts=dict(config.model.facts)),
    )
    if verify(verified):
        raise UserError(
            f"model.tp_plan: the proposal for {config.model.name} is wrong at tp={tp}, see above. Give a plan of your "
            "own, or use parallel.tp=1."
        )


def _plan(config: Config) -> str:
    """Whose plan cuts a model of Transformers, in words."""
    proposed = sizes(config.model).proposed if config.model.engine == "transformers" else {}  # type: ignore[union-attr]
    own = "the model's own" + (", with entries of model.tp_plan" if config.model.tp_plan else "")
    if not proposed:
        return own
    digest = hashlib.sha256(json.dumps([config.model.source, proposed], sort_keys=True).encode()).hexdigest()
    return f"proposed by tptrain ({digest[:12]})"


def _facts(config: Config, smaller: Cut, world: int) -> dict[str, object]:
    """What is verified, in words."""
    spec, whole, parallel = smaller.spec, smaller.model, config.parallel

    def size(name: str, ours: int, theirs: int) -> str:
        return f"{name} {ours}" if ours == theirs else f"{name} {ours} for {theirs}"

    layers = ", ".join(map(str, smaller.layers))
    kinds = "all of one kind" if smaller.kinds == 1 else f"one of each of its {smaller.kinds} kinds"
    widths = size("width", spec.hidden_size, whole.hidden_size)
    vocabulary = size("vocabulary", spec.vocab_size, whole.vocab_size)
    axes = [f"tp={parallel.tp}", f"dp={world // parallel.tp}"]
    axes += [name for name in ("sequence_parallel", "overlap") if getattr(parallel, name)]
    axes += [f"zero={parallel.zero}"] if world > parallel.tp else []
    axes += [] if config.train.recompute == "none" else [f"recompute={config.train.recompute}"]
    return {
        "model": f"{config.model.name}: layers {layers} of its {smaller.total}, {kinds}; {widths}, {vocabulary}",
        **({"sizes": _sizes(smaller)} if smaller.widths else {}),
        "weights": "the model's own" if config.verify.weights == "model" else "random, every parameter drawn",
        "topology": " ".join(axes),
        **({"plan": _plan(config)} if config.model.engine == "transformers" else {}),
        "precision": config.train.precision,
        "batch": f"{config.train.global_batch_size} sequences of {smaller.length} tokens, {BATCHES} parts a rank",
    }


def _sizes(smaller: Cut) -> str:
    """What verify.width has made of the fields of a config of Transformers."""
    return ", ".join(f"{field} {ours} for {theirs}" for field, theirs, ours in smaller.widths)


def _make(scratch: Path) -> None:
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
        scratch.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"run.dir={scratch.parent}: cannot be made ({error.strerror}). Choose another.") from error


def _check_memory(config: Config, spec: DecoderSpec | Facts, world: int) -> None:
    """Say how much memory and disk it takes. Raises UserError where this machine's CPUs have less."""
    count = spec.matrix_parameters
    tokens = config.train.global_batch_size * config.train.seq_len
    state = 16 if config.train.precision == "fp32" else 18  # weights, gradients, moments, masters
    logits = 4 * tokens * spec.vocab_size * 3
    one = PROCESS_BYTES + (state + 4) * count + logits
    copies, shares = world // config.parallel.tp, config.parallel.tp
    each = PROCESS_BYTES + (state + 4) * count / shares + logits / world
    together = each * copies * shares
    files = 12 * count + 2 * logits
    print(
        f"memory: about {one / GIB:.1f} GiB for the reference, then {together / GIB:.1f} GiB for {world} ranks; "
        f"{files / GIB:.1f} GiB of files for the time being",
        flush=True,
    )
    free = psutil.virtual_memory().available
    advice = (
        "Shrink the model with verify.width=512 or verify.vocab=4096 (random weights then), or do it on another "
        "machine with this run.dir."
    )
    on_gpu = config.train.device == "cuda" or (config.train.device == "auto" and Path("/dev/nvidiactl").exists())
    if not on_gpu and max(one, together) > free:
        raise UserError(f"verify: this machine has {free / GIB:.1f} GiB of memory free. {advice}")
    base = Path(config.run.dir)
    while not base.exists():
        base = base.parent
    if files > shutil.disk_usage(base).free:
        raise UserError(f"run.dir={config.run.dir}: {shutil.disk_usage(base).free / GIB:.1f} GiB are free. {advice}")


def _show(verification: Verification) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("compared", "tensors", "worst", "distance", "allowed"):
        table.add_column(name, justify="left" if name in ("compared", "worst") else "right")
    for row in verification.rows:
        distance = "no number" if math.isinf(row.distance) else f"{row.distance:.1e}"
        table.add_row(row.name, str(row.count), row.module, distance, f"{row.allowed:.1e}")
    Console(width=110, soft_wrap=True).print(table)
