"""What a config would take at each TP degree, before anything runs: memory, traffic, operations.

Everything is read off a dry run of a step (`dry_run.py`).
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from tptrain.config import Config, UserError, check_topology
from tptrain.config.schema import MOST_AT_ONCE, ModelConfig, micro_batch_size
from tptrain.models.check import check_tp, checked_spec
from tptrain.models.cost import CHECKPOINT_BYTES, STAGING_BYTES, checkpoint_every
from tptrain.models.sizes import Facts, sizes
from tptrain.nn.decoder import parameter_count
from tptrain.ops.choose import planned
from tptrain.plan.dry_run import DryRun, dry_run

WIDTH = 110  # columns, piped or not
BINARY = {"GiB": 2.0**30, "MiB": 2.0**20}
DECIMAL = {"GB": 1e9, "MB": 1e6}
FLOPS = {"TFLOPs": 1e12, "GFLOPs": 1e9}
SECONDS = {"s": 1.0, "ms": 1e-3}
# Bytes a second that a rank sends: an H100's NVLink (900 GB/s, half of it each way), a 400 Gb/s adapter for each GPU.
INSIDE_NODE, ACROSS_NODES = 450e9, 50e9
ASSUMED = (
    "Memory: the peak of a step's forward and backward pass: weights, float32 gradients, moments and masters (of\n"
    "these 1/dp with parallel.zero=1), what is kept for the backward pass, and what the loss and the backward pass\n"
    "hold for a while. NCCL, the CUDA context and the waste of the allocator come on top.\n"
    "Host copy: what a rank holds in its node's memory from the first save on, and on CUDA "
    f"{STAGING_BYTES >> 20} MiB of pinned memory.\n"
    "Times: ring all-reduces over tp, 2 (tp - 1) / tp x bytes / bandwidth, without latency, none of it hidden behind\n"
    f"the backward pass. Assumed: {INSIDE_NODE / 1e9:.0f} GB/s a rank in a node (NVLink), "
    f"{ACROSS_NODES / 1e9:.0f} GB/s a rank across nodes (a 400 Gb/s adapter each)."
)


def plan(config: Config) -> str:
    """The report, lines of plain text. Raises UserError where no TP degree at all suits the model."""
    legal, reasons = tp_degrees(config.model)
    runs: dict[int, DryRun] = {}
    steps: dict[int, Step | None] = {}
    for tp in tqdm(legal, desc="dry runs", unit="tp", leave=False, disable=None):
        ranks = ranks_of(config) or tp
        runs[tp] = dry_run_of(config, tp, max(1, ranks // tp))
        try:
            steps[tp] = step_of(config, tp, ranks, runs[tp])
        except UserError as error:
            steps[tp] = None
            reasons.append(str(error) if str(error).startswith("parallel.tp=") else f"parallel.tp={tp}: {error}")
    parts = [
        _heading(config),
        _memory_table(runs),
        _step_table(steps),
        "\n".join(reasons),
        _spanning(config, {tp: step for tp, step in steps.items() if step and tp > 1}),
        ASSUMED,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def dry_run_of(config: Config, tp: int, dp: int) -> DryRun:
    """Raises UserError for a model that a dry run cannot run."""
    try:
        return dry_run(config, tp, dp, planned(config))
    except (NotImplementedError, RuntimeError) as error:
        if config.model.engine != "transformers":
            raise
        raise UserError(
            f"plan: the code of {config.model.name} looks at numbers, as experts do that choose tokens by them, and a "
            f"dry run has none: {str(error).splitlines()[0]}"
        ) from error


def tp_degrees(model: ModelConfig) -> tuple[list[int], list[str]]:
    """The powers of two up to the number of heads that the model allows, and for the others the reason, a line each."""
    legal: list[int] = []
    refused: list[str] = []
    spec, tp = checked_spec(model), 1
    while tp <= spec.heads:
        try:
            check_tp(spec, tp)
            if isinstance(spec, Facts):
                _check_transformers(model, tp)
            legal.append(tp)
        except UserError as error:
            refused.append(str(error))
        tp *= 2
    return legal, refused


def _check_transformers(model: ModelConfig, tp: int) -> None:
    """Raises UserError where Transformers' model cannot be cut into so many parts."""
    from tptrain.hf.resolve import resolve

    assert model.directory is not None
    resolve(None, model.source, model.tp_plan, model.dropout, tp)


def ranks_of(config: Config) -> int | None:
    """Ranks that the config asks for; None where it leaves them to parallel.tp, as on this machine by default."""
    cluster = config.cluster
    if cluster.tasks_per_node is None:
        return None
    ranks = cluster.nodes * cluster.tasks_per_node
    return ranks if cluster.gpus_per_node is not None or ranks != config.parallel.tp else None


@dataclass(frozen=True)
class Step:
    """What an optimizer step asks of one rank."""

    dp: int
    micro_batches: int
    flops: float
    calls: int  # collectives over the tp axis or a part of it
    tp_bytes: float  # in those, a gather or scatter counted half
    dp_bytes: float  # over dp, in the same measure
    in_node: float  # seconds of the tp all-reduces where a TP group lies within a node
    across_nodes: float  # and where it does not


def step_of(config: Config, tp: int, ranks: int, run: DryRun) -> Step:
    """Raises UserError where the ranks or the batch do not divide."""
    train = config.train
    check_topology(replace(config, parallel=replace(config.parallel, tp=tp)), ranks)
    dp = ranks // tp
    over_tp = {call: count for call, count in run.calls.items() if call[1] in ("tp", "kv")}
    tp_bytes = sum(reduced(call) * count for call, count in over_tp.items())
    return Step(
        dp=dp,
        micro_batches=train.global_batch_size // dp // micro_batch_size(config, dp),
        flops=_step_flops(config) / ranks,
        calls=sum(over_tp.values()),
        tp_bytes=tp_bytes,
        dp_bytes=sum(reduced(call) * count for call, count in run.calls.items() if call[1] == "dp"),
        in_node=ring_seconds(tp_bytes, tp, INSIDE_NODE),
        across_nodes=ring_seconds(tp_bytes, tp, ACROSS_NODES),
    )


def reduced(call: tuple[str, str, int]) -> float:
    """Bytes of an all-reduce with as much traffic: a gather or scatter is half of one."""
    operation, _, size = call
    return size / (1 if operation == "all_reduce" else 2)


def ring_seconds(size: float, ranks: int, bandwidth: float) -> float:
    """Seconds that ring all-reduces of `size` bytes take over `ranks`, at `bandwidth` bytes a second each way.

    A ring sends each element 2 (n - 1) / n times (Patarasuk & Yuan 2009, doi:10.1016/j.jpdc.2008.09.002). The sums over
    KV neighbours, a small part of the traffic, go over fewer ranks than tp and are counted as if they did not.
    """
    return 2 * (ranks - 1) / ranks * size / bandwidth


def _step_flops(config: Config) -> float:
    """FLOPs of an optimizer step on all ranks together."""
    train = config.train
    return sizes(config.model).flops_per_token(train.seq_len) * train.global_batch_size * train.seq_len


# ----------------------------------------------------------------------------------------------------------------- text


def _heading(config: Config) -> str:
    model, train, cluster, ranks = config.model, config.train, config.cluster, ranks_of(config)
    where = "as many as tp, so dp = 1; cluster.nodes and cluster.gpus_per_node ask for more"
    if ranks:
        where = f"{ranks} (cluster.nodes={cluster.nodes} x cluster.tasks_per_node={cluster.tasks_per_node}), "
        where += f"so dp = {ranks} / tp"
    parameters = parameter_count(sizes(model))
    size = CHECKPOINT_BYTES * parameters
    unit, scale = unit_of([size], BINARY)
    return (
        f"{model.name}: {parameters / 1e6:,.1f} M parameters; "
        f"a checkpoint has {size / scale:,.2f} {unit}\n"
        f"{_spacing(config, size)}\n"
        f"an optimizer step: {train.global_batch_size:,} sequences of {train.seq_len:,} tokens, "
        f"{_step_flops(config):.3g} FLOPs; micro-batches of "
        f"{train.micro_batch_size or f'up to {MOST_AT_ONCE}'} in {train.precision}\n"
        f"ranks: {where}"
    )


def _spacing(config: Config, size: int) -> str:
    """One line: how often a checkpoint of `size` bytes is written, and the disk that all of them take."""
    every, steps, keep = checkpoint_every(config), config.train.steps, config.checkpoint.keep
    often = f"every {every:,} steps (checkpoint.every), the newest {keep} of them kept"
    count = min(keep + 1, -(-steps // every)) if every else 1  # one is written before the oldest goes
    if count == 1:
        often = "after the last step, and where the run is stopped"
    unit, scale = unit_of([count * size], BINARY)
    return f"one is written {often}: up to {count * size / scale:,.2f} {unit} of disk"


def _memory_table(runs: dict[int, DryRun]) -> str:
    unit, scale = unit_of([run.peak for run in runs.values()], BINARY)
    rows = [
        [str(tp), *(f"{n / scale:,.2f}" for n in (*run.parts.values(), run.peak, run.host_copy))]
        for tp, run in runs.items()
    ]
    return f"memory of a rank, {unit}\n" + _table(["tp", *next(iter(runs.values())).parts, "total", "host copy"], rows)


def _step_table(by_tp: dict[int, Step | None]) -> str:
    steps = [step for step in by_tp.values() if step]
    work, per_work = unit_of((step.flops for step in steps), FLOPS)
    size, per_size = unit_of((max(step.tp_bytes, step.dp_bytes) for step in steps), DECIMAL)
    time, per_time = unit_of((step.across_nodes for step in steps), SECONDS)
    header = ["tp", "dp", "micro-batches", work, "tp calls", f"tp {size}"]
    header += [f"{time} in a node", f"{time} across nodes", f"dp {size}"]
    rows = []
    for tp, step in by_tp.items():
        row = [str(tp), *["-"] * (len(header) - 1)]
        if step:
            row[1:] = [
                f"{step.dp:,}",
                f"{step.micro_batches:,}",
                f"{step.flops / per_work:,.1f}",
                f"{step.calls:,}",
                f"{step.tp_bytes / per_size:,.2f}",
                f"{step.in_node / per_time:,.3f}",
                f"{step.across_nodes / per_time:,.3f}",
                f"{step.dp_bytes / per_size:,.2f}",
            ]
        rows.append(row)
    return "work and all-reduces of a rank in an optimizer step\n" + _table(header, rows)


def _spanning(config: Config, steps: dict[int, Step]) -> str:
    """One line: what the network costs a TP group that does not fit on a node. Empty where there is no such group."""
    if not steps:
        return ""
    tp = config.parallel.tp if config.parallel.tp in steps else max(steps)
    across, within = steps[tp].across_nodes, steps[tp].in_node
    unit, scale = unit_of([across], SECONDS)
    here = f" (here: tp > {config.cluster.tasks_per_node})" if ranks_of(config) else ""
    return (
        f"a TP group that spans nodes{here}: at tp={tp} its all-reduces take {across / scale:,.3f} {unit} a step, "
        f"within a node {within / scale:,.3f} {unit}"
    )


def unit_of(values: Iterable[float], units: dict[str, float]) -> tuple[str, float]:
    """Name and size of the first unit that the largest value reaches, else of the last."""
    largest = max(values, default=0.0)
    return next(((name, size) for name, size in units.items() if largest >= size), list(units.items())[-1])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Right-aligned columns without lines, so that it can be read and cut when piped."""
    table = Table(*header, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
